"""A classification that starts from pretrained weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from awconv import AWConv2d
from awconv.predict import load_task
from awconv.training import TrainingCLI

NETWORK = "resnet8_cifar"


def pretrained_network() -> nn.Module:
    """A network of other classes whose norms have seen something."""
    model = timm.create_model(NETWORK, num_classes=7, in_chans=1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file(pretrained_network().state_dict(), path)
    return path


def trained(weights: Path, *arguments: str) -> TrainingCLI:
    """A task after no step of training."""
    cli = TrainingCLI(
        [
            f"--model.network={NETWORK}",
            f"--model.pretrained={weights}",
            "--trainer.max_steps=1",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            f"--trainer.default_root_dir={weights.parent}",
            *arguments,
        ],
        run=False,
        save_config=False,
    )
    for module in cli.model.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # so that the step leaves the statistics
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return cli


def features(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return network.eval().forward_features(images)


@pytest.mark.parametrize("convert", ["", "--model.convert={init: identity}"])
def test_training_starts_from_the_weights(weights: Path, convert: str) -> None:
    torch.manual_seed(0)
    cli = trained(weights, "--model.lr=0", "--model.weight_decay=0", *[convert] * bool(convert))
    network = cli.model.network
    assert isinstance(network.layer1[0].conv1, AWConv2d) == bool(convert)
    given = pretrained_network()
    given.load_state_dict(load_file(weights))
    images = torch.randn(2, 1, 8, 8)
    expected = features(given, images)
    # Dividing by 1.5 and multiplying by 1.5 in single precision, over seven layers.
    torch.testing.assert_close(features(network, images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert network.fc.weight.shape == (10, 64)  # a classifier of other classes


def test_a_checkpoint_needs_the_weights_no_more(weights: Path) -> None:
    trained(weights, "--model.convert={init: identity}")
    weights.unlink()
    (checkpoint,) = weights.parent.rglob("*.ckpt")
    task = load_task(checkpoint)
    assert isinstance(task.network.layer1[0].conv1, AWConv2d)


@pytest.mark.parametrize("classes", [7, 10])
@pytest.mark.parametrize("kind", ["deeper", "prefixed", "plain for AW"])
def test_weights_of_another_network_are_refused(kind: str, classes: int, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    name = "resnet20_cifar" if kind == "deeper" else NETWORK
    state = timm.create_model(name, in_chans=1, num_classes=classes).state_dict()
    if kind == "prefixed":
        state = {f"model.{key}": tensor for key, tensor in state.items()}
    save_file(state, path)
    network = ["--model.network=aw_resnet8_cifar"] if kind == "plain for AW" else []
    with pytest.raises(ValueError, match=r"no pretrained weights for \w+ .*weights\.safetensors\): \d+ names differ"):
        trained(path, *network)


@pytest.mark.parametrize("factor", [1.0, 0.1])
@pytest.mark.parametrize("network", [NETWORK, "aw_resnet8_cifar"])  # twins are compared with the same arguments
def test_branches_learn_at_a_rate_of_their_own(network: str, factor: float, tmp_path: Path) -> None:
    cli = TrainingCLI(
        [
            f"--model.network={network}",
            "--model.lr=0.5",
            "--model.weight_decay=0.01",
            f"--model.branch_lr_factor={factor}",
            "--trainer.max_steps=1",
            "--trainer.limit_val_batches=0",
            "--trainer.logger=false",
            f"--trainer.default_root_dir={tmp_path}",
        ],
        run=False,
        save_config=False,
    )
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    (optimizer,) = cli.trainer.optimizers
    found = {
        p: (group["initial_lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    for name, parameter in cli.model.network.named_parameters():
        rate = 0.5 * factor if ".attention." in name else 0.5
        assert found[parameter] == pytest.approx((rate, 0.01 if parameter.dim() > 1 else 0.0)), name
