"""Several processes of a training, on this host or on two hosts that the kernel keeps apart (network namespaces).

The processes are forked from one that has imported awconv, and started as torchrun starts them: an import takes longer
than these trainings. The campaign starts them by torchrun itself.
"""

from __future__ import annotations

import csv
import ctypes
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import awconv.training.cli  # noqa: F401  # before the processes are forked
from awconv.cli import main
from awconv.tasks import ClassificationTask
from awconv.training.checkpoints import find_last, read_checkpoint
from tests.networks import without_batch_norm

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload([__name__, "awconv.data", "lightning.pytorch.loggers"])
_CLONE_NEWUTS, _CLONE_NEWNET = 0x04000000, 0x40000000
PORT = 29517

# Norms that do not look at the batch, since torch has no synchronised one for CPUs; 83 held-out images are no multiple
# of any number of processes.
NETWORK = (
    "--model.network=aw_resnet8_cifar",
    "--data.horizontal_flip=true",
    "--data.val_fraction=0.0577",
    "--model.ema_decay=0.9",
    "--model.lr=0.02",  # at 0.1 a rounding that changes the sign of one activation has grown to 0.002 in the end
)
QUIET = (
    "--trainer.precision=64-true",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)


@dataclass(frozen=True)
class Host:
    """A host: its network namespace (None: this machine's), address and interface."""

    name: str = "localhost"
    namespace: str | None = None
    address: str = "127.0.0.1"
    interface: str = "lo"


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two network namespaces with a link between them.

    Raises:
        PermissionError: this process may not make them, or there is no ``ip``.
    """
    names = [f"aw{os.getpid()}{letter}" for letter in "ab"]
    hosts = [Host(f"host-{n}", name, f"10.91.0.{n}", f"l{name}") for n, name in enumerate(names, start=1)]
    commands = [["netns", "add", host.namespace] for host in hosts]
    commands += [["link", "add", hosts[0].interface, "type", "veth", "peer", "name", hosts[1].interface]]
    for host in hosts:
        inside = ["-n", str(host.namespace)]
        commands += [["link", "set", host.interface, "netns", host.namespace]]
        commands += [[*inside, "addr", "add", f"{host.address}/24", "dev", host.interface]]
        commands += [[*inside, "link", "set", name, "up"] for name in ("lo", host.interface)]
    try:
        try:
            for command in commands:
                subprocess.run(["ip", *map(str, command)], check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise PermissionError("there is no ip (iproute2)") from error
        except subprocess.CalledProcessError as error:
            raise PermissionError(f"no network namespaces: {error.stderr.strip()}") from error
        yield hosts[0], hosts[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def cut(host: Host) -> None:
    """Cuts a host off, as if its cable was pulled: nobody is told."""
    subprocess.run(["ip", "-n", str(host.namespace), "link", "set", host.interface, "down"], check=True)


def join(host: Host) -> None:
    subprocess.run(["ip", "-n", str(host.namespace), "link", "set", host.interface, "up"], check=True)


@dataclass
class Running:
    """Processes by rank, and what each prints."""

    processes: list[Any] = field(default_factory=list)
    outputs: list[Path] = field(default_factory=list)

    def wait(self, seconds: float = 200) -> list[int]:
        """Their exit statuses; a signal's number is negative. None may be left after so many seconds."""
        for process in self.processes:
            process.join(seconds)
        left = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for rank in left:
            self.processes[rank].kill()
        assert not left, f"processes {left} are left:\n" + "\n".join(self.said(rank) for rank in left)
        return [process.exitcode for process in self.processes]

    def said(self, rank: int) -> str:
        return self.outputs[rank].read_text() if self.outputs[rank].exists() else ""

    def done(self, seconds: float = 200) -> None:
        """Waits for their good end."""
        statuses = self.wait(seconds)
        assert statuses == [0] * len(statuses), "\n".join(self.said(rank)[-3000:] for rank in range(len(statuses)))


