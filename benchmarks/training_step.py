"""What a step of ``awconv fit`` takes beside the same step in a bare loop: Lightning, callbacks, logs, the bar.

Both train the same network on the same batches, augmented and normalised on the device, with the same optimiser and
schedule, in turn in one process. With two tiny images a batch, as by default, a CPU's step is nearly all Python's and
the dispatcher's, as a small network's is on a GPU.

    python benchmarks/training_step.py [NETWORK ...] [--rounds 9] [--json FILE] [-- ARGUMENTS OF awconv fit]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR

from awconv.bench.report import environment
from awconv.training import TrainingCLI
from awconv.training.recipe import Recipe

_DIGITS = ("--data=Digits", "--data.batch_size=2", "--trainer.accelerator=cpu")


@dataclass(frozen=True)
class Training:
    """A training of some steps.

    Attributes:
        arguments: of ``awconv fit``.
        data: those of the arguments, decoded before.
        warm_up: steps that are not timed.
        steps: those that are.
    """

    arguments: Sequence[str]
    data: Any
    warm_up: int
    steps: int

    @property
    def all_steps(self) -> int:
        return self.warm_up + self.steps


class _Clock(pl.Callback):
    """When the timed steps began and ended."""

    def __init__(self, training: Training) -> None:
        self._between = (training.warm_up, training.all_steps)
        self.begun = self.ended = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step in self._between:
            self.begun, self.ended = self.ended, _now(module.device)


def fit_seconds(training: Training) -> float:
    """Seconds of a step of ``awconv fit``."""
    clock = _Clock(training)
    with tempfile.TemporaryDirectory() as folder:
        built = _built(training.arguments, folder, training.all_steps)
        built.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        with (Path(folder) / "shown").open("w") as shown, redirect_stdout(shown):
            built.trainer.fit(built.model, datamodule=training.data)
    return (clock.ended - clock.begun) / training.steps


def bare_seconds(training: Training) -> float:
    """Seconds of a step of a loop of one's own."""
    with tempfile.TemporaryDirectory() as folder:
        built = _built(training.arguments, folder, training.all_steps)
    device, data = built.trainer.strategy.root_device, training.data
    data.trainer = built.trainer  # which says where the data go
    task = built.model.to(device)
    network = task.network.to(memory_format=task.memory_format).train()
    if task.compiles:
        network.compile(mode=None if task.compiles is True else task.compiles)
    optimizer = task.optimization.make_optimizer(network, fused=device.type == "cuda")
    schedule = LambdaLR(optimizer, task.optimization.schedule(len(data.train_dataloader()), 10**9))
    begun = 0.0
    for step, (images, targets) in enumerate(_batches(data, training.all_steps)):
        if step == training.warm_up:
            begun = _now(device)
        images = data.augment(images.to(device, non_blocking=True), step)
        with built.trainer.precision_plugin.forward_context():
            loss = F.cross_entropy(network(task.normalised(images)), targets.to(device, non_blocking=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return (_now(device) - begun) / training.steps


def _built(arguments: Sequence[str], folder: str, steps: int = 1) -> TrainingCLI:
    return Recipe.parse(
        [
            *arguments,
            "--model.warmup_epochs=0",
            f"--trainer.max_steps={steps}",
            "--trainer.max_epochs=10000",
            "--trainer.limit_val_batches=0",
            "--trainer.num_sanity_val_steps=0",
            f"--trainer.default_root_dir={folder}",
        ]
    ).build()


def _batches(data: Any, count: int) -> Any:
    def endless() -> Any:
        while True:
            yield from data.train_dataloader()

    return islice(endless(), count)


def _now(device: torch.device) -> float:
    """Seconds; on a CPU those of this process's threads, so that others that share the machine distort less."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(arguments: Sequence[str], rounds: int, warm_up: int = 20, steps: int = 150) -> dict[str, Any]:
    """The step of ``awconv fit`` relative to the bare loop's: median, least and largest over the rounds.

    Args:
        arguments: of ``awconv fit``.
        rounds: how often each is run, in turn.
        warm_up: steps that are not timed.
        steps: those that are.
    """
    with tempfile.TemporaryDirectory() as folder:
        training = Training(arguments, _built(arguments, folder).datamodule, warm_up, steps)
    sides = {"bare": bare_seconds, "fit": fit_seconds}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in sorted(sides, reverse=bool(turn % 2)):
            seconds[name].append(sides[name](training))
    each = [fit / bare for fit, bare in zip(seconds["fit"], seconds["bare"], strict=True)]
    return {
        "ratio": {"median": median(each), "low": min(each), "high": max(each)},
        "step_seconds": {name: median(values) for name, values in seconds.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["resnet20_cifar", "aw_resnet20_cifar"], metavar="NETWORK")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, given = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    on = "cuda" if torch.cuda.is_available() and given else "cpu"
    found: dict[str, Any] = {"environment": environment(on), "arguments": given or list(_DIGITS), "networks": {}}
    for network in arguments.networks:
        timed = measure([*(given or _DIGITS), f"--model.network={network}"], arguments.rounds)
        found["networks"][network] = timed
        ratio = timed["ratio"]
        print(f"{network}: {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
