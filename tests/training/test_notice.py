"""The notice that a job's time is nearly over, to a process and to those that it has started."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import os, signal, subprocess, sys, threading
from awconv.training.notice import on_notice

come = threading.Event()
on_notice(come.set)
loading = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
for process in (loading.pid, os.getpid()):
    os.kill(process, signal.SIGUSR1)
assert come.wait(10)
later = threading.Event()
on_notice(later.set)
assert later.is_set()
loading.communicate(b"\\n", timeout=10)
print(loading.returncode)
"""


def test_a_notice_reaches_this_training_or_the_next_and_kills_no_process_that_loads_data() -> None:
    environment = os.environ | {"SLURM_JOB_ID": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr
