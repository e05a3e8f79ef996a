"""Adapters: what was trained of a network, in a file, for the base that it was trained on."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import awconv
from awconv.adapter import fingerprint, read_adapter
from tests.test_train_only import adapted, changed, state, trained

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(9))


@functools.cache
def _pretrained(network: str, classes: int) -> nn.Module:
    torch.manual_seed(3)
    model = timm.create_model(network, num_classes=classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    return model


def pretrained(network: str = "resnet18", classes: int = 5) -> nn.Module:
    """The same one each time, as from a file."""
    return copy.deepcopy(_pretrained(network, classes))


def base(network: str = "resnet18", classes: int = 5, **arguments: Any) -> nn.Module:
    return awconv.convert(pretrained(network, classes), init="identity", **arguments)


def saved(tmp_path: Path, name: str, *parts: str, network: str = "resnet18", steps: int = 2, **arguments: Any) -> Any:
    """An adapter's file, and what the network that was trained computes."""
    model = base(network, **arguments)
    awconv.train_only(model, *parts)
    trained(model, "sgd", steps=steps)
    file = tmp_path / f"{name}.safetensors"
    awconv.save_adapter(model, file)
    return file, outputs(model)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES)


@pytest.mark.parametrize("network", ["resnet18", "tf_efficientnet_lite0"])
@pytest.mark.parametrize("parts", [("branch", "head"), ("branch", "head", "norm"), ("head", "norm"), ("head", "*bn1*")])
def test_an_adapter_makes_the_trained_network_of_the_base(network: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    file, expected = saved(tmp_path, "a", *parts, network=network)
    model = base(network)
    assert not torch.equal(outputs(model), expected)
    assert awconv.load_adapter(model, file) is model
    assert torch.equal(outputs(model), expected)
    parameters = dict(model.named_parameters())
    there = sum(tensor.numel() for name, tensor in load_file(file).items() if name in parameters)
    assert there == awconv.train_only(model, *parts).trained


def test_one_backbone_serves_several_adapters_in_turn(tmp_path: Path) -> None:
    first, of_first = saved(tmp_path, "a", "branch", "head")
    second, of_second = saved(tmp_path, "b", "branch", "head", steps=3)
    model = base()
    for file, expected in ((first, of_first), (second, of_second), (first, of_first)):
        assert torch.equal(outputs(awconv.load_adapter(model, file)), expected)
    assert not torch.equal(of_first, of_second)


def test_an_adapter_that_trained_less_needs_the_base_again(tmp_path: Path) -> None:
    """Its figures hold on the base's own norms, and the model has the other adapter's."""
    more, of_more = saved(tmp_path, "more", "branch", "head", "norm")
    less, of_less = saved(tmp_path, "less", "branch", "head")
    model = awconv.load_adapter(base(), more)
    with pytest.raises(ValueError, match=r"on another base: .* load them again if another adapter has changed more"):
        awconv.load_adapter(model, less)
    assert torch.equal(outputs(model), of_more)
    model.load_state_dict(pretrained().state_dict(), strict=False)
    assert torch.equal(outputs(awconv.load_adapter(model, less)), of_less)
    assert torch.equal(outputs(awconv.load_adapter(model, more)), of_more)


def test_branches_at_their_start_are_no_part_of_the_base(tmp_path: Path) -> None:
    """They change nothing, and each conversion initialises them anew."""
    file, expected = saved(tmp_path, "a", "head", "norm")
    torch.manual_seed(1)
    model = awconv.load_adapter(base(), file)
    assert torch.equal(outputs(model), expected)
    # The plain network adds in another order.
    torch.testing.assert_close(outputs(awconv.load_adapter(pretrained(), file)), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.layer1[0].conv1.attention.norm2.bias[0] += 1  # still a constant, but not that of the start
    with pytest.raises(ValueError, match="on another base"):
        awconv.load_adapter(model, file)


def test_an_average_of_the_weights_is_saved_in_their_place(tmp_path: Path) -> None:
    model = base()
    awconv.train_only(model, "branch", "head")
    average = copy.deepcopy(model).requires_grad_(False)
    trained(model, steps=1)
    awconv.save_adapter(model, tmp_path / "a.safetensors", values=average)
    there = load_file(tmp_path / "a.safetensors")
    assert there.keys() == awconv.adapter_state_dict(model).keys()
    assert all(torch.equal(tensor, average.state_dict()[name]) for name, tensor in there.items())


def test_the_state_dict_is_of_copies_and_of_what_trains_alone() -> None:
    model = base()
    awconv.train_only(model, "head", "layer4.1.bn2", "layer1.0.conv1.attention.conv1.weight")
    before, adapter = state(model), awconv.adapter_state_dict(model)
    branch = {name for name in before if name.startswith("layer1.0.conv1.attention.")}
    norm = {name for name in before if name.startswith("layer4.1.bn2.")}
    assert (len(norm), len(branch)) == (5, 13)
    assert set(adapter) == {"fc.weight", "fc.bias"} | norm | branch
    for tensor in adapter.values():
        tensor.fill_(7)
    assert not changed(before, model)


def test_a_dictionary_is_loaded_too() -> None:
    model = base()
    awconv.train_only(model, "branch", "head")
    adapter = awconv.adapter_state_dict(trained(model))
    assert torch.equal(outputs(awconv.load_adapter(base(), adapter)), outputs(model))


def test_the_file_tells_what_it_is(tmp_path: Path) -> None:
    model = base()
    awconv.train_only(model, "branch")
    awconv.save_adapter(model, tmp_path / "a.safetensors", metadata={"task": "flowers"})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["kind"], metadata["format"], metadata["awconv"]) == ("awconv adapter", "1", awconv.__version__)
    assert metadata["task"] == "flowers"
    assert json.loads(metadata["branches"])["layer1.0.conv1"]["activation"] == "sigmoid"
    with pytest.raises(ValueError, match="save_adapter: metadata must leave base, kind to save_adapter"):
        awconv.save_adapter(model, tmp_path / "b.safetensors", metadata={"kind": "", "base": ""})
    assert not (tmp_path / "b.safetensors").exists()


@given(
    name=st.sampled_from(["conv1.weight", "bn1.running_var", "layer3.0.conv2.weight", "layer2.0.bn2.bias"]),
    position=st.integers(0, 15),
)
def test_the_fingerprint_is_of_every_bit_of_the_base(name: str, position: int) -> None:
    model = timm.create_model("resnet8_cifar")
    others, before = fingerprint(model, [name]), fingerprint(model, ["fc.bias"])
    model.state_dict()[name].view(-1).view(torch.int32)[position] ^= 1
    assert fingerprint(model, ["fc.bias"]) != before
    assert fingerprint(model, [name]) == others


def test_the_fingerprint_knows_neither_memory_format_nor_counts_of_batches() -> None:
    model = base().to(memory_format=torch.channels_last)
    model.bn1.num_batches_tracked += 3
    assert fingerprint(model, []) == fingerprint(base(), [])
    assert fingerprint(model.double(), []) != fingerprint(base(), [])


@pytest.mark.gpu
def test_the_fingerprint_is_the_same_on_a_gpu() -> None:
    assert fingerprint(base().cuda(), []) == fingerprint(base(), [])


def perturbed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.layer3[0].conv1.weight[0, 0, 0, 0] += 1e-6
    return model


WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another base": (lambda: perturbed(base()), "on another base: .* Load the weights that its training started from"),
    "other classes": (
        lambda: base(classes=7),
        r"fc.weight has shape \(5, 512\) in the adapter and \(7, 512\) in the model; the adapter is of 5 classes: "
        r"model.reset_classifier\(5\)",
    ),
    "not converted": (
        pretrained,
        r"an attention branch for 'layer1.0.conv1', which is no AW-convolution of the model; convert the base first.*"
        r'awconv.convert\(model, init="identity"\)',
    ),
    "fewer layers converted": (
        lambda: base(select="layer1.*conv1"),
        r"an attention branch for 'layer1.0.conv2', which is no AW-convolution",
    ),
    "another activation": (
        lambda: base(activation="relu"),
        r"'layer1.0.conv1' has activation='sigmoid', and the model's activation='relu'; convert the base with "
        r"awconv.convert\(model, init=\"identity\", activation='sigmoid'\)",
    ),
    "another form": (lambda: base(residual=False), r"has residual=True, and the model's residual=False"),
    "another rate": (lambda: base(kernel_expansion=3), r"has kernel_expansion=1, and the model's kernel_expansion=3"),
    "another norm": (
        lambda: base(norm_layer=None),
        r"the adapter lacks layer1.0.conv1.attention.conv1.bias, .* of the model's attention branches",
    ),
    "another network": (
        lambda: base("resnet34"),
        r"on another base",
    ),
    "a smaller network": (lambda: base("resnet10t"), r"an attention branch for '.*', which is no AW-convolution"),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("adapters"), "a", "branch", "head")[0]


