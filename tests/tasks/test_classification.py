"""Classification from pretrained weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import awconv
from awconv import AWConv2d
from awconv.sources import load_task
from awconv.tasks import ClassificationTask
from awconv.training import TrainingCLI
from tests.networks import moved, without_batch_norm

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
    # Algorithms that add in another order in single precision, over seven layers.
    torch.testing.assert_close(features(network, images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert network.fc.weight.shape == (10, 64)  # a classifier of other classes, which starts at zeros
    assert cli.trainer.callback_metrics["train/loss"].item() == pytest.approx(math.log(10), rel=1e-6)


def test_a_checkpoint_needs_the_weights_no_more(weights: Path) -> None:
    trained(weights, "--model.convert={init: identity}")
    weights.unlink()
    (checkpoint,) = weights.parent.rglob("*.ckpt")
    task = load_task(checkpoint)
    assert isinstance(task.network.layer1[0].conv1, AWConv2d)


@pytest.mark.parametrize("classes", [7, 10])
@pytest.mark.parametrize("kind", ["deeper", "of two networks", "plain for AW"])
def test_weights_of_another_network_are_refused(kind: str, classes: int, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    name = "resnet20_cifar" if kind == "deeper" else NETWORK
    state = timm.create_model(name, in_chans=1, num_classes=classes).state_dict()
    if kind == "of two networks":
        state = {f"{one}.{key}": tensor.clone() for one in ("student", "teacher") for key, tensor in state.items()}
    save_file(state, path)
    network = ["--model.network=aw_resnet8_cifar"] if kind == "plain for AW" else []
    with pytest.raises(
        ValueError, match=r"no pretrained weights for \w+ .*weights\.safetensors\): .* \d+ names differ"
    ):
        trained(path, *network)


def converted(seed: int = 0) -> nn.Module:
    """A trained network after a conversion, of 7 classes."""
    torch.manual_seed(seed)
    return moved(awconv.convert(pretrained_network(), init="identity"))


def saved_as(kind: str, network: nn.Module, path: Path) -> None:
    """Writes a network's weights as trainings do, some with those of another network that must not be taken."""
    state, others = network.state_dict(), converted(1).state_dict()

    def prefixed(prefix: str, of: dict[str, Tensor] = state) -> dict[str, Tensor]:
        return {f"{prefix}{name}": tensor for name, tensor in of.items()}

    content: dict[str, Any] = {
        "state dict": state,
        "awconv fit": {"state_dict": prefixed("network.")},
        "awconv fit, averaged": {"state_dict": prefixed("network.", others) | prefixed("ema.module.")},
        "a Lightning module": {"state_dict": prefixed("backbone."), "pytorch-lightning_version": "2.5.5"},
        "DataParallel": prefixed("module."),
        "torch.compile": prefixed("_orig_mod."),
        "compiled and parallel": {"model": prefixed("module._orig_mod.")},
        "torch's AveragedModel": prefixed("module.") | {"n_averaged": torch.tensor(3)},
        "timm": {"state_dict": others, "state_dict_ema": state},
    }[kind]
    torch.save(content, path)


@pytest.mark.parametrize(
    "kind",
    [
        "state dict",
        "awconv fit",
        "awconv fit, averaged",
        "a Lightning module",
        "DataParallel",
        "torch.compile",
        "compiled and parallel",
        "torch's AveragedModel",
        "timm",
    ],
)
def test_a_training_goes_on_from_the_weights_of_any_other(kind: str, tmp_path: Path) -> None:
    network = converted()
    saved_as(kind, network, tmp_path / "weights.pt")
    task = ClassificationTask(
        list("abc"), [1, 8, 8], [0.5], [0.5], network=NETWORK, convert={}, pretrained=str(tmp_path / "weights.pt")
    )
    task.load_pretrained(whole=False)
    found = task.network.state_dict()
    for name, tensor in network.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(found[name], tensor), name
    assert not found["fc.weight"].any()
    with pytest.raises(ValueError, match=r"names differ, such as .*; the file is of a converted network: give"):
        ClassificationTask(
            list("abc"), [1, 8, 8], [0.5], [0.5], network=NETWORK, pretrained=str(tmp_path / "weights.pt")
        ).load_pretrained(whole=False)


