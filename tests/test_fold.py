"""Attention folded into weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import Tensor, nn

import awconv
from awconv import AWConv1d, AWConv2d, AWConv3d, convert, fold
from awconv.branch import AttentionBranch
from awconv.data import Digits
from awconv.layers import AW_LAYERS, AWConv2dSame
from tests.networks import converted

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def digits() -> Batches:
    """The digits held out for the test, as the package's network takes them."""
    loader = Digits(batch_size=100).test_dataloader()
    return [((images / 255 - 0.305) / 0.376, targets) for images, targets in loader]


def of_digits() -> nn.Module:
    return timm.create_model("aw_resnet8_cifar.digits", pretrained=True)


def classifier(*layers: nn.Module) -> nn.Sequential:
    """With logits that are the means of the last channels."""
    return nn.Sequential(*layers, nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten())


def batches(*sizes: int, images: int = 5, classes: int = 4) -> Batches:
    return [(torch.randn(images, *sizes), torch.randint(classes, (images,))) for _ in range(2)]


def with_constant_attention(model: nn.Module) -> nn.Module:
    """Each value of the attention of its own, and the same for every image."""
    for branch in model.modules():
        if isinstance(branch, AttentionBranch):
            nn.init.zeros_(branch.norm2.weight)
            nn.init.normal_(branch.norm2.bias)
    return model.eval()


def with_varied_attention(model: nn.Module) -> nn.Module:
    for branch in model.modules():
        if isinstance(branch, AttentionBranch):
            nn.init.normal_(branch.norm2.weight)
            nn.init.normal_(branch.norm2.bias)
    return model.eval()


def told_by(model: nn.Sequential, last: Any) -> Batches:
    """Images with the classes that a network finds, after the bias of its last layer has made them equally likely."""
    images = torch.randn(60, 4, 6, 6)
    with torch.no_grad():
        last.bias -= model(images).mean(0)
        return [(images, model(images).argmax(1))]


def accuracy(model: nn.Module, data: Batches) -> float:
    with torch.no_grad():
        right = torch.cat([model(images).argmax(1) == targets for images, targets in data])
    return 100 * right.double().mean().item()


def mean_gain(layer: Any, inputs: Tensor, residual: bool) -> Tensor:
    """In float64, by the layer's branch alone."""
    with torch.no_grad():
        attention = copy.deepcopy(layer.attention).double()(inputs.double())
    return attention.mean(0) + (1 if residual else 0)


def repeated(gain: Tensor, shape: torch.Size) -> Tensor:
    """Expand, an index at a time."""
    for axis, size in enumerate(shape):
        places = torch.arange(size) // (size // gain.shape[axis])
        gain = gain.index_select(axis, places)
    return gain


LAYERS = {
    "of sequences": (AWConv1d, (8, 6, 3), dict(padding=1), (8, 9)),
    "of images": (AWConv2d, (8, 4, 3), dict(bias=False), (8, 7, 7)),
    "of volumes": (AWConv3d, (4, 6, (1, 2, 3)), dict(stride=2, padding=1), (4, 5, 5, 5)),
    "in groups": (AWConv2d, (8, 12, 3), dict(groups=4, dilation=2, padding=2), (8, 7, 7)),
    "depthwise": (AWConv2d, (8, 8, 3), dict(groups=8), (8, 6, 6)),
    "of TensorFlow's padding": (AWConv2dSame, (4, 8, 3), dict(stride=2), (4, 7, 6)),
    "with reflected edges": (AWConv2d, (4, 4, 3), dict(padding=1, padding_mode="reflect"), (4, 6, 6)),
    "with expanded maps": (
        AWConv2d,
        (8, 12, 4),
        dict(groups=2, in_expansion=2, out_expansion=3, kernel_expansion=2),
        (8, 6, 6),
    ),
    "without residual": (AWConv2d, (8, 4, 3), dict(residual=False, activation="tanh"), (8, 6, 6)),
}


