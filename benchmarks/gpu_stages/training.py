"""``awconv fit`` on CIFAR-10: images a second of one training and of several that share a GPU, and a step of it beside
the same step in a bare loop."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from awconv.models.registry import BASELINES
from gpu_stages.journal import Entry, Settings

_ROOT = Path(__file__).parent.parent.parent
_RECIPE = _ROOT / "recipes" / "cifar10_jpeg_resnet8_short.yaml"  # with the longer network, for a fixed time
_TO_START = 60  # seconds in which the processes read the data
_TO_COMPILE = 60
_LONGEST = 4000  # characters of an error

Save = Callable[[], None]


def entries(settings: Settings) -> list[Entry]:
    """In order of worth."""
    network, seconds = ("aw_resnet8_cifar", 2) if settings.quick else ("aw_resnet20_cifar", 15)

    def fit(name: str, network: str, runs: int, *more: str, guess: float = 0) -> Entry:
        guess += seconds + (5 if settings.quick else 15) + 2 * runs
        return Entry(name, guess, partial(_fit, network, runs, seconds, more, settings))

    alone = fit("1 run", network, 1)
    beside = [
        Entry(f"bare loop, {name}", 0 if settings.quick else 15, partial(_bare_loop, name, settings))
        for name in (network, BASELINES[network])
    ]
    if settings.quick:
        return [alone, *beside]
    graphs = fit("1 run, CUDA graphs", network, 1, "--model.compile=reduce-overhead", guess=60)
    together = [fit(f"{runs} runs", network, runs) for runs in (4, 8, 12)]
    return [alone, *beside, *together, fit("1 plain run", BASELINES[network], 1), graphs]


def _batch(settings: Settings) -> int:
    return 32 if settings.quick else 256


def _fit(
    network: str,
    runs: int,
    seconds: int,
    more: Sequence[str],
    settings: Settings,
    figures: dict[str, Any],
    save: Save,
) -> None:
    _check(settings)
    compiling = _TO_COMPILE if more else 0
    figures |= {"network": network, "runs": runs, "batch": _batch(settings), "precision": _precision(settings)}
    with tempfile.TemporaryDirectory() as folder:
        roots = [Path(folder) / str(run) for run in range(runs)]
        commands = [
            [*_command(network, seconds + compiling, root, run, settings), *more] for run, root in enumerate(roots)
        ]
        figures["command"] = commands[0][1:]
        errors = _together(commands, roots, seconds + compiling + _TO_START)
        figures["images_per_second"] = [_pace(root, _batch(settings)) for root in roots]
    figures["errors"] = [error for error in errors if error]
    paces = [pace for pace in figures["images_per_second"] if pace]
    if paces:
        figures["together"] = sum(paces)
        figures["step_seconds"] = _batch(settings) * len(paces) / sum(paces)
    if figures["errors"]:
        raise RuntimeError(f"{len(figures['errors'])} of {runs} trainings failed:\n{figures['errors'][0]}")


def _check(settings: Settings) -> None:
    missing = [name for name in ("jsonargparse", "lightning", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"awconv fit needs {', '.join(missing)}; install awconv[train,parquet]")
    if not (settings.data / "train.parquet").is_file():
        raise FileNotFoundError(f"--data must be a folder with CIFAR-10's train.parquet, got {settings.data}")


def _precision(settings: Settings) -> str:
    return "bf16-mixed" if settings.device == "cuda" else "32-true"


def _command(network: str, seconds: int, root: Path, seed: int, settings: Settings) -> list[str]:
    options = _options(network, settings) | {
        "seed_everything": seed,
        "trainer.default_root_dir": root,
        "trainer.max_epochs": 1000,
        "trainer.max_time": f"00:00:00:{seconds:02d}",
        "trainer.limit_val_batches": 0,
        "trainer.num_sanity_val_steps": 0,
        "trainer.log_every_n_steps": 2 if settings.quick else 20,
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    return [sys.executable, "-m", "awconv", "fit", *_typed(options)]


def _options(network: str, settings: Settings) -> dict[str, Any]:
    """The recipe, with the longer network and without held-out images."""
    return {
        "config": _RECIPE,
        "model.network": network,
        "model.channels_last": "true",
        "data.init_args.train": settings.data / "train.parquet",
        "data.init_args.test": settings.data / "test.parquet",
        "data.init_args.val_fraction": 0,
        "data.init_args.batch_size": _batch(settings),
        "trainer.accelerator": "gpu" if settings.device == "cuda" else "cpu",
        "trainer.precision": _precision(settings),
    }


def _typed(options: Mapping[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


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
    _check(settings)
    from training_step import measure

    figures |= {"network": network, "batch": _batch(settings), "precision": _precision(settings)}
    steps = (2, 4) if settings.quick else (20, 100)
    figures |= measure(_typed(_options(network, settings)), 1 if settings.quick else 3, *steps)
