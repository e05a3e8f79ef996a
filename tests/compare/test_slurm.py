"""Runs of a comparison as jobs of a real SLURM, with nodes that fail; Debian's slurm-wlm and munge start it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from awconv.cli import main
from awconv.compare import compare
from awconv.compare.comparison import Comparison, Run
from awconv.compare.course import Course
from awconv.compare.slurm import OnSlurm, SlurmOptions
from awconv.compare.slurm.queue import JobState, RunJobs, states
from awconv.compare.time_limit import TimeLimit
from awconv.compare.variants import Change
from awconv.training.checkpoints import find_last, read_checkpoint
from awconv.training.lock import locked
from awconv.training.recipe import Recipe
from awconv.usage import UsageError
from tests.slurm import slurm

RECIPE = """\
model: {network: slow_resnet8, lr: 0.03}
trainer: {max_epochs: 16, limit_train_batches: 4, accelerator: cpu, devices: 1}
"""
# A network that takes its time as long as a file is there.
NETWORK = """\
import os
import time
import timm

@timm.models.register_model
def slow_resnet8(**arguments):
    network = timm.create_model("resnet8_cifar", **arguments)
    network.register_forward_pre_hook(lambda *_: time.sleep(0.3 * os.path.exists(os.environ["SLOW"])))
    return network
"""
OPTIONS = SlurmOptions(poll=0.5, cpus=1)
TIMES = re.compile(r'"(all_)?seconds": [0-9.e-]+')  # which differ from run to run


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A SLURM, whose jobs are slow as long as the file ``slow`` is in this folder."""
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("SLOW", str(folder / "slow"))
        with slurm(folder):
            yield folder


@pytest.fixture(scope="module")
def recipe(cluster: Path) -> Path:
    (cluster / "own.py").write_text(NETWORK)
    recipe = cluster / "tiny.yaml"
    recipe.write_text(RECIPE)
    return recipe


def run_of(recipe: Path, folder: Path, change: str = "plain", **more: Any) -> tuple[Comparison, Run]:
    comparison = Comparison((Change(change).apply(recipe, own(recipe)),), 1, folder, **more)
    return comparison, comparison.runs[0]


def own(recipe: Path) -> list[str]:
    return [f"--import={recipe.with_name('own.py')}"]


