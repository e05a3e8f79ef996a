"""LoRA in converted networks: by peft, where it is installed, and by a double that does what peft does."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import awconv
from awconv.branch import AttentionBranch
from tests.networks import moved

BRANCHES = r".*\.attention\..*"


class LoraLayer(nn.Module):
    """Convolutions and linear layers as peft 0.21 adapts them."""

    def __init__(self, base_layer: Any, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base_layer
        kind = type(base_layer)
        if isinstance(base_layer, nn.Linear):
            self.lora_A = kind(base_layer.in_features, rank, bias=False)
            self.lora_B = kind(rank, base_layer.out_features, bias=False)
        else:
            sizes = (base_layer.kernel_size, base_layer.stride, base_layer.padding)
            self.lora_A = kind(base_layer.in_channels, rank, *sizes, bias=False)
            self.lora_B = kind(rank, base_layer.out_channels, 1, 1, groups=base_layer.groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.base_layer(input) + self.lora_B(self.lora_A(input))
        return output

    def merged(self) -> nn.Module:
        weight = self.base_layer.weight
        down, up = self.lora_A.weight.flatten(1), self.lora_B.weight.flatten(1)
        weight.data += (up @ down).reshape(weight.shape)
        merged: nn.Module = self.base_layer
        return merged


def double(model: nn.Module, targets: Sequence[str], exclude: str | None = None) -> nn.Module:
    """Adapts the modules whose names end in a target."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        matches = any(name == target or name.endswith(f".{target}") for target in targets)
        if matches and not (exclude and re.fullmatch(exclude, name)):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, LoraLayer(module))
    return model


def merge_double(model: nn.Module) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.merged())
    return model


def by_peft(model: nn.Module, targets: Sequence[str], exclude: str | None = None) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=list(targets), exclude_modules=exclude, r=4)
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def merge_by_peft(model: Any) -> nn.Module:
    merged: nn.Module = model.merge_and_unload()
    return merged


LIBRARIES = [
    pytest.param(SimpleNamespace(adapt=double, merge=merge_double), id="double"),
    pytest.param(SimpleNamespace(adapt=by_peft, merge=merge_by_peft), id="peft"),
]
Library = Any


