"""Parameters that are shared out among processes: the training is that of processes with all parameters each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import awconv
from tests.training import several

# Single precision, which FSDP needs.
ARGUMENTS = (
    "--trainer.precision=32-true",
    "--data.batch_size=64",
    "--model.weight_decay=0.05",
    "--model.branch_lr_factor=0.5",
    "--trainer.gradient_clip_val=0.5",
)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Sums of two processes' gradients are the same, and the norm to clip by is summed in another order."""
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
        several.start(root / strategy, [*ARGUMENTS, "--trainer.max_epochs=1", f"--trainer.strategy={strategy}"]).done()
    return root


def test_sharded_parameters_train_as_whole_ones(trained: Path) -> None:
    assert_close(several.weights(trained / "fsdp"), several.weights(trained / "ddp"))
    found, expected = several.figures(trained / "fsdp"), several.figures(trained / "ddp")
    for name in ("train/loss", "val/loss", "val/accuracy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
