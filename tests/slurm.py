"""A SLURM of this machine's own, for tests: a controller and two nodes of one core each, on the loopback."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

_NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
_CONFIGURATION = """\
ClusterName=awconv
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
# A job that is queued again waits for the end of its credential.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=5
MpiDefault=none
SwitchType=switch/none
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=main Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """Inside, SLURM's commands know this one.

    Skips the test, and says why, where SLURM is not installed or does not run.
    """
    missing = [name for name in _NEEDED if shutil.which(name) is None and not Path("/usr/sbin", name).is_file()]
    if missing or os.geteuid() != 0:
        reason = f"no {', '.join(missing)} (Debian's slurm-wlm and munge)" if missing else "SLURM's daemons need root"
        pytest.skip(f"a SLURM cannot be started: {reason}")
    folder.chmod(0o700)  # as munged asks for
    for name in ("state", "spool-n0", "spool-n1"):
        (folder / name).mkdir(parents=True)
    configuration, key = folder / "slurm.conf", folder / "munge.key"
    configuration.write_text(_CONFIGURATION.format(host=socket.gethostname(), ports=_free_ports(3), folder=folder))
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    with ExitStack() as daemons, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(configuration))
        patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
        files = {
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munged.seed",
        }
        options = [f"--{name}={folder / file}" for name, file in files.items()]
        _start(daemons, folder, ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *options])
        _start(daemons, folder, ["slurmctld", "-D"])
        for node in ("n0", "n1"):
            _start(daemons, folder, ["slurmd", "-D", "-N", node])
        _wait_for_nodes(folder)
        yield
        subprocess.run(["scancel", f"--user={os.getuid()}", "--full"], check=False)
        _until(lambda: not subprocess.run(["squeue", "--noheader"], capture_output=True).stdout, 20)  # none is left


def _start(daemons: ExitStack, folder: Path, command: list[str]) -> None:
    with open(folder / "daemons.log", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    daemons.callback(_end, process)
    if command[0] == "munged":
        _until(lambda: (folder / "munge.socket").exists(), 10)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_for_nodes(folder: Path) -> None:
    def idle() -> bool:
        said = subprocess.run(["sinfo", "--noheader", "--Node", "--format=%t"], capture_output=True, text=True)
        return said.stdout.split() == ["idle", "idle"]

    if not _until(idle, 30):
        log = (folder / "daemons.log").read_text()
        pytest.skip(f"SLURM does not run on this machine: {log[-400:]}")


def _until(met: object, seconds: float) -> bool:
    assert callable(met)
    until = time.monotonic() + seconds
    while not (done := bool(met())) and time.monotonic() < until:
        time.sleep(0.1)
    return done


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
