"""Relative branches that have learned, wherever state dicts go: the networks that take them compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import timm
import torch
import torch.distributed as dist
from timm.models import load_checkpoint
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.fx import symbolic_trace
from torch.optim.swa_utils import AveragedModel

from awconv import convert
from tests.networks import moved

IMAGES = (2, 3, 16, 16)
Init = Literal["fresh", "identity"]
FORMS = [pytest.param(init, id=f"into {init}") for init in ("fresh", "identity")]


def network(init: Init = "identity", **arguments: Any) -> nn.Module:
    return convert(timm.create_model("resnet8_cifar"), init=init, **arguments).eval()


def trained(**arguments: Any) -> nn.Module:
    model = moved(network(**arguments)).train()
    with torch.no_grad():
        model(torch.randn(8, *IMAGES[1:]))  # statistics other than 0 and 1
    return model.eval()


def by_file(source: nn.Module, taker: nn.Module, path: Path) -> nn.Module:
    torch.save({"state_dict": source.state_dict()}, path)
    load_checkpoint(taker, str(path))
    return taker


def by_file_of_an_average(source: nn.Module, taker: nn.Module, path: Path) -> nn.Module:
    torch.save({"state_dict_ema": {f"module.{name}": tensor for name, tensor in source.state_dict().items()}}, path)
    load_checkpoint(taker, str(path), use_ema=True)
    return taker


def by_meta(source: nn.Module, taker: nn.Module, path: Path) -> nn.Module:
    taker = taker.to("meta")
    taker.load_state_dict(source.state_dict(), assign=True)
    return taker


def by_empty(source: nn.Module, taker: nn.Module, path: Path) -> nn.Module:
    taker = taker.to("meta").to_empty(device="cpu")
    taker.load_state_dict(source.state_dict())
    return taker


def by_function(source: nn.Module, taker: nn.Module, path: Path) -> Callable[[Tensor], Tensor]:
    return lambda images: functional_call(taker, source.state_dict(), (images,))


def by_moving_average(source: nn.Module, taker: nn.Module, path: Path) -> nn.Module:
    taker.load_state_dict(source.state_dict())
    average = ModelEmaV3(taker, decay=0.5)
    average.update(taker)
    return average.module


def by_mean(source: nn.Module, taker: nn.Module, path: Path) -> nn.Module:
    taker.load_state_dict(source.state_dict())
    average = AveragedModel(taker, use_buffers=True)
    for _ in range(3):
        average.update_parameters(taker)
    return average.module.eval()


WAYS = [by_file, by_file_of_an_average, by_meta, by_empty, by_function, by_moving_average, by_mean]


@pytest.mark.parametrize("init", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_it_computes_the_same(way: Callable[..., Any], init: Init, tmp_path: Path) -> None:
    source, images = trained(), torch.randn(IMAGES)
    taker = network(init)
    assert not torch.allclose(taker(images), source(images), rtol=0.1)
    # An average of equal numbers may be rounded, the rest is copied.
    torch.testing.assert_close(way(source, taker, tmp_path / "state.pt")(images), source(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", FORMS)
@pytest.mark.parametrize(
    ("dtype", "activation", "residual"),
    [(torch.float16, "sigmoid", True), (torch.bfloat16, "relu", False), (torch.float16, "tanh", False)],
)
def test_of_other_precision(dtype: torch.dtype, activation: str, residual: bool, init: Init) -> None:
    arguments = dict(activation=activation, residual=residual)
    source, images = trained(**arguments), torch.randn(IMAGES)
    exact, low = source(images), copy.deepcopy(source).to(dtype)
    same = network(init, **arguments).to(dtype)
    same.load_state_dict(source.state_dict())
    assert torch.equal(same(images.to(dtype)), low(images.to(dtype)))
    back = network(init, **arguments)
    back.load_state_dict(low.state_dict())
    # A rounding of each weight and activation, over seven layers.
    tolerance = 16 * torch.finfo(dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(back(images), exact, rtol=0, atol=tolerance)
    torch.testing.assert_close(same(images.to(dtype)).float(), exact, rtol=0, atol=tolerance)


def test_autocast_rounds_only() -> None:
    model, images = trained(), torch.randn(IMAGES)
    exact = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images)
    tolerance = 16 * torch.finfo(torch.bfloat16).eps * exact.abs().max().item()  # as above
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=tolerance)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_data_parallel_processes_send_each_other_the_mark(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = trained().train()
        alone, images = copy.deepcopy(model), torch.randn(IMAGES)
        parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=True)
        parallel(images).square().sum().backward()
        alone(images).square().sum().backward()
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
        assert model.layer1[0].conv1.attention.relative_to == 0.5
        sent = {name.removeprefix("module."): tensor for name, tensor in parallel.state_dict().items()}
        taker = network("fresh").train()
        taker.load_state_dict(sent)
        assert torch.equal(taker(images), alone(images))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("init", FORMS)
def test_tensors_without_values(init: Init) -> None:
    with FakeTensorMode():
        model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), init=init)
        source = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), init="identity")
        model.load_state_dict(source.state_dict())
        assert model[1].attention.relative
        assert model(torch.randn(2, 3, 9, 9)).shape == (2, 4, 5, 5)


def test_parameters_alone_leave_the_form_as_it_is() -> None:
    source, taker, images = trained(), network(), torch.randn(IMAGES)
    taker.load_state_dict({name: tensor for name, tensor in source.state_dict().items() if "running" in name}, False)
    found = taker.load_state_dict(dict(source.named_parameters()), strict=False)
    assert "layer1.0.conv1.attention.relative_to" in found.missing_keys
    assert torch.equal(taker(images), source(images))


@pytest.mark.parametrize("norm_layer", [None, partial(nn.GroupNorm, 1)])
def test_parameters_alone_that_could_be_whole_branches_are_told(norm_layer: Any) -> None:
    source, taker = trained(norm_layer=norm_layer), network(norm_layer=norm_layer)
    with pytest.warns(UserWarning, match=r"taken as of the paper's form.* add the buffers"):
        taker.load_state_dict(dict(source.named_parameters()), strict=False)
    taker.load_state_dict(source.state_dict())
    images = torch.randn(IMAGES)
    assert torch.equal(taker(images), source(images))


def test_traced_networks_state_dicts_have_the_mark_too() -> None:
    source, taker, images = trained(), network(), torch.randn(IMAGES)
    traced = symbolic_trace(source)
    taker.load_state_dict(traced.state_dict())
    assert torch.equal(taker(images), source(images))
    with pytest.raises(RuntimeError, match=r"Missing key.*relative_to"):
        traced.load_state_dict(moved(network("fresh")).state_dict())


@pytest.mark.parametrize("init", FORMS)
def test_plain_weights_are_loaded_before_there_are_branches(init: Init) -> None:
    plain = timm.create_model("resnet8_cifar")
    with torch.device("meta"):
        taker = network(init)
    found = taker.load_state_dict(plain.state_dict(), strict=False, assign=True)
    assert all(".attention." in name for name in found.missing_keys)
    assert torch.equal(taker.layer1[0].conv1.weight, plain.layer1[0].conv1.weight)


def test_a_mark_of_another_shape_is_refused() -> None:
    # Of one axis, older releases of torch take the first number for a scalar.
    state = network().state_dict() | {"layer1.0.conv1.attention.relative_to": torch.zeros(1, 2)}
    with pytest.raises(RuntimeError, match=r"size mismatch for layer1\.0\.conv1\.attention\.relative_to"):
        network().load_state_dict(state)


@pytest.mark.parametrize("init", FORMS)
def test_a_compiled_network_takes_the_other_form(init: Init, recwarn: pytest.WarningsRecorder) -> None:
    taker, images = network(init), torch.randn(IMAGES)
    compiled: Any = torch.compile(taker, backend="eager")
    compiled(images)
    source = moved(network("fresh" if init == "identity" else "identity"))
    taker.load_state_dict(source.state_dict())
    torch.testing.assert_close(compiled(images), source(images))
    assert not [warning for warning in recwarn if "lru_cache" in str(warning.message)]
