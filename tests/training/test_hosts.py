"""Several hosts: network namespaces with addresses of their own, joined by a link that can be cut."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from awconv.training.checkpoints import find_last, read_checkpoint
from awconv.training.lock import locked
from tests.training import several
from tests.training.several import Host


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    try:
        with several.two_hosts() as made:
            yield made
    except PermissionError as error:
        pytest.skip(f"needs two network namespaces: {error}")


def test_two_hosts_of_two_processes_do_what_one_process_does(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    several.start(tmp_path / "one", ["--data.batch_size=128", "--trainer.max_epochs=2"], each=1).done()
    several.start(tmp_path / "four", ["--data.batch_size=32", "--trainer.max_epochs=2"], hosts).done()
    several.assert_close(several.weights(tmp_path / "four"), several.weights(tmp_path / "one"))
    one, four = several.figures(tmp_path / "one"), several.figures(tmp_path / "four")
    for name in ("train/loss", "val/loss", "val/accuracy"):
        assert four[name] == pytest.approx(one[name], rel=1e-3), name
    # 83 images are held out, no multiple of four: were one evaluated twice, this would be no multiple of 1/83.
    assert four["val/accuracy"] * 83 == pytest.approx(round(four["val/accuracy"] * 83), abs=1e-3)


# The learning rate does not depend on the length, and no epoch is so short that it is over before a process is killed.
LONG = ("--trainer.max_epochs=200", "--recent_checkpoint.every_n_steps=3", "--model.decay_epochs=[1000]")


def until(condition: object, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.05)


def in_second_epoch(root: Path) -> bool:
    """Within an epoch that is not the first, so that there are checkpoints."""
    return bool(list(root.rglob("recent.ckpt"))) and bool(list(root.rglob("epoch=0*.ckpt")))


def assert_free(root: Path) -> None:
    last = find_last(root)
    assert last is not None
    with locked(last.parent, seconds=0):
        pass
    assert not list(root.rglob("*.partial"))


def test_a_killed_host_ends_the_others_and_fewer_processes_go_on(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    root = tmp_path / "killed"
    running = several.start(root, [*LONG, "--data.batch_size=32"], hosts)
    until(lambda: in_second_epoch(root))
    for process in running.processes[2:]:
        process.kill()
    assert running.wait(60) == [1, 1, -signal.SIGKILL, -signal.SIGKILL]
    said = running.said(0)
    assert "awconv fit: process 0 on host-1 has lost others in epoch " in said
    assert "nothing is heard of process 2 on host-2, process 3 on host-2" in said
    assert f"with --ckpt_path=last, to go on from {root}" in said
    assert "Traceback" not in said + running.said(1)
    assert "has lost others" not in running.said(1)  # said once on each host
    assert_free(root)

    last = find_last(root)
    assert last is not None
    steps = read_checkpoint(last)["global_step"] + 12
    more = [*LONG, f"--trainer.max_steps={steps}", "--ckpt_path=last"]
    refused = several.start(root, [*more, "--data.batch_size=32"], hosts[:1])
    assert set(refused.wait()) == {1}
    assert "4 processes had batches of 32 images there, 2 have 32 now (--data.batch_size=64 keeps the batch)" in (
        refused.said(0)
    )
    fewer = several.start(root, [*more, "--data.batch_size=64"], hosts[:1])
    fewer.done()
    assert "2 processes go on in place of 4, with the same batches" in fewer.said(0)
    several.start(tmp_path / "one", [*more, "--data.batch_size=128"], each=1).done()
    several.assert_close(several.weights(root), several.weights(tmp_path / "one"))


@pytest.mark.campaign
def test_a_cut_link_ends_both_sides_within_the_timeout(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    root = tmp_path / "cut"
    running = several.start(root, [*LONG, "--data.batch_size=32", "--processes.timeout=10"], hosts)
    try:
        until(lambda: in_second_epoch(root))
        several.cut(hosts[1])
        assert running.wait(60) == [1, 1, 1, 1]
    finally:
        several.join(hosts[1])
    assert "nothing is heard of process 2 on host-2, process 3 on host-2" in running.said(0)
    assert "the host of process 0, host-1, cannot be reached" in running.said(2)
    assert_free(root)
    last = find_last(root)
    assert last is not None
    steps = read_checkpoint(last)["global_step"] + 5
    again = [*LONG, "--data.batch_size=32", f"--trainer.max_steps={steps}", "--ckpt_path=last"]
    several.start(root, again, hosts).done()


@pytest.mark.campaign
def test_torchrun_on_two_hosts_stops_and_starts_again_by_itself(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """A process is killed: without restarts both hosts end, and with them all goes on from the last checkpoint."""
    root = tmp_path / "by_torchrun"
    arguments = [*LONG, "--data.batch_size=32", "--ckpt_path=last", "--processes.timeout=90"]
    for restarts in (0, 1):
        before = set(root.rglob("*.ckpt"))
        length = ["--trainer.max_steps=60"] if restarts else []
        launched = several.torchrun(root, [*arguments, *length], hosts, 2, f"--max-restarts={restarts}")
        until(lambda before=before: bool(set(root.rglob("*.ckpt")) - before))
        victim = several.workers(launched[1].pid)[-1]
        os.kill(victim, signal.SIGKILL)
        statuses = [process.wait(200) for process in launched]
        printed = [(tmp_path / f"by_torchrun-{host.name}.txt").read_text() for host in hosts]
        assert statuses == ([0, 0] if restarts else [1, 1]), printed
        assert not [left for process in launched for left in several.alive(process.pid)]
        assert "has lost others" in printed[0], printed[0]
        assert_free(root)
    last = find_last(root)
    assert last is not None
    assert read_checkpoint(last)["global_step"] == 60


def test_hosts_that_do_not_agree_are_refused(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Folders that are not shared: one host has a checkpoint to go on from, the other has none."""
    arguments = ["--trainer.max_epochs=1", "--ckpt_path=last"]
    several.start(tmp_path / "a", [*arguments, "--data.batch_size=128"], each=1).done()
    running = several.start(
        tmp_path / "a", [*arguments, "--data.batch_size=64"], hosts, each=1, roots=[tmp_path / "a", tmp_path / "b"]
    )
    assert running.wait(60) == [1, 1]
    for rank in range(2):
        assert "the checkpoint differs between processes: epoch=0-step=10.ckpt of" in running.said(rank)
        assert "none for process 1 on host-2; trainer.default_root_dir must be one folder" in running.said(rank)
