"""Networks with attention that start from a plain network's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import awconv
from awconv.models.pretrained import load_weights, weights_overlay
from awconv.models.squeeze_excite import IdentitySqueezeExcite
from tests.networks import moved

PLAIN = "tf_efficientnet_lite0"
VARIANTS = [f"se_{PLAIN}", f"aw_{PLAIN}", f"aw_se_{PLAIN}"]


@pytest.fixture(scope="module")
def plain() -> Any:
    """A network whose norms have seen something."""
    torch.manual_seed(0)
    model = timm.create_model(PLAIN, num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="module")
def weights(plain: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "plain.safetensors"
    save_file(plain.state_dict(), path)
    return path


def features(network: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return network.eval().forward_features(images)


@pytest.mark.parametrize("classes", [5, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_what_starts_as_identity_starts_from_the_plain_networks_file(
    name: str, classes: int, plain: Any, weights: Path
) -> None:
    overlay = weights_overlay(name, weights)
    model = timm.create_model(name, num_classes=classes, pretrained=True, pretrained_cfg_overlay=overlay)
    state = model.state_dict()
    for key, tensor in plain.state_dict().items():
        if classes == 5 or not key.startswith("classifier."):
            assert torch.equal(state[key], tensor), key
    images = torch.randn(2, 3, 32, 32)
    expected = features(plain, images)
    # Roundings of single precision, over 49 convolutions; multiplying by 1 rounds nothing.
    tolerance = 0.0 if name.startswith("se_") else 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(features(model, images), expected, rtol=0, atol=tolerance)


def test_a_file_of_the_network_itself_is_taken_as_it_is(tmp_path: Path) -> None:
    name = f"aw_se_{PLAIN}"
    trained = timm.create_model(name)
    for parameter in trained.parameters():
        parameter.data.add_(0.01)
    save_file(trained.state_dict(), tmp_path / "trained.safetensors")
    overlay = weights_overlay(name, tmp_path / "trained.safetensors")
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    for key, tensor in trained.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", VARIANTS)
def test_a_file_that_lacks_some_of_the_attention_is_refused(name: str, tmp_path: Path) -> None:
    state = timm.create_model(name).state_dict()
    lost = [key for key in state if key.startswith("blocks.1.0.") and (".attention." in key or ".se." in key)]
    assert lost
    save_file({key: tensor for key, tensor in state.items() if key not in lost}, tmp_path / "some.safetensors")
    with pytest.raises(ValueError, match=rf"does not hold the weights of {name}: \d+ names differ, such as blocks.1.0"):
        weights_overlay(name, tmp_path / "some.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "some.safetensors")))


@pytest.mark.parametrize(("of", "into"), [("fresh", "identity"), ("identity", "fresh")])
def test_a_file_says_in_which_form_its_branches_were_trained(of: str, into: str, tmp_path: Path) -> None:
    name, file = "aw_resnet8_cifar", tmp_path / "trained.safetensors"
    trained = moved(timm.create_model(name, aw_args=dict(init=of))).eval()
    save_file(trained.state_dict(), file)
    arguments: dict[str, Any] = dict(aw_args=dict(init=into))
    overlay = weights_overlay(name, file, arguments)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), trained(images))


def test_branches_that_start_at_random_are_not_made_up(weights: Path) -> None:
    arguments: dict[str, Any] = dict(aw_args=dict(init="fresh"))
    with pytest.raises(ValueError, match=r"names differ, such as .*attention.*; attention that starts as the identity"):
        weights_overlay(f"aw_{PLAIN}", weights, arguments)
    overlay = dict(file=str(weights), num_classes=5)
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model(f"aw_{PLAIN}", num_classes=5, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)


def test_squeeze_and_excitation_starts_as_the_identity_and_learns_from_the_first_step() -> None:
    module, images = IdentitySqueezeExcite(8, 8), torch.rand(2, 8, 5, 5)
    assert module.is_identity()
    assert torch.equal(module(images), images)
    (module(images) * torch.rand(8, 1, 1)).sum().backward()
    assert module.fc2.weight.grad.abs().max() > 0
    assert module.fc2.bias.grad.abs().min() > 0
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert not module.is_identity()
    scores = module.fc2(torch.relu(module.fc1(images.mean((2, 3), keepdim=True))))
    torch.testing.assert_close(module(images), images * 2 * torch.sigmoid(scores))


def test_it_has_the_hidden_channels_of_efficientnets() -> None:
    """EfficientNet-B0 is EfficientNet-Lite0 with squeeze-and-excitation and other activations, as its authors say."""
    with torch.device("meta"):
        ours, theirs = timm.create_model(f"se_{PLAIN}"), timm.create_model("efficientnet_b0")
    found = {name: m.fc1.weight.shape for name, m in ours.named_modules() if isinstance(m, IdentitySqueezeExcite)}
    expected = {name: m.conv_reduce.weight.shape for name, m in theirs.named_modules() if hasattr(m, "conv_reduce")}
    assert found == expected
    assert len(found) == 16
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert awconv.summary(ours).converted == ()


WRAPPED = {
    "a Lightning module": lambda name: f"model.{name}",
    "DataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "a compiled network in a Lightning module": lambda name: f"model._orig_mod.{name}",
    "DataParallel in a Lightning module": lambda name: f"net.module.{name}",
}


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_prefixes_of_wrappers_are_taken_off(wrapper: str, key: str | None, tmp_path: Path) -> None:
    trained, model = (timm.create_model("resnet8_cifar", num_classes=3).eval() for _ in range(2))
    state = {WRAPPED[wrapper](name): tensor for name, tensor in trained.state_dict().items()}
    torch.save(state if key is None else {key: state, "epoch": 1}, tmp_path / "trained.pth")
    assert load_weights(model, "resnet8_cifar", tmp_path / "trained.pth") == 3
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), trained(images))


def test_averaged_weights_come_first(tmp_path: Path) -> None:
    averaged, last, model = (timm.create_model("resnet8_cifar").eval() for _ in range(3))
    both = {f"network.{name}": tensor for name, tensor in last.state_dict().items()}
    both |= {f"ema.module.{name}": tensor for name, tensor in averaged.state_dict().items()}
    files = {
        "fit": {"state_dict": both},
        "timm": {"state_dict": last.state_dict(), "state_dict_ema": averaged.state_dict()},
        "torch": torch.optim.swa_utils.AveragedModel(averaged).state_dict(),
    }
    images = torch.randn(2, 3, 32, 32)
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        load_weights(model, "resnet8_cifar", tmp_path / name)
        assert torch.equal(model(images), averaged(images)), name
        model.load_state_dict(last.state_dict())


def test_the_weights_of_another_network_are_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    model = timm.create_model("resnet8_cifar")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = timm.create_model("resnet20_cifar").state_dict()
    wider = {name: tensor for name, tensor in model.state_dict().items() if name != "conv1.weight"}
    for state, message in (
        (other, "names differ"),
        ({f"a.b.{name}": tensor for name, tensor in other.items()}, "names differ"),
        ({"a": torch.ones(1)}, "names differ"),
        (wider | {"conv1.weight": torch.ones(9, 3, 3, 3)}, r"conv1.weight has shape \(9, 3, 3, 3\) there and \(16"),
        (before | {"bn1.bias": torch.full((16,), torch.nan)}, "infinite or not a number, such as bn1.bias"),
    ):
        torch.save(state, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=message):
            load_weights(model, "resnet8_cifar", tmp_path / "other.pth")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("classes", [10, 3])
def test_a_network_whose_classifier_is_unknown_takes_all_or_nothing(classes: int, tmp_path: Path) -> None:
    def make(classes: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))

    torch.save(make(10).state_dict(), tmp_path / "own.pth")
    model = make(classes)
    if classes == 10:
        assert load_weights(model, "own", tmp_path / "own.pth") == 10
    else:
        with pytest.raises(ValueError, match=r"3.weight has shape \(10, 4\) there and \(3, 4\) in the network"):
            load_weights(model, "own", tmp_path / "own.pth")
