"""The full schedules that docs/experiments.md reports, on one GPU and in a limit of time, or by name on a CPU.

Runs ``awconv compare`` for each experiment whose data are there, in order of worth, until the time is over; the same
command goes on where it stopped, and takes finished runs from results/ too. The records are packed into one file
whenever there is a new one, so that a machine that is taken away leaves what was finished.

    python benchmarks/evidence.py [NAME ...] [--seconds 480] [--data DIR] [--out DIR] [--archive FILE] [--jobs 8]
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_TO_END = 10.0  # seconds for the last records
_LOOK = 2.0


@dataclass(frozen=True)
class Experiment:
    """A comparison.

    Attributes:
        recipe: its name under recipes/.
        variants: in order of worth.
        seeds: number of seeds.
        files: the options of the data's files, and where the files are below the folder of data.
        tune: the setting that each variant chooses first, and the values.
        overrides: of the recipe.
        on_cpu: whether it is meant for a CPU, and so only run by name.
    """

    recipe: str
    variants: str
    seeds: int
    files: dict[str, str]
    tune: str = "lr=0.2,0.4,0.8,1.6"
    overrides: tuple[str, ...] = ()
    on_cpu: bool = False

    def command(self, name: str, arguments: argparse.Namespace, seconds: float) -> list[str]:
        """The command that runs it, or goes on with it."""
        options = [
            *("--variants", self.variants, "--seeds", "1" if arguments.quick else str(self.seeds)),
            *("--jobs", str(arguments.jobs), "--tune", self.tune, "--tune_epochs", "1" if arguments.quick else "5"),
            *("--time_limit", f"{seconds:.0f}s", "--out", str(arguments.out / name)),
        ]
        files = [f"--{option}={arguments.data / path}" for option, path in self.files.items()]
        quick = [
            *("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"),
            *("--trainer.limit_test_batches=1", "--trainer.precision=32-true", "--data.batch_size=32"),
        ]
        overrides = [*self.overrides, *files, *(quick if arguments.quick else [])]
        recipe = str(ROOT / "recipes" / f"{self.recipe}.yaml")
        return [sys.executable, "-m", "awconv", "compare", recipe, *options, "--", *overrides]

    def is_there(self, data: Path) -> bool:
        """Whether the data are."""
        return all(any(data.glob(path)) for path in self.files.values())


_CIFAR = {"data.train": "cifar10-jpeg/train.parquet", "data.test": "cifar10-jpeg/test.parquet"}
_TINY = {"data.train": "tiny*/train-*.parquet", "data.test": "tiny*/validation.parquet"}
EXPERIMENTS = {
    "cifar10_jpeg_resnet20": Experiment(
        "cifar10_jpeg_resnet20", "plain,aw,se,aw_se,od,aw+input_gain=true,cbam", 5, _CIFAR
    ),
    "tiny_imagenet100_resnet18": Experiment(
        "tiny_imagenet_resnet18",
        "plain,aw,se,aw_se,od",
        3,
        _TINY,
        tune="lr=0.05,0.1,0.2,0.4",
        overrides=(
            *("--trainer.max_epochs=30", "--trainer.precision=bf16-mixed"),
            *("--model.channels_last=true", "--data.batch_size=256"),
        ),
    ),
    "cifar10_jpeg_resnet56": Experiment(
        "cifar10_jpeg_resnet20", "plain,aw", 3, _CIFAR, overrides=("--model.network=resnet56_cifar",)
    ),
    "cifar10_jpeg_resnet8": Experiment("cifar10_jpeg_resnet8", "plain,aw,se,aw_se", 3, _CIFAR, on_cpu=True),
}


def main() -> int:
    arguments = _parse()
    end = time.monotonic() + arguments.seconds - _TO_END
    status = 0
    for name in arguments.experiments or [name for name, one in EXPERIMENTS.items() if not one.on_cpu]:
        experiment = EXPERIMENTS[name]
        left = end - time.monotonic()
        if not experiment.is_there(arguments.data):
            print(f"{name}: its data are not in {arguments.data}", flush=True)
        elif left > 1:
            command = experiment.command(name, arguments, left)
            _bring(ROOT / "results" / name, arguments.out / name)
            print(shlex.join(command), flush=True)
            status = max(status, abs(_run(command, arguments, end + _TO_END)))
    return status


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}; or all for a GPU")
    parser.add_argument("--seconds", type=float, default=480, help="for all of them")
    parser.add_argument("--data", type=Path, default=ROOT / ".gpu/data", help="a folder with the folders of data")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build/evidence", help="a folder for each comparison's folder"
    )
    parser.add_argument("--archive", type=Path, help="of the records; OUT/records.tgz by default")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="two steps and one seed, to see that it runs")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.experiments if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"there is no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    if arguments.seconds <= _TO_END:
        parser.error(f"--seconds must be more than {_TO_END:g}, got {arguments.seconds:g}")
    arguments.archive = arguments.archive or arguments.out / "records.tgz"
    arguments.archive = arguments.archive.resolve()
    arguments.archive.parent.mkdir(parents=True, exist_ok=True)
    arguments.data, arguments.out = arguments.data.resolve(), arguments.out.resolve()
    return arguments


def _bring(kept: Path, folder: Path) -> None:
    """Copies the records of former machines."""
    for path in _records(kept):
        place = folder / path.relative_to(kept)
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)


def _records(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*-seed*.json") if path.is_file()}


def _run(command: list[str], arguments: argparse.Namespace, end: float) -> int:
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    packed: set[Path] = set()
    try:
        while process.poll() is None and time.monotonic() < end:
            time.sleep(_LOOK)
            packed = _pack(out, arguments.archive, packed)
    finally:
        process.terminate()  # runs write checkpoints
        try:
            process.wait(_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
    _pack(out, arguments.archive, packed)
    return process.wait()


def _pack(out: Path, archive: Path, packed: set[Path]) -> set[Path]:
    """Writes an archive of all records, if there are others than the packed ones."""
    records = _records(out)
    if records != packed:
        partial = archive.with_name(f"{archive.name}.partial")
        with tarfile.open(partial, "w:gz") as file:
            for path in sorted(records):
                file.add(path, path.relative_to(out))
        os.replace(partial, archive)
    return records


if __name__ == "__main__":
    sys.exit(main())
