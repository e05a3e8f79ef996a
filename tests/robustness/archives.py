"""Spoiled zip archives of data sets with boxes."""

from __future__ import annotations

import io
import random
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.robustness.boxes import COCO, VOC, coco_files, cut, flipped, voc_files
from tests.robustness.commands import something_was_trained
from tests.robustness.harness import Case


def packed(files: dict[str, bytes]) -> bytes:
    """Files as a zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return buffer.getvalue()


_CENTRAL = {"flags": (8, "<H"), "method": (10, "<H"), "crc": (16, "<I"), "packed": (20, "<I"), "size": (24, "<I")}
_CENTRAL["at"] = (42, "<I")
_LOCAL = {"flags": (6, "<H"), "method": (8, "<H"), "crc": (14, "<I"), "packed": (18, "<I"), "size": (22, "<I")}


def _patched(content: bytes, field: str, value: int) -> bytes:
    """An archive with one field changed in the headers of all members."""
    changed = bytearray(content)
    for signature, fields in ((b"PK\1\2", _CENTRAL), (b"PK\3\4", _LOCAL)):
        start = content.find(signature)
        while start >= 0 and field in fields:
            offset, form = fields[field]
            struct.pack_into(form, changed, start + offset, value)
            start = content.find(signature, start + 4)
    return bytes(changed)


def _bomb(files: dict[str, bytes], rng: random.Random) -> bytes:
    size = rng.choice([20, 70, 150]) * 2**20
    path = rng.choice([path for path in files if path.endswith((".json", ".xml", ".png", ".jpg"))])
    return packed(files | {path: rng.choice([b" ", b"\0", b"["]) * size})


def _named_out(files: dict[str, bytes], rng: random.Random) -> bytes:
    name = rng.choice(
        ["../planted.png", "/tmp/planted.png", "a/../../planted.png", "C:/planted.png", "..\\planted.png"]
    )
    return packed(files | {name: b"planted"})


def _with_leftovers(files: dict[str, bytes], rng: random.Random) -> bytes:
    """As programs of macOS, NAS and Windows pack them: harmless."""
    top = rng.choice(["", "data set/"])
    more = {"__MACOSX/._data": b"x", ".DS_Store": b"x", "Thumbs.db": b"x", f"{top}@eaDir/0.png": b"x"}
    named = {f"{top}{path}": content for path, content in files.items()}
    beside = {f"{path.rpartition('/')[0]}/._{path.rpartition('/')[2]}": b"x" for path in named}
    everything = {**named, **more, **beside}
    if rng.random() < 0.3:
        everything = {path.replace("/", "\\"): content for path, content in everything.items()}
    return packed(everything)


def _other(files: dict[str, bytes], rng: random.Random) -> bytes:
    return rng.choice([b"", b"PK\3\4", b"PK\5\6" + bytes(18), b"Rar!", bytes(99), packed({"a.txt": b"a"})])


_ZIPS: dict[str, tuple[Callable[[dict[str, bytes], random.Random], bytes], bool]] = {
    "cut": (lambda files, rng: cut(packed(files), rng), True),
    "flipped": (lambda files, rng: flipped(packed(files), rng), False),
    "encrypted": (lambda files, rng: _patched(packed(files), "flags", 1), True),
    "another method": (lambda files, rng: _patched(packed(files), "method", rng.choice([1, 9, 12, 14, 93, 99])), True),
    "another size": (lambda files, rng: _patched(packed(files), "size", rng.choice([0, 9, 2**31, 2**32 - 2])), True),
    "another packed size": (  # the checksum still holds
        lambda files, rng: _patched(packed(files), "packed", rng.choice([0, 9, 2**31])),
        False,
    ),
    "another checksum": (lambda files, rng: _patched(packed(files), "crc", 7), True),
    "another place": (lambda files, rng: _patched(packed(files), "at", rng.choice([1, 99, 2**31, 2**32 - 2])), True),
    "bomb": (_bomb, True),
    "names that lead out": (_named_out, True),
    "leftovers": (_with_leftovers, False),
    "of another kind": (_other, True),
}


def archives(seed: int) -> Case:
    """A zip archive of a data set with boxes that was damaged, or is a trap."""
    rng = random.Random(f"archives {seed}")
    rule = list(_ZIPS)[seed % len(_ZIPS)]
    kind = rng.choice(["coco", "voc"])

    def prepare(folder: Path) -> Sequence[str]:
        files = coco_files() if kind == "coco" else voc_files()
        (folder / "data.zip").write_bytes(_ZIPS[rule][0](files, rng))
        return *(COCO if kind == "coco" else VOC), "--data.root=data.zip"

    wrong = _ZIPS[rule][1]
    outcome: Any = "error" if wrong else "either"
    return Case(f"archives {seed}: {rule}, {kind}", prepare, "data.zip", outcome, something_was_trained)