class Bottleneck(nn.Module):
    """Whose convolutions have the names of those of a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 4, 1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv3 = nn.Conv2d(4, 8, 1)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = input + self.conv3(self.conv2(self.conv1(input)).relu())
        return output


def converted() -> nn.Module:
    """A network whose branches have learned."""
    model = awconv.convert(nn.Sequential(nn.Conv2d(3, 8, 3), Bottleneck(), Bottleneck()), init="identity")
    return moved(model)


def trained(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_aw_layer_is_refused_as_a_target(library: Library) -> None:
    with pytest.raises(ValueError, match=r"(Conv2d|LoraLayer) cannot adapt an AWConv2d: .* target other layers"):
        library.adapt(converted(), ["1.conv2"], BRANCHES)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_branch_is_not_caught_by_its_names(library: Library) -> None:
    with pytest.raises(ValueError, match=r"would adapt conv1 of an attention branch, .*exclude_modules="):
        library.adapt(converted(), ["conv1", "conv3"])


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("copied", [False, True])
def test_a_branch_of_ones_own_is_not_caught_either(library: Library, copied: bool) -> None:
    def branch(spec: awconv.BranchSpec) -> nn.Module:
        pool, unflatten = nn.AdaptiveAvgPool2d(spec.attention_size[2:]), nn.Unflatten(1, spec.attention_size[:2])
        project = nn.Sequential(OrderedDict(project=nn.Conv2d(spec.in_channels, spec.attention_size[0], 1)))
        return nn.Sequential(pool, project, unflatten)

    model = awconv.convert(nn.Sequential(nn.Conv2d(3, 8, 3), Bottleneck()), branch=branch)
    model = copy.deepcopy(model) if copied else model
    with pytest.raises(ValueError, match=r"would adapt project of an attention branch, .*exclude_modules="):
        library.adapt(model, ["project"])


def check_adapters(library: Library, model: nn.Module, targets: Sequence[str], expected: int, images: Tensor) -> None:
    """Adapters on other layers compute, learn and merge as in a plain network, and leave the branches."""
    branches = {name: tensor.clone() for name, tensor in model.state_dict().items() if "attention." in name}
    before = model(images)
    adapted = trained(library.adapt(model, targets, BRANCHES))
    assert sum(name.endswith(".base_layer") for name, _ in adapted.named_modules()) == expected
    output = adapted(images)
    assert not torch.allclose(output, before, rtol=1e-2)
    output.square().sum().backward()
    assert all("lora_" in name for name, parameter in adapted.named_parameters() if parameter.grad is not None)
    assert all(parameter.grad.any() for name, parameter in adapted.named_parameters() if "lora_" in name)
    merged = library.merge(adapted)
    assert not any("lora_" in name or "base_layer" in name for name in merged.state_dict())
    # Roundings of single precision in sums of other orders, over 53 layers at most.
    torch.testing.assert_close(merged(images), output, rtol=0, atol=1e-4 * output.abs().max().item())
    for name, tensor in branches.items():
        assert torch.equal(merged.state_dict()[name], tensor), name


@pytest.mark.parametrize("library", LIBRARIES)
def test_other_layers_are_adapted_when_branches_are_left_out(library: Library) -> None:
    check_adapters(library, converted(), ["conv1", "conv3"], 4, torch.randn(2, 3, 9, 9))


@pytest.mark.parametrize("library", LIBRARIES)
def test_pointwise_convolutions_and_the_head_of_a_mobilenet_are_adapted(library: Library) -> None:
    model = moved(awconv.convert(timm.create_model("mobilenetv2_050", num_classes=5), init="identity"))
    # A block without expansion, 16 with, and the head.
    targets = ["conv_pw", "conv_pwl", "classifier"]
    check_adapters(library, model, targets, 1 + 2 * 16 + 1, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("tuner", ["LoHa", "LoKr", "OFT", "BOFT", "IA3", "HRA", "AdaLora"])
def test_other_adapters_of_peft_are_refused_too(tuner: str) -> None:
    peft = pytest.importorskip("peft")
    further: dict[str, Any] = dict(
        OFT=dict(oft_block_size=4),
        BOFT=dict(boft_block_size=4),
        IA3=dict(feedforward_modules=[]),
        AdaLora=dict(total_step=10),
    )
    config = getattr(peft, f"{tuner}Config")(target_modules=["1.conv2"], **further.get(tuner, {}))
    with pytest.raises(ValueError, match="cannot adapt an AWConv2d"):
        peft.get_peft_model(converted(), config)


def test_branches_are_trained_whole_beside_adapters() -> None:
    peft = pytest.importorskip("peft")
    model, images = converted(), torch.randn(2, 3, 9, 9)
    config = peft.LoraConfig(target_modules=["conv3"], modules_to_save=["attention"], r=4)
    adapted = trained(peft.get_peft_model(model, config))
    adapted(images).square().sum().backward()
    learns = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
    assert sum("attention" in name for name in learns) == 2 * 6
    moved(adapted)
    output, merged = adapted(images), adapted.merge_and_unload()
    assert isinstance(merged[1].conv2.attention, AttentionBranch)
    torch.testing.assert_close(merged(images), output, rtol=1e-5, atol=1e-5)  # as above, over 5 layers


@pytest.mark.parametrize("library", LIBRARIES)
def test_adapters_are_merged_before_the_conversion(library: Library) -> None:
    """Then they are weights as any others."""
    plain, images = nn.Sequential(nn.Conv2d(3, 8, 3), Bottleneck()).eval(), torch.randn(2, 3, 9, 9)
    merged = library.merge(trained(library.adapt(plain, ["conv2"])))
    expected = merged(images)
    model = awconv.convert(merged, init="identity")
    assert isinstance(model[1].conv2, awconv.AWConv2d)
    torch.testing.assert_close(model.eval()(images), expected, rtol=1e-5, atol=1e-5)  # as above


class TestSaved:
    """Adapters and branches in a file of peft's, on a base that is there."""

    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def model(self, state: dict[str, Tensor] | None = None, **arguments: Any) -> nn.Module:
        network = timm.create_model("resnet8_cifar", num_classes=5)
        network.load_state_dict(network.state_dict() if state is None else state)
        return awconv.convert(network, "layer2.*", init="identity", **arguments)

    def adapted(self, network: nn.Module) -> Any:
        """After two steps."""
        peft = pytest.importorskip("peft", reason="needs peft")
        saved = ["attention", "input_attention", "fc"]
        model = peft.get_peft_model(
            network, peft.LoraConfig(target_modules=r"layer3\..*\.conv\d", modules_to_save=saved)
        )
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        awconv.check_optimizer(model, optimizer)
        for _ in range(2):
            model.train()(self.images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.eval()

    @pytest.mark.parametrize("input_gain", [False, True])
    def test_with_held_norms_they_compute_the_same_and_leave_the_base(self, input_gain: bool, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft", reason="needs peft")
        plain = timm.create_model("resnet8_cifar", num_classes=5).state_dict()
        network = self.model(plain, input_gain=input_gain)
        awconv.train_only(network, "branch", "head")
        model = self.adapted(network)
        model.save_pretrained(tmp_path)
        base = self.model(plain, input_gain=input_gain).eval()
        expected = base(self.images)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        assert torch.equal(loaded(self.images), model(self.images))
        assert not torch.allclose(model(self.images), expected, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(self.images), expected)

    def test_statistics_that_moved_are_not_in_the_file(self, tmp_path: Path) -> None:
        """Why the page says that norms must be held."""
        peft = pytest.importorskip("peft", reason="needs peft")
        plain = timm.create_model("resnet8_cifar", num_classes=5).state_dict()
        model = self.adapted(self.model(plain))
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(self.model(plain), tmp_path).eval()
        assert not torch.allclose(loaded(self.images), model(self.images), atol=1e-3)