@pytest.mark.parametrize("kind", WRONG)
def test_a_network_that_does_not_fit_is_refused_and_left(kind: str, file: Path) -> None:
    build, message = WRONG[kind]
    model = build()
    before = state(model)
    with pytest.raises(ValueError, match=f"load_adapter: .*{message}"):
        awconv.load_adapter(model, file)
    assert model.state_dict().keys() == before.keys()
    assert not changed(before, model)


@pytest.mark.parametrize("kind", ["not converted", "other classes", "another norm"])
def test_a_dictionary_that_does_not_fit_is_refused_as_well(kind: str, file: Path) -> None:
    build, message = WRONG[kind]
    model = build()
    before = state(model)
    with pytest.raises(ValueError, match=f"load_adapter: .*{message}"):
        awconv.load_adapter(model, load_file(file))
    assert not changed(before, model)


def test_a_dictionary_of_another_activation_or_network_is_refused(file: Path) -> None:
    with pytest.raises(ValueError, match=r"relative_to is 0.5 in the adapter, and the model's branch, .* starts at 1"):
        awconv.load_adapter(base(activation="relu"), load_file(file))
    with pytest.raises(ValueError, match=r"the adapter has 1 tensors that the model has not, such as none.weight"):
        awconv.load_adapter(base(), {"none.weight": torch.zeros(1)})


