"""``awconv fit`` on CIFAR-10: images a second of one training and of several that share a GPU, and Python's part."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

from awconv.bench.model import Side
from awconv.bench.timing import ratios
from awconv.models.registry import BASELINES
from gpu_stages.journal import Entry, Settings
from gpu_stages.kernels import host_seconds

_ROOT = Path(__file__).parent.parent.parent
_RECIPE = _ROOT / "recipes" / "cifar10_jpeg_resnet8_short.yaml"  # with the longer network, for a fixed time
_IMAGE = 32
_TO_START = 60  # seconds in which the processes read the data
_LONGEST = 4000  # characters of an error

Save = Callable[[], None]


def entries(settings: Settings) -> list[Entry]:
    """In order of worth."""
    network, seconds = ("aw_resnet8_cifar", 2) if settings.quick else ("aw_resnet20_cifar", 15)

    def fit(name: str, network: str, runs: int) -> Entry:
        guess = seconds + (5 if settings.quick else 15) + 2 * runs
        return Entry(name, guess, partial(_fit, network, runs, seconds, settings))

    alone = fit("1 run", network, 1)
    bare = Entry("bare loop", 0 if settings.quick else 10, partial(_bare_loop, network, settings))
    if settings.quick:
        return [alone, bare]
    together = [fit(f"{runs} runs", network, runs) for runs in (4, 8, 12)]
    return [alone, bare, *together, fit("1 plain run", BASELINES[network], 1)]


def _batch(settings: Settings) -> int:
    return 32 if settings.quick else 128


def _fit(network: str, runs: int, seconds: int, settings: Settings, figures: dict[str, Any], save: Save) -> None:
    missing = [name for name in ("jsonargparse", "lightning", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"awconv fit needs {', '.join(missing)}; install awconv[train,parquet]")
    if not (settings.data / "train.parquet").is_file():
        raise FileNotFoundError(f"--data must be a folder with CIFAR-10's train.parquet, got {settings.data}")
    figures |= {"network": network, "runs": runs, "batch": _batch(settings), "dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        roots = [Path(folder) / str(run) for run in range(runs)]
        commands = [_command(network, seconds, root, run, settings) for run, root in enumerate(roots)]
        figures["command"] = commands[0][1:]
        errors = _together(commands, roots, seconds + _TO_START)
        figures["images_per_second"] = [_pace(root, _batch(settings)) for root in roots]
    figures["errors"] = [error for error in errors if error]
    paces = [pace for pace in figures["images_per_second"] if pace]
    if paces:
        figures["together"] = sum(paces)
        figures["step_seconds"] = _batch(settings) * len(paces) / sum(paces)
    if figures["errors"]:
        raise RuntimeError(f"{len(figures['errors'])} of {runs} trainings failed:\n{figures['errors'][0]}")


def _command(network: str, seconds: int, root: Path, seed: int, settings: Settings) -> list[str]:
    options = {
        "config": _RECIPE,
        "seed_everything": seed,
        "model.network": network,
        "data.init_args.train": settings.data / "train.parquet",
        "data.init_args.test": settings.data / "test.parquet",
        "data.init_args.val_fraction": 0,
        "data.init_args.batch_size": _batch(settings),
        "trainer.default_root_dir": root,
        "trainer.accelerator": "gpu" if settings.device == "cuda" else "cpu",
        "trainer.max_epochs": 1000,
        "trainer.max_time": f"00:00:00:{seconds:02d}",
        "trainer.limit_val_batches": 0,
        "trainer.num_sanity_val_steps": 0,
        "trainer.log_every_n_steps": 2 if settings.quick else 20,
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    return [sys.executable, "-m", "awconv", "fit", *(f"--{name}={value}" for name, value in options.items())]


def _together(commands: list[list[str]], roots: list[Path], seconds: float) -> list[str]:
    """Runs all at once, each with one thread a process, and returns what each says of its failure, or nothing."""
    processes = []
    for command, root in zip(commands, roots, strict=True):
        root.mkdir()
        with (root / "log").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        processes.append(process)
    errors = []
    for process, root in zip(processes, roots, strict=True):
        try:
            status: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = f"none after {seconds:.0f} s"
        text = (root / "log").read_text(errors="replace")[-_LONGEST:]
        errors.append("" if status == 0 else f"exit status {status}: {text}")
    return errors


def _pace(root: Path, batch: int) -> float | None:
    """Images a second between the first and the last line of a training's log, which counts from its start."""
    known = []
    for path in root.rglob("metrics.csv"):
        with path.open() as file:
            for line in csv.DictReader(file):
                if line.get("images_per_second"):
                    images = (int(line["step"]) + 1) * batch
                    known.append((images, images / float(line["images_per_second"])))
    if len(known) < 2:
        return None
    (images, start), (more_images, end) = known[0], known[-1]
    return (more_images - images) / (end - start)


def _bare_loop(network: str, settings: Settings, figures: dict[str, Any], save: Save) -> None:
    """The same step without Lightning, loaders and augmentation; Python's time is that at two images."""
    usual = _batch(settings)
    for way, name in {"plain": BASELINES[network], "aw": network}.items():
        sides = {}
        for batch in (usual, 2):
            images = torch.randn(batch, 3, _IMAGE, _IMAGE, device=settings.device)
            sides[batch] = Side(
                timm.create_model(name, num_classes=10), settings.algorithm, images, "off", settings.device
            )
        timed = ratios({"step": sides[usual].training}, settings.rounds, settings.device)
        figures[way] = {"step_seconds": timed["step"].seconds, "host_seconds": host_seconds(sides[2])}
        figures[way]["images_per_second"] = usual / timed["step"].seconds
        save()
