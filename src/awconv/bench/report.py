"""Results as a table or JSON, with the machine and the versions that they belong to."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import timm
import torch

from awconv.bench.timing import Ratio
from awconv.tables import Table
from awconv.version import __version__

Format = Literal["table", "markdown", "json"]
PICTURES = (".png", ".svg", ".pdf")
MOST = 2**31 - 1
MOST_ROUNDS = 100_000


@dataclass(frozen=True)
class Measurement:
    """One figure of one layer or network.

    Attributes:
        subject: the layer or the network.
        work: what was measured, such as ``"forward"``, ``"step"`` or ``"memory"``.
        way: how it was computed; ``"plain"`` is the baseline.
        ratio: to the baseline: of times, or of bytes with equal deciles and no seconds.
        facts: whatever else belongs to it.
    """

    subject: str
    work: str
    way: str
    ratio: Ratio
    facts: dict[str, Any]


def environment(device: str) -> dict[str, Any]:
    """The machine and the versions."""
    on_gpu = device == "cuda"
    facts = {
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "awconv": __version__,
    }
    if on_gpu:
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "triton": _triton()}
    return facts


def _triton() -> str | None:
    return None if find_spec("triton") is None else str(import_module("triton").__version__)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.machine()} ({capability})"


def print_measurements(measurements: Sequence[Measurement], device: str, format: Format) -> None:
    """One line for each subject and work, one column for each way."""
    if format == "json":
        rows = [asdict(measurement) for measurement in measurements]
        print(json.dumps({"environment": environment(device), "rows": rows}, indent=1))
        return
    ways = list(dict.fromkeys(measurement.way for measurement in measurements))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for measurement in measurements:
        ratio = measurement.ratio
        spread = f" ({ratio.low:.2f} to {ratio.high:.2f})" if ratio.low != ratio.high else ""
        lines.setdefault((measurement.subject, measurement.work), {})[measurement.way] = f"{ratio.median:.2f}{spread}"
    facts = environment(device)
    Table(
        headings=("", "work", *ways),
        rows=[(*key, *(line.get(way, "") for way in ways)) for key, line in lines.items()],
        note="Relative to plain: median (first to ninth decile) of the rounds. "
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}.",
    ).print(format)


def numbers(name: str, text: str) -> list[int]:
    """The positive integers in ``"1,8,32"``.

    Raises:
        ValueError: there is something else.
    """
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise ValueError(
            f"{name} must be positive integers with commas between them, such as 1,8,32, got {text[:80]!r}"
        )
    check_range(**{name: max(values)})
    return values


def check_range(**values: int) -> None:
    """Raises a ValueError for a number below 1, or one that sizes and indices of tensors cannot hold."""
    for name, value in values.items():
        most = MOST_ROUNDS if name == "rounds" else MOST
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be from 1 to {most:,}, got {str(value)[:40]}")


def check_picture(name: str, path: Path | None) -> None:
    """Raises a ValueError for a picture that could not be written after all was timed."""
    if path is None:
        return
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"{name} must end in {', '.join(PICTURES)}, got {path}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{name} must be a file in a folder that is there and can be written, got {path}")


def check_memory(count: int, device: str, **given: object) -> None:
    """Raises a ValueError where tensors cannot fit into the memory of a device.

    Args:
        count: the least number of their elements, in single precision.
        device: ``"cpu"`` or ``"cuda"``.
        **given: the arguments that decide it, for the message.
    """
    if device == "cuda":
        there = torch.cuda.get_device_properties(0).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * count > there:
        arguments = ", ".join(f"{name} = {value}" for name, value in given.items())
        raise ValueError(
            f"at least {4 * count / 2**30:,.0f} GiB are needed, and {device} has {there / 2**30:,.0f}: give less of "
            f"{arguments}"
        )


def names(name: str, text: str, known: Sequence[str]) -> list[str]:
    """The words in ``"forward,step"``.

    Raises:
        ValueError: one of them is not known.
    """
    values = [part.strip() for part in text.split(",")]
    unknown = [value for value in values if value not in known]
    if unknown:
        raise ValueError(f"{name} must be some of {', '.join(known)} with commas between them, got {unknown[0]!r}")
    return values


def check_device(device: str) -> None:
    """Raises a ValueError for a device that cannot be used here."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no GPU here; leave --device out, or install a CUDA build")