def test_only_attention_branches_are_taken_for_such() -> None:
    model = nn.ModuleDict({"block": nn.ModuleDict({"attention": nn.Linear(2, 2)})})
    with pytest.raises(ValueError, match=r"the adapter has 1 tensors that the model has not, such as other.attention"):
        awconv.load_adapter(model, {"other.attention.weight": torch.zeros(2, 2)})


def test_a_mark_of_another_shape_is_refused(file: Path) -> None:
    model, tensors = base(), load_file(file)
    marks = [name for name in tensors if name.endswith("relative_to")]
    with pytest.raises(ValueError, match=r"relative_to is \[0.5, 0.5\] in the adapter"):
        awconv.load_adapter(model, tensors | {marks[0]: torch.full((2,), 0.5)})


@pytest.mark.parametrize("branches", ["{", "[]", '{"layer1": 3}', "[" * 100_000])
def test_metadata_of_others_are_checked(branches: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, metadata = read_adapter(file)
    monkeypatch.setattr("awconv.adapter.read_adapter", lambda _: (tensors, metadata | {"branches": branches}))
    with pytest.raises(ValueError, match="load_adapter: the adapter has metadata that cannot be read: "):
        awconv.load_adapter(base(), file)


def test_branches_with_other_groups_of_norms_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, "groups", "branch", norm_layer=functools.partial(nn.GroupNorm, 1))[0]
    with pytest.raises(ValueError, match=r"has norm_groups=1, and the model's norm_groups=2; .*norm_layer=\.\.\.\)"):
        awconv.load_adapter(base(norm_layer=functools.partial(nn.GroupNorm, 2)), file)


