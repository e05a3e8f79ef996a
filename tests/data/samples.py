"""Digits written in the layouts that users have."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

DIGITS = load_digits()


def digit(index: int, size: int = 8) -> Image.Image:
    return Image.fromarray((DIGITS.images[index] * 15).astype(np.uint8)).resize((size, size))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_tree(root: Path, splits: dict[str, int], size: int = 8) -> None:
    for split, count in splits.items():
        for index in range(count):
            folder = root / split / f"digit{DIGITS.target[index]}"
            folder.mkdir(parents=True, exist_ok=True)
            digit(index, size).save(folder / f"{index:04}.png")


def write_parquet(path: Path, indices: range, names: bool = True, label: Callable[[int], int] = int) -> None:
    images = [{"bytes": png(digit(index)), "path": f"{index}.png"} for index in indices]
    table = pa.table({"image": images, "label": [label(DIGITS.target[index]) for index in indices]})
    if names:
        features = {"label": {"names": [f"digit{i}" for i in range(10)], "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


def write_shard(path: Path, indices: range, label: str = "cls", pax: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for index in indices:
            target = int(DIGITS.target[index])
            text = {"cls": str(target), "json": json.dumps({"label": target})}.get(label)
            prefix = "a long folder name " * 10 if pax else "images"
            files = {f"{prefix}/{index:04}.seg.png" if pax else f"{prefix}/{index:04}.png": png(digit(index))}
            if text is not None:
                files[f"{prefix}/{index:04}.{label}"] = text.encode()
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_tar(path: Path, content: dict[str, bytes | str]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, what in content.items():
            data = what.encode() if isinstance(what, str) else what
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def spoilt(content: bytes, count: int, behind: int = 0) -> Iterator[bytes]:
    """The content with a few bytes changed, at places from ``behind`` on, or cut off."""
    generator = np.random.default_rng(0)
    for turn in range(count):
        damaged = bytearray(content)
        if turn % 5 == 0:
            yield content[: generator.integers(len(content))]
            continue
        for position in generator.integers(behind if turn % 2 else 0, len(content), generator.choice([1, 3, 20])):
            damaged[position] = generator.integers(256)
        yield bytes(damaged)
