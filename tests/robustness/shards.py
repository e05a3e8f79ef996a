"""Spoiled Parquet files, tar files and folders of classes, for ``awconv fit``."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.robustness.commands import FIT, something_was_trained
from tests.robustness.harness import Case
from tests.robustness.pictures import encoded

_COUNT = 12
_SHORT = ("--data.image_size=8", "--data.batch_size=4", "--data.num_workers=0", "--data.val_fraction=0")


def _png(number: int) -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)))


def cut(content: bytes, rng: random.Random) -> bytes:
    """Without its end."""
    return content[: rng.randrange(len(content))]


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Some bits are others, often at the end, where Parquet's lists are."""
    changed = bytearray(content)
    low = len(content) // 2 if rng.random() < 0.5 else 0
    for _ in range(rng.choice([1, 3, 10])):
        changed[rng.randrange(low, len(content))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def zeroed(content: bytes, rng: random.Random) -> bytes:
    """A part is zeros."""
    start = rng.randrange(len(content) - 64)
    return content[:start] + bytes(64) + content[start + 64 :]


_STRANGERS = (b"", b"not a data set\n" * 20, b"PAR1", b"PAR1" + bytes(40) + b"PAR1", b"PK\3\4" + bytes(99), bytes(1024))


def other(content: bytes, rng: random.Random) -> bytes:
    """Something else under that name."""
    return rng.choice([*_STRANGERS, gzip.compress(content), _png(0), content + content, content + b"more"])


_DAMAGE: tuple[Callable[[bytes, random.Random], bytes], ...] = (cut, flipped, flipped, zeroed, other)


def _case(door: str, seed: int, title: str, names: str, outcome: Any, prepare: Callable[[Path], Sequence[str]]) -> Case:
    return Case(
        f"{door} {seed}: {title}",
        lambda folder: [*FIT, *_SHORT, *prepare(folder)],
        names,
        outcome,
        something_was_trained,
    )


def _table(labels: Any = None, images: Any = None, **columns: Any) -> pa.Table:
    content = [{"bytes": _png(n), "path": f"{n}.png"} for n in range(_COUNT)] if images is None else images
    return pa.table(
        {"image": content, "label": [n % 3 for n in range(_COUNT)] if labels is None else labels, **columns}
    )


_LABELS: dict[str, Any] = {
    "negative": [-1, *range(_COUNT - 1)],
    "huge": [2**62, *([0, 1] * 6)][:_COUNT],
    "31 bits": [0, 1] * 5 + [1, 2**31],
    "nulls": [None, 0, 1] * 4,
    "all null": [None] * _COUNT,
    "floats": [0.0, 1.5, float("nan")] * 4,
    "booleans": [True, False] * 6,
    "lists": [[0], [1], []] * 4,
    "structs": [{"label": 1}, {"label": 0}] * 6,
    "bytes": [b"a", b"\xff"] * 6,
    "empty names": ["", "a"] * 6,
    "one class": [0] * _COUNT,
    "gaps": [0, 5, 9] * 4,
    "as many as images": list(range(_COUNT)),
    "long names": ["n" * 10**5, "m"] * 6,
    "control characters": ["a\x1b[2J", "b\nc"] * 6,
    "numbers as names": ["0", "1", "2"] * 4,
}
_IMAGES: dict[str, Any] = {
    "numbers": list(range(_COUNT)),
    "lists": [[1, 2]] * _COUNT,
    "nulls": [None] * _COUNT,
    "some nulls": [None if n == 3 else _png(n) for n in range(_COUNT)],
    "empty": [b""] * _COUNT,
    "PostScript": [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(executed) (w) file\n"] * _COUNT,
    "paths out": ["../../../../etc/passwd"] * _COUNT,
    "absolute paths": ["/dev/zero", "/dev/null"] * 6,
    "other fields": [{"data": b"x"}] * _COUNT,
    "fields of other types": [{"bytes": 3, "path": 4}] * _COUNT,
    "no bytes and no path": [{"bytes": None, "path": None}] * _COUNT,
    "text": ["no such file.png"] * _COUNT,
    "NUL in a path": ["a\0b.png"] * _COUNT,
    "cut": [_png(n)[:40] for n in range(_COUNT)],
}
_METADATA: tuple[Any, ...] = (
    "[" * 10**5,
    "\x00",
    "null",
    "[]",
    '{"info": []}',
    '{"info": {"features": {"label": {"names": "abc"}}}}',
    '{"info": {"features": {"label": {"names": {"0": "a"}}}}}',
    '{"info": {"features": {"label": {"names": [1, 2, 3]}}}}',
    '{"info": {"features": {"label": {"names": ["a", "a", "b"]}}}}',
    '{"info": {"features": {"label": {"names": ["a"]}}}}',
    '{"info": {"features": {"label": {"names": []}}}}',
    '{"info": {"features": {"label": {"names": ["a", "b"]}}}}',
    '{"info": {"features": {"label": {"names": ["\\u001b[2J", "b", "c"]}}}}',
    '{"info": {"features": {"label": 3}}}',
    '{"info": {"features": {"label": {"names": [null, [], {}]}}}}',
)


_COLUMNS: dict[str, Callable[[], pa.Table]] = {
    "no label": lambda: _table().drop_columns("label"),
    "no image": lambda: _table().drop_columns("image"),
    "no rows": lambda: _table().slice(0, 0),
    "no columns": lambda: pa.table({}),
    "one row": lambda: _table().slice(0, 1),
    "twice": lambda: pa.Table.from_arrays([*_table().columns, _table()["label"]], ["image", "label", "label"]),
    "decimals": lambda: _table(pa.array([1, 0, 2] * 4).cast(pa.decimal128(20, 1))),
    "dates": lambda: _table(pa.array([1, 0, 2] * 4).cast(pa.timestamp("us"))),
    "unsigned": lambda: _table(pa.array([1, 0, 2**64 - 1] * 4, pa.uint64())),
    "categories": lambda: _table(pa.array(["a", "b", None] * 4).dictionary_encode()),
    "strange names": lambda: _table(**{"\x1b[2J\ncolumn": list(range(_COUNT))}),
    "two columns of images": lambda: _table(jpg=[b"x"] * _COUNT),
}
_HARMLESS = {
    "as many as images", "long names", "control characters", "numbers as names", "booleans", "some nulls",
    "strange names", "two columns of images", "one row",
}  # fmt: skip


def parquet(seed: int) -> Case:
    """A Parquet file that is damaged, or whose columns, labels, images or metadata are of other kinds."""
    rng = random.Random(f"parquet {seed}")
    rule, turn = ("bytes", "labels", "images", "metadata", "columns", "files")[seed % 6], seed // 6
    if rule == "files":
        return _files(seed, rng)
    buffer, table, wrong = io.BytesIO(), _table(), False
    if rule == "metadata":
        text = _METADATA[turn % len(_METADATA)]
        table, title = table.replace_schema_metadata({"huggingface": text}), f"metadata {text[:60]!r}"
    elif rule != "bytes":
        known: dict[str, Any] = {"labels": _LABELS, "images": _IMAGES, "columns": _COLUMNS}[rule]
        title = list(known)[turn % len(known)]
        value = known[title]
        table = value() if rule == "columns" else _table(**{rule: value})
        wrong = title not in _HARMLESS
    pq.write_table(table, buffer, row_group_size=5)
    content = buffer.getvalue()
    if rule == "bytes":
        damage = _DAMAGE[turn % len(_DAMAGE)]
        content, title, wrong = damage(content, rng), damage.__name__, damage is cut

    def prepare(folder: Path) -> Sequence[str]:
        path = folder / "train.parquet"
        path.write_bytes(content)
        return "--data=Parquet", f"--data.train={path}"

    return _case("parquet", seed, title, "train.parquet", "error" if wrong else "either", prepare)


def _files(seed: int, rng: random.Random) -> Case:
    """Several files that do not belong together, or none."""
    kinds = ("other names", "other type", "missing val", "folder", "pattern of none", "val of others", "pipe")
    kind = rng.choice(kinds)
    others = {
        "other names": _table(["a", "b", "d"] * 4).replace_schema_metadata({"huggingface": _METADATA[11]}),
        "other type": _table(),
    }
    train = {"folder": ".", "pattern of none": "nothing-*.parquet", "pipe": "train-1.parquet"}.get(
        kind, "train-*.parquet"
    )

    def prepare(folder: Path) -> Sequence[str]:
        pq.write_table(_table(["a", "b", "c"] * 4), folder / "train-0.parquet")
        if kind in others:
            pq.write_table(others[kind], folder / "train-1.parquet")
        elif kind == "pipe":
            os.mkfifo(folder / "train-1.parquet")
        elif kind.endswith(("val", "others")):
            pq.write_table(_table(["a", "b", "z"] * 4), folder / "val.parquet")
            val = "none.parquet" if kind == "missing val" else "val.parquet"
            return "--data=Parquet", f"--data.train={train}", f"--data.val={val}"
        return "--data=Parquet", f"--data.train={train}"

    names = {"folder": ".", "pattern of none": "nothing-"}.get(kind, ".parquet")
    return _case("parquet", seed, kind, names, "error", prepare)


def _tar(members: Sequence[tuple[str, bytes | tarfile.TarInfo]], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _special(name: str, kind: bytes, target: str = "") -> tuple[str, tarfile.TarInfo]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return name, member


_GOOD = [one for n in range(_COUNT) for one in ((f"{n:03}.png", _png(n)), (f"{n:03}.cls", str(n % 3).encode()))]
_LABEL_FILES: tuple[tuple[str, bytes], ...] = tuple(
    ("cls", text)
    for text in (
        b"", b"-1", b"1.5", b"nan", b"cat", b"9" * 30, b"9" * 5000, b"2147483648", b"\xff\xfe1\0", b"1 2", b"0x1",
        b"\xd9\xa1", b"1_0", b"1" + bytes(9),
    )
) + tuple(
    ("json", text)
    for text in (
        b"", b"{}", b"[]", b"[" * 10**5, b'{"label": -1}', b'{"label": "cat"}', b'{"label": null}', b'{"label": true}',
        b'{"label": 1.0}', b'{"label": 1e999}', b'{"label": ' + b"9" * 5000 + b"}", b'{"label": [1]}', b"NaN", b"\xff",
        b'{"label": 9223372036854775808}', b'{"label": 1',
    )
)  # fmt: skip
_MEMBERS: dict[str, tuple[Sequence[tuple[str, Any]], bool]] = {
    "an image without a label": ([("x.png", _png(1))], True),
    "a label without an image": ([("x.cls", b"1")], False),
    "two images of a name": ([("000.jpg", _png(1))], True),
    "labels that disagree": ([("000.json", b'{"label": 2}')], True),
    "a link as an image": ([_special("x.png", tarfile.SYMTYPE, "/etc/passwd"), ("x.cls", b"1")], True),
    "a hard link as a label": ([("x.png", _png(1)), _special("x.cls", tarfile.LNKTYPE, "000.cls")], True),
    "a link elsewhere": ([_special("notes.txt", tarfile.SYMTYPE, "../../etc/passwd")], False),
    "a pipe": ([_special("x.png", tarfile.FIFOTYPE), ("x.cls", b"1")], True),
    "a device": ([_special("x.png", tarfile.CHRTYPE), ("x.cls", b"1")], True),
    "a folder as an image": ([_special("x.png", tarfile.DIRTYPE), ("x.cls", b"1")], False),
    "names with ..": ([("../../x.png", _png(1)), ("../../x.cls", b"1")], False),
    "absolute names": ([("/x.png", _png(1)), ("/x.cls", b"1")], False),
    "control characters": ([("\x1b[2J\n.png", _png(1)), ("\x1b[2J\n.cls", b"1")], False),
    "not UTF-8": ([("caf\udce9.png", _png(1)), ("caf\udce9.cls", b"1")], False),
    "an empty image": ([("x.png", b""), ("x.cls", b"1")], True),
    "an image of another kind": ([("x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n"), ("x.cls", b"1")], True),
    "a name twice": ([("000.png", _png(2))], True),
    "no name": ([("", b"")], False),
    "a name of dots": ([("..", b""), (".", b"")], False),
}
_WHOLE: dict[str, bytes] = {
    "gzip": _tar(_GOOD, "w:gz"),
    "bzip2": _tar(_GOOD, "w:bz2"),
    "xz": _tar(_GOOD, "w:xz"),
    "no members": _tar([]),
    "labels alone": _tar(_GOOD[1::2]),
    "images alone": _tar(_GOOD[::2]),
    "a size beyond the file": _tar(_GOOD)[:124] + b"77777777777\0" + _tar(_GOOD)[136:],
    "one class": _tar([(name, b"0" if name.endswith("cls") else content) for name, content in _GOOD]),
    "without its end": _tar(_GOOD).rstrip(b"\0"),
    "two in one": _tar(_GOOD) + _tar(_GOOD),
}


def tar(seed: int) -> Case:
    """A shard that is damaged, compressed, or holds what cannot be used; folders of classes that are none."""
    rng = random.Random(f"tar {seed}")
    rule = ("bytes", "labels", "members", "whole", "folders", "arguments")[seed % 6]
    if rule == "folders":
        return _folders(seed, rng)
    content, title, outcome, more = _tar(_GOOD), rule, "error", []
    if rule == "bytes":
        damage = _DAMAGE[seed // 6 % len(_DAMAGE)]
        content, title = damage(content, rng), damage.__name__
        outcome = "either" if damage is not cut else "error"
    elif rule == "labels":
        ending, text = _LABEL_FILES[seed // 6 % len(_LABEL_FILES)]
        content, title = _tar([*_GOOD, ("x.png", _png(1)), (f"x.{ending}", text)]), f"{ending} {text[:20]!r}"
    elif rule == "members":
        title = list(_MEMBERS)[seed // 6 % len(_MEMBERS)]
        members, wrong = _MEMBERS[title]
        content, outcome = _tar([*_GOOD, *members]), "error" if wrong else "either"
    elif rule == "whole":
        title = list(_WHOLE)[seed // 6 % len(_WHOLE)]
        content = _WHOLE[title]
        outcome = "either" if title in ("two in one",) else "error"
    else:
        given = (
            "--data.class_names=[a,b]", "--data.class_names=[a,a,b]", "--data.class_names=[1,2,3]",
            "--data.class_names=abc", "--data.val=missing.tar",
            "--data.train={0..99999999}.tar", "--data.train={5..2}.tar", "--data.train=.",
            "--data.train=train.tar/x", "--data.test=[", "--data.train=", "--data.train=\n", "--data.val=train.tar/..",
        )  # fmt: skip
        title = given[seed // 6 % len(given)]
        more = [title]

    def prepare(folder: Path) -> Sequence[str]:
        (folder / "train.tar").write_bytes(content)
        return "--data=WebDataset", f"--data.train={folder / 'train.tar'}", *more

    names = (
        "train.tar"
        if rule != "arguments"
        else {"class_names": "class", "val": "", "test": "", "train": ""}[title[7:].partition("=")[0]]
    )
    return _case("tar", seed, title, names, outcome, prepare)


def _spoil_folder(kind: str, root: Path, rng: random.Random) -> None:
    """Makes of a whole data set one of a kind that is not."""
    b = root / "train" / "b"
    place = b / "9.png"
    if kind == "no classes":
        (root / "train").mkdir()
        (root / "train" / "x.png").write_bytes(_png(1))
    elif kind in (
        "a class is empty",
        "only leftovers",
        "images are folders",
        "images are links to nothing",
        "a class is a file",
    ):
        for n in range(5):
            (b / f"{n}.png").unlink()
            if kind == "only leftovers":
                (b / f"._{n}.png").write_bytes(_png(n))
            elif kind == "images are folders":
                (b / f"{n}.png").mkdir()
            elif kind == "images are links to nothing":
                (b / f"{n}.png").symlink_to("nowhere")
        if kind == "a class is a file":
            b.rmdir()
            b.write_bytes(b"x")
    elif kind == "classes differ":
        (root / "val" / "c").mkdir(parents=True)
        (root / "val" / "c" / "1.png").write_bytes(_png(1))
    elif kind == "unreadable":
        b.chmod(0)
    elif kind == "a loop":
        (b / "again").symlink_to(root)
    elif kind == "pipes":
        os.mkfifo(place)
    elif kind == "a link to a device":
        place.symlink_to("/dev/zero")
    elif kind == "two splits":
        (root / "training" / "a").mkdir(parents=True)
    elif kind == "a broken image":
        place.write_bytes(_png(1)[: rng.randrange(60)])
    elif kind == "of another kind":
        place.write_bytes(json.dumps({"no": "image"}).encode())


def _folders(seed: int, rng: random.Random) -> Case:
    kinds = {
        "a file": "error", "an archive": "error", "empty": "error", "a class is empty": "error", "one class": "error",
        "a class is a file": "error", "classes differ": "error", "unreadable": "either", "images are folders": "error",
        "images are links to nothing": "error", "a loop": "either", "pipes": "error", "two splits": "error",
        "a broken image": "error", "of another kind": "error", "only leftovers": "error", "not UTF-8": "either",
        "control characters": "either", "no classes": "error", "not there": "error", "a link to a device": "error",
    }  # fmt: skip
    kind = list(kinds)[seed // 6 % len(kinds)]

    def prepare(folder: Path) -> Sequence[str]:
        root = folder / "images"
        if kind == "not there":
            return "--data=ImageFolder", f"--data.root={root}"
        if kind in ("a file", "an archive"):
            root.write_bytes(b"x" if kind == "a file" else b"PK\3\4" + bytes(40))
            return "--data=ImageFolder", f"--data.root={root}"
        names: list[Any] = ["a"] if kind == "one class" else ["a", "b"]
        names += {"not UTF-8": ["caf\udce9"], "control characters": ["\x1b[2J\n"]}.get(kind, [])
        for name in [] if kind in ("empty", "no classes") else names:
            (root / "train" / name).mkdir(parents=True)
            for n in range(5):
                (root / "train" / name / f"{n}.png").write_bytes(_png(n))
        root.mkdir(exist_ok=True)
        _spoil_folder(kind, root, rng)
        return "--data=ImageFolder", f"--data.root={root}"

    return _case("tar", seed, f"folders, {kind}", "images", kinds[kind], prepare)