def test_values_are_of_the_same_names() -> None:
    model = base()
    awconv.train_only(model, "branch", "head")
    with pytest.raises(ValueError, match=r"values must have the model's names, and \d+ differ.*give the network in it"):
        awconv.adapter_state_dict(model, values=ModelEmaV3(model))
    with pytest.raises(ValueError, match=r"values must have .* such as .*relative_to"):
        awconv.adapter_state_dict(model, values=awconv.convert(pretrained()))


def rewritten(file: Path, to: Path, tensors: Mapping[str, Tensor] | None = None, **metadata: str) -> Path:
    with safe_open(file, framework="pt") as opened:
        there = opened.metadata()
    save_file(dict(tensors or load_file(file)), to, there | metadata)
    return to


def test_broken_and_foreign_files_are_refused(file: Path, tmp_path: Path) -> None:
    whole, model = file.read_bytes(), base()
    before = state(model)
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    files = {
        "cut": (whole[: len(whole) // 2], r"is broken, or not an adapter of awconv.save_adapter: "),
        "flipped": (bytes(flipped), r"has changed since it was written; copy it again"),
        "empty": (b"", r"is broken, or not an adapter"),
        "text": (b"not safetensors at all", r"is broken, or not an adapter"),
    }
    for name, (content, message) in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            awconv.load_adapter(model, path)
    save_file({"fc.weight": torch.zeros(5, 512)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"is not an adapter of awconv.save_adapter; whole weights are loaded by"):
        awconv.load_adapter(model, tmp_path / "foreign.safetensors")
    later = rewritten(file, tmp_path / "later.safetensors", format="2", awconv="9.0")
    with pytest.raises(ValueError, match=r"has format 2, and this awconv reads 1: it was written by awconv 9.0"):
        awconv.load_adapter(model, later)
    forged = rewritten(file, tmp_path / "forged.safetensors", base="0")
    with pytest.raises(ValueError, match=r"has changed since it was written"):
        read_adapter(forged)
    with pytest.raises(FileNotFoundError, match=r"none.safetensors is not a file; expected one of awconv.save_adapter"):
        awconv.load_adapter(model, tmp_path / "none.safetensors")
    assert not changed(before, model)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = awconv.convert(timm.create_model("resnet8_cifar"), init="identity")
    awconv.train_only(model, "branch", "head")
    path = tmp_path_factory.mktemp("small") / "a.safetensors"
    awconv.save_adapter(model, path)
    return model, path


@given(share=st.floats(0, 0.999), bit=st.integers(0, 7), cut=st.booleans())
def test_no_flipped_bit_and_no_cut_goes_unnoticed(
    small: tuple[nn.Module, Path], share: float, bit: int, cut: bool
) -> None:
    model, file = small
    whole = file.read_bytes()
    position, spoiled = int(share * len(whole)), bytearray(whole)
    spoiled[position] ^= 1 << bit
    copy_ = file.with_name("spoiled.safetensors")
    copy_.write_bytes(spoiled[:position] if cut else spoiled)
    with pytest.raises(ValueError, match=r"spoiled.safetensors (is|has) "):
        awconv.load_adapter(model, copy_)


def test_wrapped_networks_have_the_same_adapters(small: tuple[nn.Module, Path]) -> None:
    model, file = small
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        assert awconv.adapter_state_dict(wrapped).keys() == awconv.adapter_state_dict(model).keys()
        assert awconv.load_adapter(wrapped, file) is wrapped
        assert awconv.train_only(wrapped, "layer3.*") == awconv.train_only(model, "layer3.*")
        awconv.train_only(model, "branch", "head")


def test_there_must_be_a_base_and_something_that_trains(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(ValueError, match="all of the model trains, so there is no base to adapt; freeze the rest"):
        awconv.adapter_state_dict(model)
    with pytest.raises(ValueError, match=r"nothing of the model trains; awconv.train_only says what does"):
        awconv.save_adapter(model.requires_grad_(False), tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got 'resnet18'"):
        awconv.load_adapter("resnet18", tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got None"):
        awconv.adapter_state_dict(None)
    assert not list(tmp_path.iterdir())
