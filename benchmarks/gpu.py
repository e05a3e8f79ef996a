"""What AW-convolution costs on a GPU, and whether it is right there: tests, layers, networks, training.

Spends at most some seconds, in order of worth; writes each figure to DIR/results.json when it is known, goes on after
a failure, and prints a summary. It needs one GPU and no network.

    python benchmarks/gpu.py [--stage tests|layers|networks|training ...] [--seconds N] [--out DIR]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpu_stages.journal import Journal, Settings
from gpu_stages.summary import lines

ROOT = Path(__file__).resolve().parent.parent
# Each stage's module, and its share of the time that is left when it begins.
STAGES = {
    "tests": ("suite", 0.5),
    "layers": ("layers", 0.35),
    "networks": ("networks", 0.75),
    "training": ("training", 1.0),
}
_TO_END = 5.0  # seconds for the summary
_POLL = 0.2


def main() -> int:
    arguments = _parse()
    settings = Settings(
        device=arguments.device,
        quick=arguments.quick,
        rounds=arguments.rounds or (1 if arguments.quick else 9),
        algorithm=arguments.algorithm,
        only=arguments.only,
        out=arguments.out.resolve(),
        data=arguments.data.resolve(),
        stages=tuple(arguments.stage),
        deadline=arguments.deadline or time.time() + arguments.seconds - _TO_END,
        lock=arguments.lock,
    )
    if arguments.deadline is not None:
        _work(settings)
        return 0
    if settings.device == "cuda" and not _has_gpu():
        print(
            "no GPU that CUDA can use was found here; try the programme in small with --device cpu --quick",
            file=sys.stderr,
        )
        return 2
    return _drive(settings)


def _has_gpu() -> bool:
    """Asked of the driver: this process has no other use for PyTorch, which takes seconds to import."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES), help="in the order given")
    parser.add_argument("--seconds", type=float, default=480, help="for all of it")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of the results")
    parser.add_argument("--data", type=Path, default=ROOT / ".gpu/data/cifar10-jpeg", help="CIFAR-10 as Parquet files")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="the smallest work of each kind")
    parser.add_argument("--only", default="", help="a regular expression for the names of entries")
    parser.add_argument("--algorithm", default="auto", help="what AW networks are held to, such as fused")
    parser.add_argument("--rounds", type=int, help="how often each thing is timed")
    parser.add_argument("--lock", type=Path, help="a file: runs at once that name the same are timed in turn")
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)  # makes this the process that measures
    arguments = parser.parse_args()
    if arguments.seconds <= _TO_END:
        parser.error(f"--seconds must be more than {_TO_END:g}, got {arguments.seconds:g}")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    try:
        re.compile(arguments.only)
    except re.error as error:
        parser.error(f"--only must be a regular expression, got {arguments.only!r}: {error}")
    return arguments


def _drive(settings: Settings) -> int:
    """Runs the measurements in a process of their own, and another one after a crash or where one hangs."""
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / "results.json"
    path.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and the processes below end with this one
    journal = Journal(path)
    journal.results["about"] = {"command": sys.argv, "began": time.strftime("%Y-%m-%d %H:%M:%S")}
    journal.save()
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], f"--deadline={settings.deadline}"]
    begun = -1
    while journal.begun() > begun and time.time() < settings.deadline:
        begun = journal.begun()
        reason = _watch(command, path, settings.deadline)
        journal = Journal(path)
        if reason is None:
            break
        journal.abandon(reason)
        journal.results["about"].setdefault("crashes", []).append(reason)
        journal.save()
    print(*lines(journal.results), sep="\n")
    return int(journal.failed())


def _watch(command: list[str], path: Path, deadline: float) -> str | None:
    """Waits for a process, and ends it where an entry takes too long; returns why it ended before all was done."""
    folders = [str(ROOT / "src"), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)}, start_new_session=True
    )
    reason = None
    try:
        while process.poll() is None:
            time.sleep(_POLL)
            running = Journal(path).running()
            if time.time() > deadline:
                reason = "the time of the whole run is over"
            elif running is not None and time.time() > running["limit"]:
                reason = f"it took more than {running['limit'] - running['began']:.0f} s"
            if reason is not None:
                break
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.wait()
    if reason is None and process.returncode:
        reason = f"its process ended with exit status {process.returncode}"
    return reason


def _work(settings: Settings) -> None:
    """Measures what no process before has begun."""
    from awconv.bench.report import environment

    journal = Journal(settings.out / "results.json")
    journal.results["about"] |= environment(settings.device)
    journal.save()
    modules = {stage: importlib.import_module(f"gpu_stages.{STAGES[stage][0]}") for stage in settings.stages}
    gc.freeze()  # what was imported need not be looked through before each graph
    entries = {stage: module.entries(settings) for stage, module in modules.items()}
    for stage in settings.stages:
        print(f"{stage}:", flush=True)
        left = max(0.0, settings.deadline - time.time())
        journal.run(stage, entries[stage], settings.only, time.time() + STAGES[stage][1] * left)
    for stage in settings.stages:  # what was left out for the sake of later stages
        journal.run(stage, entries[stage], settings.only, settings.deadline)


if __name__ == "__main__":
    sys.exit(main())
