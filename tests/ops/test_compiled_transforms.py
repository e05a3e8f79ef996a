"""``torch.func`` inside ``torch.compile``, which loses the derivatives of an ``autograd.Function`` (pytorch issue
193279): layer and operator take other ways there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

from awconv import AWConv2d, aw_conv2d
from tests.ops.problems import TYPICAL

Run = Callable[[Tensor], Tensor]
EXACT = dict(rtol=1e-9, atol=1e-9)  # float64; other algorithms sum in another order


def squares(run: Run) -> Run:
    return lambda input: run(input).square().sum()


TRANSFORMS: dict[str, Callable[[Run], Run]] = {
    "gradient": lambda run: grad(squares(run)),
    "gradient of a gradient": lambda run: grad(squares(grad(squares(run)))),
    "problems side by side": lambda run: lambda input: vmap(run)(torch.stack([input, 2 * input])),
    "gradients side by side": lambda run: lambda input: vmap(grad(squares(run)))(torch.stack([input, 2 * input])),
    "forward mode": lambda run: lambda input: jvp(run, (input,), (2 * input,))[1],
    "forward over reverse": lambda run: hessian(lambda some: squares(run)(torch.cat([some, some], 1)[:, :4])),
}


@pytest.fixture(autouse=True)
def _anew() -> None:
    torch._dynamo.reset()


RARE = ("gradient of a gradient", "problems side by side", "forward over reverse")  # of which others are parts


@pytest.mark.parametrize(
    "transform",
    [pytest.param(name, marks=[pytest.mark.campaign] if name in RARE else []) for name in TRANSFORMS],
)
def test_a_layer_computes_what_it_does_uncompiled(transform: str, device: str) -> None:
    norm_layer = None if transform.startswith("forward") else "batch"  # whose forward mode PyTorch does not compile
    layer = AWConv2d(4, 4, 3, padding=1, bias=False, norm_layer=norm_layer).double().eval().to(device)
    input = torch.randn(1, 2 if transform == "forward over reverse" else 4, 4, 5, dtype=torch.float64, device=device)
    run = TRANSFORMS[transform](lambda input: layer(input))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), run(input), **EXACT)


@pytest.mark.parametrize("algorithm", ["fused", "per_tap"])
def test_gradients_of_every_tensor_at_once(algorithm: str) -> None:
    case = TYPICAL[algorithm]  # which this algorithm runs elsewhere
    tensors = list(case.tensors.values())

    def loss(*tensors: Tensor) -> Tensor:
        return case.run(**dict(zip(case.tensors, tensors, strict=True))).square().sum()

    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    run = grad(loss, argnums=tuple(range(len(tensors))))
    for found, wanted in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors), expected, strict=True):
        torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("algorithm", ["fused", "per_tap"])
def test_an_algorithm_that_cannot_be_differentiated_there_is_refused_by_name(algorithm: str) -> None:
    input, weight, attention = torch.randn(2, 4, 5, 5), torch.randn(4, 4, 3, 3), torch.rand(2, 4, 1, 3, 3)
    asked = grad(lambda input: aw_conv2d(input, weight, attention, algorithm=algorithm).sum())
    with pytest.raises(Exception, match=r"loses its derivatives inside torch\.func"):
        torch.compile(asked, fullgraph=True, backend="aot_eager")(input)