def start(
    root: Path,
    arguments: Sequence[str],
    hosts: Sequence[Host] = (Host(),),
    each: int = 2,
    command: str = "fit",
    roots: Sequence[Path] = (),
    batch_norm: bool = False,
    settings: Sequence[str] = (*NETWORK, *QUIET),
) -> Running:
    """Starts so many processes of a command on each host, as torchrun does; with ``roots``, with a folder for each."""
    running, of = Running(), each * len(hosts)
    port = PORT if hosts[0].namespace else _free_port()
    root.parent.mkdir(parents=True, exist_ok=True)
    for rank in range(of):
        host, folder = hosts[rank // each], roots[rank // each] if roots else root
        line = [command, *settings, f"--trainer.default_root_dir={folder}", *arguments]
        environment = {"GLOO_SOCKET_IFNAME": host.interface, "OMP_NUM_THREADS": "1"}
        if of > 1:
            environment |= {
                "TORCHELASTIC_RUN_ID": "tests",
                "MASTER_ADDR": hosts[0].address,
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % each),
                "GROUP_RANK": str(rank // each),
                "WORLD_SIZE": str(of),
                "LOCAL_WORLD_SIZE": str(each),
                "GROUP_WORLD_SIZE": str(len(hosts)),
            }
        output = root.with_name(f"{root.name}-{rank}.txt")
        output.unlink(missing_ok=True)
        process = _FORK.Process(target=_run, args=(line, environment, host, str(output), batch_norm))
        process.start()
        running.processes.append(process)
        running.outputs.append(output)
    return running


def torchrun(root: Path, arguments: Sequence[str], hosts: Sequence[Host], each: int, *options: str) -> list[Any]:
    """Starts torchrun on each host, which starts the processes."""
    launched = []
    script = root.with_name("train.py")
    script.write_text("import sys\nfrom tests.training.several import train\n\ntrain(sys.argv[1:])\n")
    for number, host in enumerate(hosts):
        command = ["ip", "netns", "exec", str(host.namespace), "unshare", "--uts", "sh", "-c"]
        command += [f'hostname {host.name}; exec "$@"', "sh", sys.executable, "-m", "torch.distributed.run"]
        command += [f"--nnodes={len(hosts)}", f"--nproc-per-node={each}", "--rdzv-backend=c10d", "--rdzv-id=tests"]
        command += [f"--rdzv-endpoint={hosts[0].address}:{PORT}", f"--local-addr={host.address}"]
        command += [f"--rdzv-conf=is_host={int(number == 0)}", *options, str(script)]
        command += ["fit", *NETWORK, *QUIET, f"--trainer.default_root_dir={root}", *arguments]
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": host.interface,
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        output = root.with_name(f"{root.name}-{host.name}.txt").open("w")
        launched.append(
            subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        )
    return launched


def workers(launcher: int) -> list[int]:
    """The processes that a torchrun has started, by their numbers."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children]


def alive(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(line: list[str], environment: dict[str, str], host: Host, output: str, batch_norm: bool) -> None:
    """In the new process: runs a command on a host, with its output in a file."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PL_GLOBAL_SEED"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(target, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    if host.namespace is not None:
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{host.namespace}") as namespace:
            assert libc.setns(namespace.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        assert libc.unshare(_CLONE_NEWUTS) == 0, os.strerror(ctypes.get_errno())
        socket.sethostname(host.name)
    torch.set_num_threads(1)
    train(line, batch_norm)


def train(line: list[str], batch_norm: bool = False) -> None:
    """Runs a command, without ``batch_norm`` with norms that do not look at the batch, and ends the process."""
    build = ClassificationTask._build

    def build_without(self: ClassificationTask, **pretrained: Any) -> nn.Module:
        return without_batch_norm(build(self, **pretrained))

    if not batch_norm:
        ClassificationTask._build = build_without  # type: ignore[method-assign]
    try:
        status = main(line)
    except SystemExit as error:
        status = error.code  # type: ignore[assignment]
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads may still hold tensors: an interpreter that ends meanwhile aborts (pytorch/pytorch#179291).
    os._exit(int(status or 0))


def figures(root: Path) -> dict[str, float]:
    """The last figure of each name in the newest log."""
    log = max(root.rglob("metrics.csv"), key=lambda path: path.stat().st_mtime_ns)
    found: dict[str, float] = {}
    for row in csv.DictReader(log.open()):
        found |= {name: float(value) for name, value in row.items() if value}
    return found


def losses(root: Path) -> list[float]:
    """The training loss of each epoch, in the newest log."""
    log = max(root.rglob("metrics.csv"), key=lambda path: path.stat().st_mtime_ns)
    return [float(row["train/loss"]) for row in csv.DictReader(log.open()) if row.get("train/loss")]


def weights(root: Path) -> dict[str, Tensor]:
    last = find_last(root)
    assert last is not None
    found: dict[str, Tensor] = read_checkpoint(last)["state_dict"]
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """In double precision, sums in another order differ by 1e-16 each. Some tens of steps enlarge that a thousandfold,
    and far more where the sign of an activation changes: in single precision, to 1e-3."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
