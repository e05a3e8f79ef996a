"""The notice that a job's time is nearly over, to a process and to those that it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from awconv.training.notice import queue_again
from awconv.training.spread import started

SCRIPT = """
import os, signal, subprocess, sys, threading, time
from awconv.training.notice import on_notice

come, over = threading.Event(), threading.Event()
library = threading.Thread(target=over.wait)  # like those of OpenBLAS, in which no signal is blocked
library.start()
on_notice(come.set)
loading = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
os.kill(loading.pid, signal.SIGUSR1)
if sys.argv[1] == "process":
    os.kill(os.getpid(), signal.SIGUSR1)
else:
    signal.pthread_kill(library.ident, signal.SIGUSR1)
until = time.monotonic() + 30
while not come.is_set() and time.monotonic() < until:
    time.sleep(0.01)  # a handler runs between two steps of the main thread, and so not in come.wait()
over.set()
assert come.is_set()
later = threading.Event()
on_notice(later.set)
assert later.is_set()
loading.communicate(b"\\n", timeout=10)
print(loading.returncode)
"""


@pytest.mark.parametrize("to", [pytest.param("process", marks=pytest.mark.campaign), "thread of a library"])
def test_a_notice_reaches_this_training_or_the_next_and_kills_no_process_that_loads_data(to: str) -> None:
    environment = os.environ | {"SLURM_JOB_ID": "1"}
    command = [sys.executable, "-c", SCRIPT, to]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
    assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr


@pytest.mark.parametrize("refuses", [False, True])
def test_a_job_is_said_to_be_queued_again_only_if_it_is(
    refuses: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\n" + ("echo disabled for job $2 >&2\nexit 1\n" if refuses else ""))
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        if refuses:
            assert queue_again() == "disabled for job 7"
            assert signal.getsignal(signal.SIGTERM) is before
            return
        with pytest.raises(SystemExit, match="0"):
            queue_again()
        assert "the time of job 7 is nearly over; it is queued again" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, before)


def test_without_srun_a_job_of_two_processes_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "mine"}.items():
        monkeypatch.setenv(name, value)
    assert started() is None  # a script of sbatch, which waits for nobody
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    there = started()
    assert there is not None
    assert (there.here, there.hosts) == (1, 2)