@pytest.mark.parametrize("factor", [1.0, 0.1])
@pytest.mark.parametrize("network", [NETWORK, "aw_resnet8_cifar"])  # variants are compared with the same arguments
def test_branches_and_classifier_have_rates_of_their_own(network: str, factor: float, tmp_path: Path) -> None:
    cli = TrainingCLI(
        [
            f"--model.network={network}",
            "--model.lr=0.5",
            "--model.weight_decay=0.01",
            f"--model.branch_lr_factor={factor}",
            f"--model.head_lr_factor={10 * factor}",
            "--model.branch_weight_decay=0.002",
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
        rate = 0.5 * factor if ".attention." in name else 5 * factor if name.startswith("fc.") else 0.5
        decay = 0.002 if ".attention." in name else 0.01
        assert found[parameter] == pytest.approx((rate, decay if parameter.dim() > 1 else 0.0)), name


def fit(root: Path, *arguments: str, callback: Any = None) -> TrainingCLI:
    """A training of a few steps on the digits."""
    cli = TrainingCLI(
        [
            "--trainer.max_steps=4",
            "--trainer.limit_val_batches=0",
            "--trainer.logger=false",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            f"--trainer.default_root_dir={root}",
            *([] if any("network=" in argument for argument in arguments) else [f"--model.network={NETWORK}"]),
            *arguments,
        ],
        run=False,
        save_config=False,
    )
    if callback is not None:
        cli.trainer.callbacks.append(callback)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return cli


def test_the_average_of_the_weights_is_evaluated(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer: Any, task: Any) -> None:
            self.on_train_batch_end(trainer, task)

        def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
            seen.append({name: p.detach().double() for name, p in task.network.named_parameters()})

    cli = fit(tmp_path, "--model.ema_decay=0.75", "--model.lr=0.5", callback=Watch())
    averaged = dict(cli.model.ema.module.named_parameters())
    for name, tensor in averaged.items():
        expected = seen[0][name]
        for weights in seen[1:]:
            expected = 0.75 * expected + 0.25 * weights[name]
        # Single precision, four times.
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    normalised = (images - cli.model.mean) / cli.model.std
    cli.model.eval()
    with torch.no_grad():
        assert torch.equal(cli.model(images), cli.model.ema.module(normalised))
        assert not torch.equal(cli.model(images), cli.model.network(normalised))


def flat_weights(cli: TrainingCLI) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in cli.model.network.parameters()])


def test_memory_format_and_compilation_change_nothing_but_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = flat_weights(fit(tmp_path / "reference", "--model.network=aw_resnet8_cifar", "--model.lr=0.01"))
    last = fit(tmp_path / "last", "--model.network=aw_resnet8_cifar", "--model.lr=0.01", "--model.channels_last=true")
    assert last.model.network.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    # Single precision, over four steps.
    torch.testing.assert_close(flat_weights(last), reference, rtol=1e-3, atol=1e-4)
    original, calls = nn.Module.compile, []

    def compile(self: nn.Module, mode: str | None) -> None:
        calls.append((self, mode))
        original(self, backend="eager")  # traced as any, without a compiler's minutes

    monkeypatch.setattr(nn.Module, "compile", compile)
    compiled = fit(tmp_path / "compiled", "--model.network=aw_resnet8_cifar", "--model.lr=0.01", "--model.compile=true")
    assert calls == [(compiled.model.network, None)]
    torch.testing.assert_close(flat_weights(compiled), reference, rtol=1e-3, atol=1e-4)
    (checkpoint,) = (tmp_path / "compiled").rglob("*.ckpt")
    assert load_task(checkpoint).network.state_dict().keys() == last.model.network.state_dict().keys()


