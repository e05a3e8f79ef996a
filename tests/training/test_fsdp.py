"""Parameters that are shared out among processes: the training is that of processes with all parameters each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import awconv
from awconv.cli import main
from awconv.tasks.sharding import _blocks
from awconv.training import TrainingCLI
from awconv.training.checkpoints import find_last, read_checkpoint
from tests.training import several

# Single precision, which FSDP needs.
ARGUMENTS = (
    "--trainer.precision=32-true",
    "--model.weight_decay=0.05",
    "--model.branch_lr_factor=0.5",
    "--trainer.gradient_clip_val=0.5",
    "--trainer.limit_train_batches=4",  # further steps enlarge rounding to 1e-4
    "--model.warmup_epochs=0",
)


def assert_close(found: Mapping[Any, torch.Tensor], expected: Mapping[Any, torch.Tensor]) -> None:
    """Two processes' gradients have the same sums, but the norm to clip by is summed in another order: 1e-7, which some
    steps enlarge."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an epoch with DDP, and of one with FSDP."""
    root = tmp_path_factory.mktemp("trained")
    for strategy in ("ddp", "fsdp"):
        arguments = [*ARGUMENTS, "--data.batch_size=64", "--trainer.max_epochs=1", f"--trainer.strategy={strategy}"]
        several.start(root / strategy, arguments, batch_norm=True).done()
    return root


def checkpoint(root: Path) -> dict[str, Any]:
    last = find_last(root)
    assert last is not None
    return read_checkpoint(last)


def test_sharded_parameters_train_as_whole_ones(trained: Path) -> None:
    """With weight decay, rates of branches, clipped gradients, averaged weights and BatchNorm."""
    found, expected = checkpoint(trained / "fsdp"), checkpoint(trained / "ddp")
    assert_close(found["state_dict"], expected["state_dict"])
    momentum, expected_momentum = (
        {n: of["momentum_buffer"] for n, of in c["optimizer_states"][0]["state"].items()} for c in (found, expected)
    )
    assert_close(momentum, expected_momentum)
    groups, expected_groups = (c["optimizer_states"][0]["param_groups"] for c in (found, expected))
    for group, its in zip(groups, expected_groups, strict=True):
        assert {name: group[name] for name in its} == its
    assert several.losses(trained / "fsdp") == pytest.approx(several.losses(trained / "ddp"), rel=1e-5)


def test_one_process_goes_on_from_sharded_parameters_and_predicts_with_them(trained: Path) -> None:
    longer = [*ARGUMENTS, "--trainer.max_epochs=2", "--ckpt_path=last", "--data.batch_size=128"]
    running = several.start(trained / "fsdp", longer, each=1, batch_norm=True)
    running.done()
    assert "1 process goes on in place of 2, with the same batches" in running.said(0)
    last = find_last(trained / "fsdp")
    assert last is not None
    network = awconv.load(str(last)).network
    images = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert network(images).isfinite().all()


def test_what_sharded_parameters_have_learnt_is_published_and_predicts(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray((16 * load_digits().images[0]).clip(0, 255).astype("uint8")).save("zero.png")
    last = find_last(trained / "fsdp")
    assert main(["publish", str(last), "--tag=sharded", "--data=digits"]) == 0
    (published,) = Path("weights").iterdir()
    capsys.readouterr()
    said = []
    for source in (last, published):
        assert main(["predict", f"--ckpt={source}", "--format=json", "zero.png"]) == 0
        said.append(json.loads(capsys.readouterr().out)["predictions"])
    assert said[0] == said[1]
    assert said[0][0]["label"] in map(str, range(10))


def test_sharded_parameters_go_on_from_a_checkpoint_of_whole_ones(trained: Path) -> None:
    """Further steps from a checkpoint of DDP, with either strategy."""
    last = find_last(trained / "ddp")
    longer = [*ARGUMENTS, "--data.batch_size=64", "--trainer.max_epochs=2"]
    states = []
    for strategy in ("ddp", "fsdp"):
        root = trained / f"from_ddp_{strategy}"
        arguments = [*longer, f"--ckpt_path={last}", f"--trainer.strategy={strategy}"]
        several.start(root, arguments, batch_norm=True).done()
        states.append(checkpoint(root))
    assert states[0]["global_step"] > read_checkpoint(last)["global_step"]
    assert_close(states[1]["state_dict"], states[0]["state_dict"])


@pytest.mark.parametrize("strategy", ["fsdp_cpu_offload", "FSDPStrategy", "ModelParallelStrategy"])
def test_other_kinds_of_sharding_are_refused(strategy: str, tmp_path: Path) -> None:
    named = strategy if strategy.islower() else f"{{class_path: lightning.pytorch.strategies.{strategy}}}"
    with pytest.raises(ValueError, match=r"trainer\.strategy must be fsdp to share out parameters"):
        TrainingCLI(["fit", f"--trainer.strategy={named}", f"--trainer.default_root_dir={tmp_path}"])


class Called(nn.Module):
    """A network whose blocks are as large as those that are gathered one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            awconv.AWConv2d(1, 64, 3, padding=1), nn.Sequential(nn.Conv2d(64, 512, 3), nn.Conv2d(512, 256, 3))
        )


def test_large_blocks_are_gathered_one_by_one_and_aw_convolutions_whole() -> None:
    network = Called()
    blocks = list(_blocks(network))
    assert [tuple(block.weight.shape) for block in blocks] == [(256, 512, 3, 3)]
