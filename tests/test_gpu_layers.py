"""A converted network on a GPU as on a CPU: training, compilation, export; and graphs of whole steps."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awconv import AWConv2d, convert

Run = Callable[[Tensor], Tensor]


def network(device: str) -> nn.Module:
    """A dense and a depthwise AW-convolution, of widths that the kernels for GPUs take."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    for channels, groups in ((16, 1), (32, 32)):
        layers += [nn.Conv2d(channels, 32, 3, padding=1, groups=groups), nn.BatchNorm2d(32), nn.ReLU()]
    model = convert(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)))
    assert sum(isinstance(module, AWConv2d) for module in model.modules()) == 2
    return model.to(device)


def images(batch: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 14, 11, generator=generator).to(device), torch.arange(batch, device=device) % 5


def loss_of(model: Run, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def gradients(
    model: nn.Module, batch: tuple[Tensor, Tensor], run: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """The loss, and its gradients by the parameters."""
    loss = loss_of(run or model, batch)
    return [loss.detach(), *torch.autograd.grad(loss, tuple(model.parameters()))]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(
            value, reference, rtol=tolerance, atol=tolerance, check_dtype=False, check_device=False
        )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_losses_and_gradients_are_those_of_double_precision(layout: torch.memory_format, device: str) -> None:
    model = network(device).to(memory_format=layout)
    input, targets = images(8, device)
    input = input.contiguous(memory_format=layout)
    exact = copy.deepcopy(model).cpu().double()
    expected = gradients(exact, (input.cpu().double(), targets.cpu()))
    close(gradients(model, (input, targets)), expected, 1e-4)  # some hundred roundings of float32, normed by batch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(dtype: torch.dtype, device: str) -> None:
    model, batch = network(device), images(16, device)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), torch.amp.GradScaler(device)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=dtype):
            loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_same_bits_twice_in_deterministic_mode(device: str) -> None:
    model, batch = network(device), images(8, device)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients(model, batch) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_compiled_network_trains_and_takes_a_smaller_last_batch(device: str) -> None:
    torch._dynamo.reset()
    model = network(device)
    backend = "inductor" if device == "cuda" else "aot_eager"  # whose C++ takes a minute to compile
    copied = copy.deepcopy(model)
    compiled = torch.compile(copied, fullgraph=True, backend=backend)
    for batch in (8, 8, 5):
        input, targets = images(batch, device)
        torch._dynamo.mark_dynamic(input, 0)
        found = gradients(copied, (input, targets), compiled)
        close(found, gradients(model, (input, targets)), 1e-3)  # fused operations round elsewhere


def test_an_exported_network_computes_the_same_at_any_batch(device: str) -> None:
    model = network(device)
    model(images(8, device)[0])  # statistics other than 0 and 1
    model.eval()
    sizes = ({0: torch.export.Dim("batch", max=65535)},)  # PyTorch's own batch norm on a GPU takes no more
    exported = torch.export.export(model, (images(4, device)[0],), dynamic_shapes=sizes).module()
    for batch in (1, 4, 7):
        input, _ = images(batch, device)
        torch.testing.assert_close(exported(input), model(input), rtol=1e-4, atol=1e-5)


def test_each_sample_has_a_gradient_of_its_own(device: str) -> None:
    model = network(device).eval()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    input, targets = images(3, device)

    def loss(parameters: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, (image[None],)), target[None])

    together = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, input, targets)
    for index in range(3):
        alone = gradients(model, (input[index : index + 1], targets[index : index + 1]))[1:]
        close([together[name][index] for name in parameters], alone, 1e-4)


def test_weights_saved_on_a_device_compute_the_same_on_a_cpu(device: str) -> None:
    model = network(device)
    input, _ = images(8, device)
    model(input)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    there = network("cpu")
    there.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    torch.testing.assert_close(there.eval()(input.cpu()), model.eval()(input).cpu(), rtol=1e-4, atol=1e-4)


def train(model: nn.Module, step: Callable[[tuple[Tensor, Tensor]], None], batches: range) -> list[Tensor]:
    """The state of a network after some steps."""
    for seed in batches:
        step(images(8, "cuda", seed))
    return [tensor.clone() for tensor in model.state_dict().values()]


def stepper(model: nn.Module, run: Run | None = None) -> Callable[[tuple[Tensor, Tensor]], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(run or model, batch).backward()
        optimizer.step()

    return step


@pytest.mark.gpu
def test_a_graph_of_a_whole_training_step_trains_as_python_does() -> None:
    model = network("cuda")
    expected = copy.deepcopy(model)
    static = images(8, "cuda")
    step = stepper(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(static)

    def replay(batch: tuple[Tensor, Tensor]) -> None:
        for place, tensor in zip(static, batch, strict=True):
            place.copy_(tensor)
        graph.replay()

    reference = stepper(expected)
    for _ in range(3):
        reference(images(8, "cuda"))
    close(train(model, replay, range(4)), train(expected, reference, range(4)), 1e-3)


@pytest.mark.gpu
def test_cuda_graphs_of_a_compiled_network_train_as_python_does() -> None:
    torch._dynamo.reset()
    model = network("cuda")
    expected = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    close(train(model, stepper(model, compiled), range(6)), train(expected, stepper(expected), range(6)), 1e-2)