def test_an_accumulated_step_is_that_of_a_large_batch(tmp_path: Path) -> None:
    # Without norms over the batch: two of 64 are then one of 128. Images are the same, as are their shifts.
    plain = ["--model.network=resnet8_cifar", "--model.lr=0.01", "--data.crop_padding=0"]
    monkey = pytest.MonkeyPatch()
    build = ClassificationTask._build

    def without_norms(self: ClassificationTask, **pretrained: Any) -> nn.Module:
        return without_batch_norm(build(self, **pretrained))

    with monkey.context() as patch:
        patch.setattr(ClassificationTask, "_build", without_norms)
        large = fit(tmp_path / "large", *plain, "--data.batch_size=128")
        small = fit(tmp_path / "small", *plain, "--data.batch_size=64", "--trainer.accumulate_grad_batches=2")
    # Sums in another order, in single precision.
    torch.testing.assert_close(flat_weights(small), flat_weights(large), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.mixup={mixup_alhpa: 0.2}", r"mixup must hold arguments of timm.data.Mixup, got {'mixup_alhpa': 0.2}"),
        ("--data.batch_size=1", r"mixup pairs the images of a batch: batch_size must be at least 2, got 1"),
    ],
)
def test_mistakes_in_mixup_are_named(argument: str, message: str, tmp_path: Path) -> None:
    given = [] if "mixup" in argument else ["--model.mixup={mixup_alpha: 0.2}"]
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, argument, *given)


def test_mixed_targets_and_erased_images_reach_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    original = nn.functional.cross_entropy

    def watch(logits: Tensor, targets: Tensor, **arguments: Any) -> Tensor:
        seen.append((targets, torch.tensor(arguments.get("label_smoothing", 0.0))))
        return original(logits, targets, **arguments)

    monkeypatch.setattr("awconv.tasks.classification.F.cross_entropy", watch)
    fit(tmp_path, "--model.mixup={mixup_alpha: 1.0, prob: 1.0}", "--model.label_smoothing=0.1", "--trainer.max_steps=1")
    ((targets, smoothing),) = seen
    assert targets.shape == (128, 10)
    torch.testing.assert_close(targets.sum(1), torch.ones(128))
    assert targets.min() == pytest.approx(0.01)  # a tenth over ten classes, once
    assert smoothing == 0
    inputs: list[Tensor] = []
    monkeypatch.setattr(
        ClassificationTask, "_logits", lambda self, images: (inputs.append(images), self.network(images))[1]
    )
    for erasing in (0.0, 1.0):
        fit(tmp_path, f"--model.erasing={erasing}", "--trainer.max_steps=1")
    differing = (inputs[0] != inputs[1]).flatten(1).any(1)
    assert differing.sum() > 100  # of 128: where no rectangle fits in ten tries, an image stays


@pytest.mark.parametrize("crop_pct", [None, "1", 0, 2.0, float("nan")])
def test_a_share_of_the_image_that_cannot_be_is_refused(crop_pct: Any) -> None:
    """A checkpoint may hold anything."""
    with pytest.raises(ValueError, match="crop_pct must be a number"):
        ClassificationTask(["a", "b"], [1, 8, 8], [0.5], [0.5], crop_pct=crop_pct, network="resnet8_cifar")


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_of_any_strides_are_normalised(channels_last: bool) -> None:
    task = ClassificationTask(
        list("abcdefg"), [3, 8, 8], [0.5] * 3, [0.25] * 3, network=NETWORK, channels_last=channels_last
    )
    images = torch.randint(256, (2, 8, 3, 8), dtype=torch.uint8).transpose(1, 2)  # neither of the usual strides
    expected = (images.double() / 255 - 0.5) / 0.25
    torch.testing.assert_close(task.normalised(images).double(), expected, rtol=0, atol=1e-6)  # float32 near 2


@pytest.mark.gpu
@pytest.mark.parametrize("network", ["resnet8_cifar", "aw_resnet8_cifar"])
def test_cuda_graphs_change_nothing_but_rounding(tmp_path: Path, network: str) -> None:
    arguments = [f"--model.network={network}", "--model.lr=0.01", "--trainer.accelerator=gpu"]
    reference = flat_weights(fit(tmp_path / "eager", *arguments))
    graphs = fit(tmp_path / "graphs", *arguments, "--model.compile=reduce-overhead", "--trainer.limit_val_batches=2")
    # Single precision, over four steps, products in TF32.
    torch.testing.assert_close(flat_weights(graphs), reference, rtol=1e-2, atol=1e-3)
