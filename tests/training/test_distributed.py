"""Two processes on one machine train and evaluate as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest

from awconv.training.checkpoints import find_last, read_checkpoint
from awconv.training.spread import as_started
from tests.training import several


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    several.start(tmp_path / "one", ["--data.batch_size=128", "--trainer.max_epochs=2"], each=1).done()
    several.start(tmp_path / "two", ["--data.batch_size=64", "--trainer.max_epochs=2"]).done()
    several.assert_close(several.weights(tmp_path / "two"), several.weights(tmp_path / "one"))
    one, two = several.figures(tmp_path / "one"), several.figures(tmp_path / "two")
    for name in ("train/loss", "val/loss", "val/accuracy"):
        assert two[name] == pytest.approx(one[name], rel=1e-5), name  # logged in single precision
    # 83 images are held out: were one evaluated twice, this would be no multiple of 1/83.
    assert two["val/accuracy"] * 83 == pytest.approx(round(two["val/accuracy"] * 83), abs=1e-3)


def test_processes_that_do_not_fit_the_launcher_are_refused(tmp_path: Path) -> None:
    running = several.start(tmp_path / "more", ["--data.batch_size=64", "--trainer.devices=4"])
    assert running.wait() == [1, 1]
    assert "has started 2 processes on each of 1 hosts, and trainer.devices is 4; leave out trainer.devices" in (
        running.said(0)
    )


def test_a_restart_that_would_take_former_addresses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"TORCHELASTIC_RUN_ID": "tests", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert as_started({"devices": "auto", "num_nodes": 1}) == {"devices": 2, "num_nodes": 2}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ValueError, match="start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        as_started({"devices": "auto", "num_nodes": 1})


@pytest.mark.gpu
def test_sharded_parameters_train_and_resume(tmp_path: Path) -> None:
    common = ["--trainer.precision=32-true", "--trainer.accelerator=gpu", "--trainer.strategy=fsdp"]
    for epochs in (2, 3):
        arguments = [*common, "--data.batch_size=64", "--ckpt_path=last", f"--trainer.max_epochs={epochs}"]
        several.start(tmp_path / "sharded", arguments, each=1, batch_norm=True).done()
    last = find_last(tmp_path / "sharded")
    assert last is not None
    assert read_checkpoint(last)["epoch"] == 2