@pytest.mark.parametrize("start", ["fresh", "identity"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_weights_are_multiplied_by_the_mean_gain(name: str, start: str) -> None:
    kind, sizes, arguments, input_size = LAYERS[name]
    layer = kind(*sizes, **arguments)
    if start == "identity":
        layer.attention.start_as_identity()
    model = with_varied_attention(classifier(layer))
    data = batches(*input_size)
    gain = mean_gain(layer, torch.cat([images for images, _ in data]), layer.residual or start == "identity")
    expected = layer.weight.double() * repeated(gain, layer.weight.shape)
    report = fold(model, data, 100)
    folded: Any = model[0]
    assert (
        type(folded) is {AWConv1d: nn.Conv1d, AWConv2d: nn.Conv2d, AWConv3d: nn.Conv3d, AWConv2dSame: Conv2dSame}[kind]
    )
    assert folded.weight.dtype == torch.float32
    torch.testing.assert_close(folded.weight.double(), expected, rtol=2e-6, atol=1e-7)
    assert folded.bias is layer.bias
    assert report.trials[0].shape == tuple(layer.weight.shape)
    assert report.trials[0].variation > 0.001


@pytest.mark.parametrize("start", ["fresh", "identity"])
@pytest.mark.parametrize("name", LAYERS)
def test_attention_that_is_constant_is_folded_exactly(name: str, start: str) -> None:
    kind, sizes, arguments, input_size = LAYERS[name]
    layer = kind(*sizes, **arguments)
    if start == "identity":
        layer.attention.start_as_identity()
    model = with_constant_attention(classifier(layer))
    data = batches(*input_size)
    with torch.no_grad():
        before = [model(images) for images, _ in data]
        report = fold(model, data, 0)
        after = [model(images) for images, _ in data]
    assert report.folded == ("0",)
    assert report.trials[0].variation < 1e-7  # vectors and their ends are rounded in two ways
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    layer = AWConv2d(4, 4, 3, dtype=dtype)
    model = with_varied_attention(classifier(layer))
    data = [(images.to(dtype), targets) for images, targets in batches(4, 6, 6)]
    with torch.no_grad():
        attention = torch.cat([layer.attention(images) for images, _ in data]).double()
    expected = (layer.weight.double() * repeated(1 + attention.mean(0), layer.weight.shape)).to(dtype)
    fold(model, data, 100)
    torch.testing.assert_close(model[0].weight, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@settings(max_examples=30)
@given(
    groups=st.sampled_from([1, 2, 4]),
    stride=st.integers(1, 2),
    rates=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.sampled_from([1, 2])),
    residual=st.booleans(),
    activation=st.sampled_from(["sigmoid", "tanh", "relu"]),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_however_the_images_are_batched(
    groups: int, stride: int, rates: tuple[int, int, int], residual: bool, activation: Any, sizes: list[int]
) -> None:
    arguments = dict(zip(("in_expansion", "out_expansion", "kernel_expansion"), rates, strict=True))
    layer = AWConv2d(8, 8, 2, stride, groups=groups, residual=residual, activation=activation, **arguments)
    model = with_varied_attention(classifier(layer))
    data = [(torch.randn(size, 8, 4, 4), torch.zeros(size, dtype=torch.long)) for size in sizes]
    images = torch.cat([images for images, _ in data])
    attention = copy.deepcopy(layer.attention).double()(images.double()).detach()
    gains = attention + residual
    report = fold(model, data, 100)
    expected = layer.weight.double() * repeated(gains.mean(0), layer.weight.shape)
    torch.testing.assert_close(model[0].weight.double(), expected, rtol=1e-5, atol=1e-6)
    scale = gains.square().mean()
    if scale > 0:
        variation = (gains.var(0, correction=0).mean() / scale).sqrt().item()
        spread = (gains.mean(0).var(correction=0) / scale).sqrt().item()
        assert (report.trials[0].variation, report.trials[0].spread) == pytest.approx((variation, spread), abs=1e-5)
    assert report.images == sum(sizes)


def test_a_layer_that_runs_twice_has_the_mean_of_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = AWConv2d(4, 4, 3, padding=1)
            self.again = self.layer

        def forward(self, images: Tensor) -> Tensor:
            return self.again(self.layer(input=images).relu()).mean((2, 3))

    model = with_varied_attention(Twice())
    data = batches(4, 6, 6)
    images, layer = torch.cat([images for images, _ in data]), model.layer
    with torch.no_grad():
        second = layer(images).relu()
    gain = (mean_gain(layer, images, True) + mean_gain(layer, second, True)) / 2
    report = fold(model, data, 100)
    assert model.again is model.layer
    assert report.folded == ("layer",)
    torch.testing.assert_close(
        model.layer.weight.double(), layer.weight.double() * repeated(gain, layer.weight.shape), rtol=1e-5, atol=1e-6
    )


def test_layers_that_share_a_branch_have_a_mean_each() -> None:
    model = classifier(AWConv2d(4, 4, 3, padding=1), nn.ReLU(), AWConv2d(4, 4, 3, padding=1))
    model[2].attention = model[0].attention
    with_varied_attention(model)
    data = batches(4, 6, 6)
    images, layers = torch.cat([images for images, _ in data]), (model[0], model[2])
    with torch.no_grad():
        second = model[:2](images)
    gains = mean_gain(layers[0], images, True), mean_gain(layers[1], second, True)
    assert not torch.allclose(*gains, rtol=1e-3)
    fold(model, data, 100)
    for folded, layer, gain in zip((model[0], model[2]), layers, gains, strict=True):
        expected = layer.weight.double() * repeated(gain, layer.weight.shape)
        torch.testing.assert_close(folded.weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_report_tells_what_the_networks_do(digits: Batches) -> None:
    before, model = of_digits().eval(), of_digits()
    report = fold(model, digits, 0.5)
    everything = of_digits()
    fold(everything, digits, 100)
    assert (report.images, report.accuracy_before) == (360, accuracy(before, digits))
    assert report.accuracy_after == accuracy(model.eval(), digits) >= report.accuracy_before - 0.5
    assert converted(model) == set(report.kept)
    assert converted(before) == {trial.layer for trial in report.trials}
    assert 0 < len(report.folded) < len(report.trials)
    so_far = copy.deepcopy(before)
    for trial in report.trials:
        alone, tried = copy.deepcopy(before), copy.deepcopy(so_far)
        plain = everything.get_submodule(trial.layer)
        for network in (alone, tried):
            network.set_submodule(trial.layer, plain)
        assert trial.accuracy_alone == pytest.approx(accuracy(alone, digits), abs=1e-9)
        assert trial.accuracy_so_far == pytest.approx(accuracy(tried, digits), abs=1e-9)
        assert trial.folded == (trial.accuracy_so_far >= report.accuracy_before - 0.5)
        if trial.folded:
            so_far = tried
    assert report.accuracy_after == accuracy(so_far, digits)
    losses = [report.accuracy_before - trial.accuracy_alone for trial in report.trials]
    assert losses == sorted(losses)


def test_layers_of_the_same_accuracy_are_tried_by_their_cross_entropy(digits: Batches) -> None:
    few = [(images[:6], targets[:6]) for images, targets in digits[:1]]
    report = fold(of_digits(), few, 100)
    assert {trial.accuracy_alone for trial in report.trials} == {100.0}
    everything = of_digits()
    fold(everything, few, 100)
    losses = []
    for trial in report.trials:
        network = of_digits().eval()
        network.set_submodule(trial.layer, everything.get_submodule(trial.layer))
        with torch.no_grad():
            losses.append(nn.functional.cross_entropy(network(few[0][0]).double(), few[0][1]).item())
    assert losses == sorted(losses)
    assert len(set(losses)) == 6


def test_a_drop_of_all_leaves_a_plain_network(digits: Batches) -> None:
    model, plain = of_digits(), timm.create_model("resnet8_cifar", num_classes=10, in_chans=1)
    report = fold(model, digits, 100)
    assert str(model) == str(plain)
    assert (report.parameters_before, report.parameters_after) == (83178, 75002)
    assert report.parameters_after == sum(parameter.numel() for parameter in plain.parameters())
    assert not any(isinstance(module, AW_LAYERS) for module in model.modules())
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_layers_after_one_that_fails_are_tried() -> None:
    """The second layer alone decides the class; the others are constant, and lose nothing."""
    layers = [AWConv2d(4, 4, 3, padding=1, residual=False, activation="tanh") for _ in range(3)]
    model = with_constant_attention(classifier(*layers))
    nn.init.normal_(model[1].attention.norm2.weight, std=20)  # weights of either sign
    report = fold(model, told_by(model, layers[2]), 0)
    assert report.folded == ("0", "2") or report.folded == ("2", "0")
    assert report.kept == ("1",)
    assert report.trials[-1].accuracy_so_far < 100 == report.accuracy_after


class Counted:
    """Counts passes."""

    def __init__(self, data: Batches) -> None:
        self.data, self.passes, self.whole_passes = data, 0, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return iter(self.data)


def test_no_pass_is_made_twice(digits: Batches) -> None:
    data = Counted(digits)
    fold(of_digits(), data, 100)
    assert data.passes == 2 * 6
    model = with_varied_attention(classifier(AWConv2d(4, 4, 3)))
    data = Counted(batches(4, 6, 6))
    fold(model, data, 100)
    assert data.passes == 2


def test_modes_gradients_and_statistics_stay(digits: Batches) -> None:
    model = of_digits().train()
    model.layer2.eval()
    model.layer1[0].conv1.weight.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    fold(model, digits, 100)
    assert {name: module.training for name, module in model.named_modules()}.items() <= modes.items()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()}.items() <= trains.items()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed == {f"layer{stage}.0.conv{number}.weight" for stage in (1, 2, 3) for number in (1, 2)}
    assert all(parameter.is_leaf and parameter.grad_fn is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    model(digits[0][0]).sum().backward()
    assert model.layer3[0].conv1.weight.grad is not None


def test_memory_formats_stay(digits: Batches) -> None:
    model = of_digits().to(memory_format=torch.channels_last)
    fold(model, digits, 100)
    assert model.layer2[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_what_fails_leaves_the_model_as_it_was(digits: Batches) -> None:
    model = of_digits()
    modules, state = list(model.named_modules()), copy.deepcopy(model.state_dict())

    class Broken(Counted):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            whole = super().__iter__()
            images, targets = self.data[0]
            return whole if self.passes < self.whole_passes else iter([(images * math.nan, targets)])

    for whole_passes in (1, 3, 10):
        data = Broken(digits)
        data.whole_passes = whole_passes
        with pytest.raises(ValueError, match="outputs for batch 0 are not finite"):
            fold(model, data, 100)
        assert data.passes == whole_passes
        assert list(model.named_modules()) == modules
        assert all(module.training for module in model.modules())
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert not any(module._forward_pre_hooks for module in model.modules())

    class Shrinking(Counted):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            super().__iter__()
            return iter(self.data[: 4 - self.passes])

    with pytest.raises(ValueError, match="same in each pass; they had 270 images in the first and 180 in a later one"):
        fold(model, Shrinking(digits[:3]), 100)
    assert list(model.named_modules()) == modules


def test_a_compiled_network_is_folded_without_compiling(digits: Batches) -> None:
    model = of_digits().eval()
    model.compile(backend=lambda graph, inputs: pytest.fail("compiled"))
    assert fold(model, digits, 0.5) == fold(of_digits(), digits, 0.5)


def test_methods_that_fold_work_again_where_no_attention_is_left() -> None:
    model = convert(timm.create_model("repvgg_a0", num_classes=3).eval(), init="identity")
    data = [(torch.randn(2, 3, 64, 64), torch.tensor([0, 2]))]
    fold(model, data, 100)
    with torch.no_grad():
        before = model(data[0][0])
        after = timm.utils.reparameterize_model(model)(data[0][0])
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_methods_that_fold_fail_where_attention_is_left() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, images: Tensor) -> Tensor:
            return self.conv(images)

        def fuse(self) -> str:
            return "fused"

    model = classifier(Block(), Block())
    convert(model, ["0.conv", "1.conv"], residual=False, activation="tanh")
    with_constant_attention(model)
    nn.init.normal_(model[1].conv.attention.norm2.weight, std=20)  # weights of either sign
    assert fold(model, told_by(model, model[1].conv), 0).kept == ("1.conv",)
    assert model[0].fuse() == "fused"
    with pytest.raises(ValueError, match="lose their attention"):
        model[1].fuse()


class _Mine(AWConv2d):
    pass


def hooked() -> nn.Module:
    model = classifier(AWConv2d(4, 4, 3))
    model[0].register_forward_hook(lambda module, inputs, output: None)
    return model


def with_unused() -> nn.Module:
    model = classifier(AWConv2d(4, 4, 3))
    model[0].unused = AWConv2d(4, 4, 3)
    return model


WHOLE = [(torch.zeros(2, 4, 6, 6), torch.tensor([0, 3]))]
REFUSED: dict[str, tuple[Any, Any, Any, type[Exception], str]] = {
    "no model": ("resnet18", WHOLE, 1, TypeError, r"fold: model must be an nn\.Module"),
    "no layer": (lambda: classifier(nn.Conv2d(4, 4, 3)), WHOLE, 1, ValueError, "nothing to fold"),
    "hooks": (hooked, WHOLE, 1, ValueError, "fold: the layer '0' has hooks"),
    "own class": (lambda: classifier(_Mine(4, 4, 3)), WHOLE, 1, ValueError, "'0' is a _Mine, of a class of its own"),
    "unused": (with_unused, WHOLE, 1, ValueError, "the layer '0.unused' did not run"),
    "negative drop": (None, WHOLE, -0.1, ValueError, "max_drop must be .* from 0 to 100, got -0.1"),
    "large drop": (None, WHOLE, 101, ValueError, "max_drop must be .* from 0 to 100, got 101"),
    "no drop": (None, WHOLE, math.nan, ValueError, "max_drop must be .* got nan"),
    "drop in words": (None, WHOLE, "1", ValueError, "max_drop must be .* got '1'"),
    "no data": (None, 3, 1, TypeError, "iterated several times: a DataLoader or a list; got int"),
    "iterator": (None, iter(WHOLE), 1, TypeError, "list_iterator, which is used up by one pass"),
    "empty": (None, [], 1, ValueError, "data must hold images, and they are empty"),
    "images alone": (None, [WHOLE[0][0]], 1, ValueError, r"got for batch 0: float32 tensor of shape \(2, 4, 6, 6\)"),
    "a batch": (None, WHOLE[0], 1, ValueError, "got for batch 0: float32 tensor"),
    "a dictionary": (None, [{"image": 1}], 1, ValueError, "got for batch 0: dict"),
    "numbers": (None, [(WHOLE[0][0], 3)], 1, ValueError, "batch 0: float32 tensor .* and int"),
    "shares": (None, [(WHOLE[0][0], torch.rand(2))], 1, ValueError, "whole numbers as labels; .* and float32 tensor"),
    "lengths": (None, [(WHOLE[0][0], torch.tensor([1]))], 1, ValueError, r"int64 tensor of shape \(1,\)"),
    "labels": (
        None,
        [*WHOLE, (WHOLE[0][0], torch.tensor([0, 4]))],
        1,
        ValueError,
        "0 to 3, .* batch 1 has 0 to 4",
    ),
    "no logits": (lambda: nn.Sequential(AWConv2d(4, 4, 3)), WHOLE, 1, ValueError, r"logits of shape \(2, classes\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_folded_is_refused_in_words(name: str) -> None:
    make, data, max_drop, error, message = REFUSED[name]
    model = make() if callable(make) else make or classifier(AWConv2d(4, 4, 3))
    with pytest.raises(error, match=message):
        fold(model, data, max_drop)


def test_the_report_prints_as_a_table(digits: Batches) -> None:
    report = awconv.fold(of_digits(), digits, 0.5)
    heading, *rows, note = str(report).splitlines()
    assert heading.split("  ")[0] == "layer"
    assert [row.split()[0] for row in rows] == [*report.folded, *report.kept]
    assert {row.split()[-1] for row in rows} == {"folded", "kept"}
    assert note.startswith(f"{len(report.folded)} of 6 AW-convolutions folded: accuracy 99.17 % before, ")