def until(met: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (found := met()):
        assert time.monotonic() < end, f"{what} takes too long"
        time.sleep(0.1)
    return found


def call(*command: str | Path) -> None:
    subprocess.run(command, check=True, timeout=120)


def processes(folder: Path) -> list[int]:
    """The Python processes of the jobs in a folder."""
    found = subprocess.run(["pgrep", "-f", f"^[^ ]*python.* {folder}$"], capture_output=True, text=True).stdout
    return [int(line) for line in found.split()]


class InAThread:
    """A comparison that goes on while the test does things to its jobs."""

    def __init__(self, recipe: Path, out: Path) -> None:
        self.status: int | None = None
        self._thread = threading.Thread(target=self._run, args=(recipe, out))
        self._thread.start()

    def _run(self, recipe: Path, out: Path) -> None:
        self.status = compare(recipe, seeds=2, out=out, launcher="slurm", slurm=OPTIONS, overrides=own(recipe))

    def join(self) -> int | None:
        self._thread.join(180)
        assert not self._thread.is_alive()
        return self.status


@pytest.mark.campaign
def test_nothing_is_lost_when_jobs_are_killed_queued_again_or_left_alone(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "with a blank"
    last = {name: out / "slurm" / name for name in ("plain-seed0", "aw-seed0", "plain-seed1")}

    def trains(name: str) -> bool:
        return any((out / name).rglob("*.ckpt")) and not (out / f"{name}.json").exists()

    def job(name: str) -> str:
        return max((path.name.partition("_")[0] for path in last[name].glob("*_submitted.pkl")), key=int)

    slow = recipe.with_name("slow")
    slow.touch()
    command = ["compare", str(recipe), "--seeds=2", f"--out={out}", *own(recipe)]
    # Ctrl-C leaves the jobs alone, and the same command takes them up.
    first = subprocess.Popen(
        [sys.executable, "-m", "awconv", *command, "--launcher=slurm", "--slurm.cpus=1", "--slurm.poll=0.5"],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    )
    until(lambda: trains("plain-seed0") and trains("aw-seed0"), "the first epoch")
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130
    said = capfd.readouterr().err
    assert re.search(r"awconv: jobs \d+ \d+ \d+ \d+ go on without this command: scancel", said)
    assert main([*command, "--status"]) == 0
    said = capfd.readouterr().out
    assert re.search(rf"plain-seed0 +running +job {job('plain-seed0')} on n[01] for \d:\d\d, epoch \d+/16", said)
    assert re.search(rf"plain-seed1 +waiting +job {job('plain-seed1')} \(\w+\)", said)
    assert "0 of 4 runs are finished" in said

    second = InAThread(recipe, out)
    until(lambda: "of an earlier command" in capfd.readouterr().err, "to take up the jobs")
    for process in processes(last["plain-seed0"]):
        os.kill(process, signal.SIGKILL)
    # As for another job with precedence; the node that it has run on takes no other one.
    node = states([job("aw-seed0")])[job("aw-seed0")].nodes  # type: ignore[index]
    call("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    call("scontrol", "requeue", job("aw-seed0"))
    # As at the end of a job's time: it writes a checkpoint within the epoch, and asks to be queued again.
    until(lambda: trains("plain-seed1"), "the first epoch of the second seed")
    call("scancel", "--signal=USR2", job("plain-seed1"))
    until(lambda: not processes(last["plain-seed1"]), "the checkpoint")
    slow.unlink()
    assert any((out / "plain-seed1").rglob("recent.ckpt"))
    call("scontrol", "update", f"nodename={node}", "state=resume")
    assert second.join() == 1
    said = capfd.readouterr().err
    assert f"run plain-seed0 failed: its job {job('plain-seed0')} has ended (failed) without a result" in said
    assert main([*command, "--status"]) == 0
    said = capfd.readouterr().out
    assert re.search(rf"plain-seed0 +failed +job {job('plain-seed0')} \(failed\), \d+ % trained", said)
    assert "Killed" in said  # the end of its log
    assert "3 of 4 runs are finished" in said

    assert InAThread(recipe, out).join() == 0
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert compare(recipe, seeds=2, out=tmp_path / "local", overrides=own(recipe)) == 0
    finally:
        torch.set_num_threads(threads)
    for name in ("plain-seed0", "aw-seed0", "plain-seed1", "aw-seed1"):
        one, other = (
            TIMES.sub("", (folder / f"{name}.json").read_text()).replace(str(folder), "")
            for folder in (out, tmp_path / "local")
        )
        assert one == other


def test_jobs_are_cancelled_where_that_is_asked_for(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    comparison, run = run_of(recipe, tmp_path / "out")
    trainer = OnSlurm(SlurmOptions(leave=False, poll=0.5), None, comparison.folder)

    def press_ctrl_c() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(trainer.train(Course(comparison, [], TimeLimit()), press_ctrl_c))
    trainer.end()
    job = RunJobs(comparison, run).last
    assert f"awconv: cancelled job {job}\n" in capfd.readouterr().err
    until(lambda: (states([str(job)]) or {})[str(job)].state == "CANCELLED", "to cancel the job")


NODES = ("--trainer.num_nodes=2", "--trainer.strategy=ddp", "--trainer.max_epochs=3", "--data.batch_size=32")


def test_a_training_of_two_nodes_that_is_told_to_end_is_queued_again_and_goes_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # these nodes have names that no host has
    fit = [sys.executable, "-m", "awconv", "fit", f"--config={recipe}", *NODES, *own(recipe)]
    script, log, slow = tmp_path / "fit.sh", tmp_path / "fit.log", recipe.with_name("slow")
    told = [f"--trainer.default_root_dir={tmp_path / 'fit'}", "--ckpt_path=last"]
    script.write_text(f"#!/bin/sh\nsrun {shlex.join([*fit, *told])}\n")
    slow.touch()
    call("sbatch", "--nodes=2", "--ntasks-per-node=1", "--requeue", f"--output={log}", "--open-mode=append", script)
    until(lambda: any((tmp_path / "fit").rglob("*.ckpt")), "the first epoch")
    call("scancel", "--signal=USR1", "--name=fit.sh")
    until(lambda: "is nearly over; it is queued again" in log.read_text(), "to be queued again")
    slow.unlink()
    until(lambda: not subprocess.run(["squeue", "--noheader"], capture_output=True).stdout, "the second job")
    said = log.read_text()
    assert re.search(r"going on from .*recent\.ckpt", said)
    assert said.count("[rank: 1] Seed set") == 2
    assert any((tmp_path / "fit").rglob("epoch=2-step=12.ckpt"))


@pytest.mark.campaign
def test_a_comparison_trains_on_two_nodes_as_a_training_does(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    overrides = [*NODES, *own(recipe)]
    assert compare(recipe, "plain", 1, tmp_path / "out", launcher="slurm", slurm=OPTIONS, overrides=overrides) == 0
    logs = list((tmp_path / "out" / "slurm" / "plain-seed0").glob("*_log.out"))
    assert sorted(log.name.partition("_")[2] for log in logs) == ["0_log.out", "1_log.out"]
    fit = [sys.executable, "-m", "awconv", "fit", f"--config={recipe}", "--seed_everything=0", *overrides]
    call("srun", "--nodes=2", "--ntasks-per-node=1", *fit, f"--trainer.default_root_dir={tmp_path / 'fit'}")
    one, other = (find_last(tmp_path / folder) for folder in ("out/plain-seed0", "fit"))
    assert one is not None
    assert other is not None
    theirs = read_checkpoint(other)["state_dict"]
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in read_checkpoint(one)["state_dict"].items())


def test_what_slurm_refuses_is_said_in_its_words(recipe: Path, tmp_path: Path) -> None:
    options = SlurmOptions(partition="none")
    with pytest.raises(ValueError, match=r"SLURM refuses the job of plain-seed0: .*[Ii]nvalid partition"):
        compare(recipe, out=tmp_path / "out", launcher="slurm", slurm=options, overrides=own(recipe))


def test_a_job_that_is_lost_is_submitted_again_but_not_for_ever(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_lost_ones(jobs: list[str]) -> dict[str, JobState]:
        found = states(jobs)
        assert found is not None
        return {job: replace(one, state=one.state.replace("FAILED", "NODE_FAIL")) for job, one in found.items()}

    monkeypatch.setattr("awconv.compare.slurm.trainer.states", with_lost_ones)
    monkeypatch.setattr("awconv.compare.slurm.trainer._GRACE", 0.1)
    comparison, run = run_of(recipe, tmp_path / "out")
    count, once = tmp_path / "count", tmp_path / "sbatch"  # which refuses the second job once
    once.write_text(
        f"""#!/bin/sh
echo >>{count}
[ "$(wc -l <{count})" = 2 ] && echo limit >&2 && exit 1
exec {shutil.which("sbatch")} "$@"
"""
    )
    once.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    options = SlurmOptions(setup=["echo there is no such module", "exit 1"], poll=0.2)
    ((ended, reason),) = OnSlurm(options, None, comparison.folder).train(
        Course(comparison, [], TimeLimit()), lambda: None
    )
    assert ended.name == run.name
    assert len(list((tmp_path / "out" / "slurm" / "plain-seed0").glob("*_submitted.pkl"))) == 3
    assert "has ended (node fail) without a result" in str(reason)
    assert str(reason).endswith("there is no such module")
    said = capfd.readouterr().err
    assert said.count("was lost (NODE_FAIL)") == 2
    assert said.count("SLURM takes no further job for now (SLURM refuses the job of plain-seed0: limit)") == 1


def test_a_limit_of_jobs_is_waited_for_and_refusals_leave_no_files(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "sbatch"
    full.write_text(
        f"""#!/bin/sh
[ -z "$(squeue -h)" ] && exec {shutil.which("sbatch")} "$@"
echo limit >&2
exit 1
"""
    )
    full.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("awconv.compare.slurm.trainer._GRACE", 0.1)
    comparison = Comparison((Change("plain").apply(recipe, own(recipe)),), 2, tmp_path / "out")
    course, options = Course(comparison, [], TimeLimit()), SlurmOptions(setup=["exit 1"], poll=0.2)
    ended = [run.name for run, _ in OnSlurm(options, None, comparison.folder).train(course, lambda: None)]
    assert ended == ["plain-seed0", "plain-seed1"]
    assert capfd.readouterr().err.count("SLURM takes no further job for now (SLURM refuses the job of plain-seed") == 1
    for run in ended:
        assert len(list((tmp_path / "out" / "slurm" / run).glob("*.pkl"))) == 1
    jobs = [str(RunJobs(comparison, run).last) for run in comparison.runs]
    assert (states([*jobs, "999999"]) or {}).keys() == set(jobs)
    assert states(["999999"]) == {}


def test_no_second_job_is_submitted_as_long_as_slurm_does_not_answer(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison, run = run_of(recipe, tmp_path / "out")
    job = RunJobs(comparison, run).submit(SlurmOptions(options={"hold": True}))
    options = SlurmOptions(poll=0.2)
    silent = tmp_path / "squeue"
    silent.write_text("#!/bin/sh\necho no controller >&2\nexit 1\n")
    silent.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with pytest.raises(ValueError, match="SLURM does not say; call this again later"):
            compare(recipe, "plain", 1, tmp_path / "out", launcher="slurm", slurm=options, overrides=own(recipe))
        assert "squeue does not answer: no controller" in capfd.readouterr().err
        assert compare(recipe, "plain", 1, tmp_path / "out", status=True, overrides=own(recipe)) == 0
        assert re.search(f"plain-seed0 +unknown +job {job}, of which SLURM says nothing", capfd.readouterr().out)
    with pytest.raises(ValueError, match=f"job {job} trains plain-seed0 with other settings"):
        compare(
            recipe,
            "plain",
            1,
            tmp_path / "out",
            launcher="slurm",
            slurm=options,
            overrides=["--model.lr=1", *own(recipe)],
        )
    call("scancel", job)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": -1}, "slurm.gpus must be at least 0, got -1"),
        ({"cpus": 0}, "slurm.cpus must be at least 1, got 0"),
        ({"time": "tomorrow"}, "slurm.time must be a duration above 0, such as 90s"),
        ({"time": "60s"}, "slurm.time must be a minute or more, and longer than slurm.notice, got 60s and 90s"),
        ({"poll": 0}, "slurm.poll must be a number of seconds above 0"),
        ({"options": {"mem": "1G"}}, "slurm.options cannot hold mem; give --slurm.memory"),
        ({"options": {"job_name": "x"}}, "slurm.options cannot hold job_name, which follows from the run"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        SlurmOptions(**options)


def test_a_job_has_a_process_for_each_device() -> None:
    options = SlurmOptions(gpus=4, cpus=8, memory="64GB", time="90m", options={"constraint": "h100"})
    recipe = Recipe.parse(["--model.network=resnet8_cifar", "--trainer.devices=4", "--trainer.num_nodes=2"])
    asked = options.parameters(recipe)
    assert (asked["nodes"], asked["ntasks_per_node"], asked["gpus_per_node"], asked["time"]) == (2, 4, 4, 90)
    assert asked["additional_parameters"] == {"requeue": True, "constraint": "h100"}
    assert asked["srun_args"] == ["--cpus-per-task=8"]
    one = SlurmOptions().parameters(Recipe.parse(["--model.network=resnet8_cifar"]))
    assert (one["nodes"], one["ntasks_per_node"]) == (1, 1)
    assert "gpus_per_node" not in one


def test_what_does_not_go_together_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("model: {network: resnet8_cifar}")
    with pytest.raises(UsageError, match="give --launcher=slurm, too"):
        compare(recipe, slurm=SlurmOptions(gpus=1))
    with pytest.raises(UsageError, match="time_limit is for runs that are trained here"):
        compare(recipe, launcher="slurm", time_limit="1h")
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        compare(recipe, launcher="slurm", jobs=0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ValueError, match="needs SLURM's programmes, and sbatch, srun, squeue, scontrol, scancel cannot"
    ):
        compare(recipe, out=tmp_path / "out", launcher="slurm")


def test_status_says_what_is_finished_interrupted_or_missing_here_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "out"
    recipe.write_text(RECIPE.replace("slow_resnet8", "resnet8_cifar").replace("16", "2"))
    assert compare(recipe, "plain", seeds=1, out=out) == 0
    (out / "plain-seed0.json").rename(tmp_path / "kept.json")
    command = ["compare", str(recipe), "--variants=plain", f"--out={out}", "--seeds=2", "--status"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert re.search("plain-seed0 +interrupted +100 % trained", said)
    assert re.search("plain-seed1 +missing", said)
    (tmp_path / "kept.json").rename(out / "plain-seed0.json")
    with locked(out):
        assert main(command) == 0
    said = capsys.readouterr().out
    assert re.search(r"plain-seed0 +finished +test accuracy \d+\.\d\d %", said)
    assert f"1 of 2 runs are finished, in {out}; a command works on them: process {os.getpid()}" in said
    assert main([*command, "--tune=lr=0.1,0.2"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"plain-lr=0\.1-seed0 +missing", said)
    assert re.search(r"plain-seed1 +missing +lr is not chosen yet", said)
    # A value whose training diverges leaves no record, and no doubt.
    tuned = [
        "compare",
        str(recipe),
        "--variants=plain",
        "--seeds=1",
        f"--out={tmp_path / 'tuned'}",
        "--tune=lr=0.1,1e17",
    ]
    assert main(tuned) == 0
    capsys.readouterr()
    assert main([*tuned, "--status"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"plain-lr=1e\+17-seed0 +missing", said)
    assert re.search(r"plain-seed0 +finished", said)
