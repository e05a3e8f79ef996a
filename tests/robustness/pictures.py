"""Spoiled image files, and folders of them, for ``awconv predict``."""

from __future__ import annotations

import functools
import io
import os
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from PIL import Image

from awconv.tasks import DetectionTask
from tests.robustness.harness import Case, folder_of_this_process
from tests.robustness.weights import trained

FORMATS = {
    "PNG": "png",
    "JPEG": "jpg",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tiff",
    "WEBP": "webp",
    "AVIF": "avif",
    "JPEG2000": "jp2",
    "PPM": "ppm",
}


def picture(rng: random.Random, width: int = 24, height: int = 20) -> Image.Image:
    """Noise, of which no two lines are alike."""
    return Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))


def encoded(image: Image.Image, format: str = "PNG", **arguments: object) -> bytes:
    """The content of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **arguments)
    return buffer.getvalue()


@functools.cache
def detector() -> Path:
    """A checkpoint of a small detector that was not trained."""
    task = DetectionTask(["cat", "dog"], [1, 2], network="resnet8_cifar", min_size=32, max_size=64)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.strategy.connect(task)
    path = folder_of_this_process() / "detector.ckpt"
    trainer.save_checkpoint(path)
    return path


def _some(rng: random.Random) -> tuple[str, bytes]:
    """An image file's ending and content."""
    format, ending = rng.choice(list(FORMATS.items()))
    arguments = {"progressive": True} if format == "JPEG" and rng.random() < 0.5 else {}
    return ending, encoded(picture(rng), format, **arguments)


Spoiled = tuple[str, bytes, bool]
"""The ending and the content of a file, and whether it cannot be used."""


def _cut(rng: random.Random) -> Spoiled:
    ending, content = _some(rng)
    return ending, content[: rng.randrange(int(0.9 * len(content)))], True


def _flipped(rng: random.Random) -> Spoiled:
    ending, content = _some(rng)
    changed = bytearray(content)
    for _ in range(rng.choice([1, 2, 8, 30])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return ending, bytes(changed), False


def _header_flipped(rng: random.Random) -> Spoiled:
    ending, content = _some(rng)
    changed = bytearray(content)
    for _ in range(rng.choice([1, 2, 4])):
        changed[rng.randrange(min(64, len(changed)))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    return ending, bytes(changed), False


def _zeroed(rng: random.Random) -> Spoiled:
    ending, content = _some(rng)
    start = rng.randrange(len(content))
    zeros = bytes(min(rng.randrange(1, 300), len(content) - start))
    return ending, content[:start] + zeros + content[start + len(zeros) :], False


_POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(executed) (w) file closefile\nshowpage\n"
_OTHERS = (
    b"",
    b"\0" * 500,
    _POSTSCRIPT,
    b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 30, len(_POSTSCRIPT), 0, 0, 0, 0) + b"\xff\xff" + _POSTSCRIPT,
    b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
    b"<svg xmlns='http://www.w3.org/2000/svg'><image href='http://127.0.0.1:9/x'/></svg>",
    b"<!DOCTYPE html><html><body>404</body></html>",
    b"PK\3\4" + bytes(60),
    b"\x1f\x8b\x08" + bytes(40),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    b"8BPS\0\1" + bytes(60),
    b"\x89HDF\r\n\x1a\n" + bytes(60),
    b"\0\0\0\x20ftypheic\0\0\0\0mif1heic" + bytes(40),
    b"\0\0\0\x18ftypmp42" + bytes(40),
    b"DDS |\0\0\0" + bytes(120),
    b"id=ImageMagick\n:\x1a" + bytes(40),
    b"a,b\n1,2\n",
    b"\x00\x00\x01\x00\x01\x00\x10\x10" + bytes(60),
    b"SIMPLE  =                    T" + bytes(2880),
)


def _other(rng: random.Random) -> Spoiled:
    ending = rng.choice(list(FORMATS.values()))
    content = rng.choice([*_OTHERS, rng.randbytes(300)])
    return ending, content, True


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *others: tuple[bytes, bytes]) -> bytes:
    """A PNG file of any header, with packed rows and further chunks."""
    chunks = [(b"IHDR", struct.pack(">2I5B", width, height, bits, colour, 0, 0, 0)), *others]
    chunks += [(b"IDAT", rows), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


def _huge(rng: random.Random) -> Spoiled:
    """Headers of more pixels than there is memory for."""
    side = rng.choice([60_000, 65_500, 30_000, 8_200])
    kind = rng.choice(["png", "bmp", "tiff", "gif", "ppm", "jpg", "jp2"])
    if kind == "png":
        bits, colour = rng.choice([(8, 2), (16, 6), (1, 0), (8, 3), (16, 0)])
        palette = [(b"PLTE", bytes(768))] if colour == 3 else []
        return kind, png(side, side, bits, colour, zlib.compress(bytes(10**5)), *palette), True
    if kind == "bmp":
        depth = rng.choice([1, 8, 24, 32])
        info = struct.pack("<IiiHHIIiiII", 40, side, side, 1, depth, rng.choice([0, 1]), 0, 0, 0, 0, 0)
        return kind, b"BM" + struct.pack("<IHHI", 1000, 0, 0, 54) + info + bytes(2000), True
    if kind == "tiff":
        tags = [(256, 4, side), (257, 4, side), (258, 3, rng.choice([1, 8, 16])), (259, 3, rng.choice([1, 5, 8]))]
        tags += [(262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, side), (279, 4, 2**31)]
        entries = b"".join(struct.pack("<HHII", tag, type, 1, value) for tag, type, value in tags)
        return kind, b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(200), True
    if kind == "gif":
        size = struct.pack("<HH", side, side)
        return kind, b"GIF89a" + size + b"\x80\0\0" + bytes(6) + b"," + bytes(4) + size + b"\0\2\2\x44\1\0;", True
    if kind == "ppm":
        return kind, b"P%d %d %d 255\n" % (rng.choice([5, 6]), side, side) + bytes(500), True
    content = bytearray(encoded(picture(rng), "JPEG" if kind == "jpg" else "JPEG2000"))
    if kind == "jpg":
        at = content.index(b"\xff\xc0") + 5
        content[at : at + 4] = struct.pack(">HH", side, side)
    else:
        at = content.index(b"ihdr") + 4
        content[at : at + 8] = struct.pack(">II", side, side)
        at = content.index(b"\xff\x51") + 6
        content[at : at + 8] = struct.pack(">II", side, side)
    return kind, bytes(content), True


def _bomb(rng: random.Random) -> Spoiled:
    """Few bytes that become many: pixels, texts, profiles."""
    kind = rng.choice(["pixels", "text", "profile", "international text", "one line"])
    if kind == "pixels":  # one more than may be
        side, bits, colour = 8193, *rng.choice([(8, 0), (1, 0)])
        return "png", png(side, side, bits, colour, zlib.compress(bytes((1 + side * bits // 8) * side), 1)), True
    if kind == "one line":
        width = rng.choice([2**31 - 1, 2**26, 2**31, 2**32 - 1, 0])
        return "png", png(width, 1, 8, 0, zlib.compress(bytes(1000))), True
    bomb = zlib.compress(bytes(3 * 10**8 if kind == "profile" else 10**8), 1)
    head = {"text": b"a\0\0", "profile": b"a\0\0", "international text": b"a\0\1\0\0\0"}[kind]
    name = {"text": b"zTXt", "profile": b"iCCP", "international text": b"iTXt"}[kind]
    return "png", png(4, 4, 8, 0, zlib.compress(bytes(5 * 4)), (name, head + bomb)), False


def _large(rng: random.Random) -> Spoiled:
    """As many pixels as may be, which must fit into memory."""
    bits, colour, channels = rng.choice([(8, 2, 3), (16, 0, 2), (8, 6, 4), (16, 2, 6), (1, 0, 1 / 8)])
    side = 8192
    packer, line = zlib.compressobj(1), bytes(int(1 + side * channels))
    rows = b"".join([*(packer.compress(line) for _ in range(side)), packer.flush()])
    return "png", png(side, side, bits, colour, rows), False


def _long(rng: random.Random) -> Spoiled:
    sides = [60_000, rng.choice([1, 1, 2, 7])]
    rng.shuffle(sides)
    ending = rng.choice(["png", "jpg", "tiff", "bmp"])
    image = Image.new(rng.choice(["L", "RGB"]), sides, 99)
    return ending, encoded(image, {v: k for k, v in FORMATS.items()}[ending]), False


def _mode(rng: random.Random) -> Spoiled:
    noise = np.random.default_rng(rng.randrange(2**32))
    mode = rng.choice(
        ["1", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I", "F", "nan", "float16"]
    )
    if mode in ("I", "F", "nan"):
        values = noise.normal(0, 1e6, (9, 9)).astype(np.int32 if mode == "I" else np.float32)
        if mode == "nan":
            values[2, 3] = rng.choice([np.nan, np.inf])
        return "tiff", encoded(Image.fromarray(values), "TIFF"), True
    if mode.startswith("I;16"):
        image = Image.fromarray(noise.integers(0, 2**16, (9, 9)).astype(">u2" if mode == "I;16B" else "<u2"))
        format = rng.choice(["PNG", "TIFF", "PPM", "JPEG2000"]) if mode == "I;16" else "TIFF"
        return FORMATS[format], encoded(image, format), False
    if mode == "float16":
        return "tiff", encoded(picture(rng), "TIFF").replace(struct.pack("<HHI", 258, 3, 3), b"\xff" * 8), False
    format = "JPEG" if mode in ("CMYK", "YCbCr") else "TIFF" if mode in ("LAB", "PA") else "PNG"
    image = picture(rng)
    image = Image.new(mode, (9, 9)) if mode in ("LAB", "PA") else image.convert(mode)
    try:
        return FORMATS[format], encoded(image, format), False
    except OSError:  # which Pillow cannot write
        return "png", encoded(image.convert("RGB")), False


def _exif(rng: random.Random) -> Spoiled:
    notes = Image.Exif()
    notes[0x0112] = rng.choice([0, 6, 9, 65535])
    notes[0x010F] = "a camera\x1b[2J"
    content = bytearray(notes.tobytes())
    for _ in range(rng.choice([0, 1, 3, 12])):
        content[rng.randrange(6, len(content))] = rng.choice([0, 0xFF, rng.randrange(256)])
    format = rng.choice(["JPEG", "PNG", "WEBP", "TIFF"])  # to AVIF, Pillow writes none that are damaged
    given = notes if format == "TIFF" else bytes(content[: rng.choice([6, 20, None, None])])
    return FORMATS[format], encoded(picture(rng), format, exif=given), False


def _animated(rng: random.Random) -> Spoiled:
    format = rng.choice(["GIF", "PNG", "WEBP", "TIFF"])
    frames = [picture(rng) for _ in range(rng.choice([2, 30]))]
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=40)
    if rng.random() < 0.6:  # often in a later frame
        content = content[: rng.randrange(len(content) // 2, len(content))]
    return FORMATS[format], content, False


_RULES: tuple[Callable[[random.Random], Spoiled], ...] = (
    _cut, _cut, _flipped, _header_flipped, _header_flipped, _zeroed, _other, _other, _huge, _huge, _bomb, _long,
    _mode, _exif, _animated, _large,
)  # fmt: skip
# Bytes of a name, and how they are printed.
_NAMES = {
    b"a": "a",
    b"two words": "two words",
    b"[bold]b": "[bold]b",
    b"[0-9]*?": "[0-9]*?",
    b"\x1b[2Jc": r"\x1b[2Jc",
    b"line\nbreak": r"line\nbreak",
    b"caf\xe9": r"caf\xe9",
    "\u202ed".encode(): r"\u202ed",
    b"n" * 240: "n" * 240,
    b"%s{0}$HOME`x`": "%s{0}$HOME`x`",
    b"~": "~",
    b"-x": "-x",
}


_PLACES = ("pipe", "dangling", "loop", "linked device", "device", "folder", "empty folder", "missing")


def images(seed: int) -> Case:
    """An image file that is damaged, of another kind, too large, or none, alone or in a folder with a good one."""
    rng = random.Random(f"images {seed}")
    arguments = rng.choice([[], [], ["--format=json"], ["--batch_size=1"], ["--format=json", "--batch_size=2"]])
    command = ["predict", f"--ckpt={detector() if rng.random() < 0.25 else trained()}", *arguments]
    turn = seed % (len(_RULES) + 1)
    if turn == len(_RULES):
        return _place(seed, command, rng)
    name, shown = rng.choice(list(_NAMES.items()))
    ending, content, wrong = _RULES[turn](rng)
    file, beside = name + b"." + ending.encode(), rng.random() < 0.4

    def prepare(folder: Path) -> Sequence[str]:
        (folder / "pictures").mkdir()
        Path(os.fsdecode(os.path.join(os.fsencode(folder), b"pictures", file))).write_bytes(content)
        if beside:
            (folder / "pictures" / "good.png").write_bytes(encoded(Image.new("L", (9, 9))))
            return [*command, "pictures"]
        return [*command, os.fsdecode(b"pictures/" + file)]

    names = (f"{shown}.{ending}: ", *(["good.png"] if beside else []))
    title = f"images {seed}: {_RULES[turn].__name__}, {file!r}"
    return Case(title, prepare, names, "error" if wrong else "either")


def _place(seed: int, command: Sequence[str], rng: random.Random) -> Case:
    """Something under an image's name that is no file of its own."""
    kind = rng.choice(_PLACES)
    given = "/dev/zero" if kind == "device" else rng.choice(["a.png", "./a.png"])

    def prepare(folder: Path) -> Sequence[str]:
        path = folder / "a.png"
        if kind == "pipe":
            os.mkfifo(path)
        elif kind in ("folder", "empty folder"):
            path.mkdir()
            if kind == "folder":
                (path / "b.txt").write_text("no image")
                (path / "again").symlink_to(path)
        elif kind in ("dangling", "loop", "linked device"):
            path.symlink_to({"dangling": "nowhere", "loop": "a.png", "linked device": "/dev/zero"}[kind])
        return [*command, given]

    return Case(f"images {seed}: {kind}", prepare, given.removeprefix("./"))


_TARGETS = (
    "file", "file/below", "pictures", "pictures/a.png", "pictures/a.png/below", "link to the pictures",
    "link to a file", "dangling", "loop", "drawn",
    "drawn/taken", "drawn/linked", "drawn/folder", "/dev/null", "/proc/awconv", "n" * 300,
    "\x1b[2Jd", "", "drawn/hard link",
)  # fmt: skip


def drawing(seed: int) -> Case:
    """A place for copies with boxes where files of somebody are, or where none can be."""
    rng = random.Random(f"drawing {seed}")
    target = _TARGETS[seed % len(_TARGETS)]
    given = rng.choice([["pictures"], ["pictures/a.png"], ["pictures/a.png", "pictures/b.png"], ["pictures", "more"]])
    threshold = rng.choice(["--threshold=0", "--threshold=0.5", "--threshold=1"])

    def prepare(folder: Path) -> Sequence[str]:
        for name in ("pictures/a.png", "pictures/b.png", "more/a.png", "more/b.jpg"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(encoded(picture(rng), "JPEG" if name.endswith("jpg") else "PNG"))
        (folder / "file").write_text("somebody's")
        (folder / "link to the pictures").symlink_to("pictures")
        (folder / "link to a file").symlink_to("file")
        (folder / "dangling").symlink_to("nowhere")
        (folder / "loop").symlink_to("loop")
        drawn = folder / "drawn"
        drawn.mkdir()
        for path in (drawn / name for name in ("a.png", "b.png", "pictures_a.png", "more_a.png")):
            if target == "drawn/taken":
                path.write_bytes(encoded(picture(rng)))
            elif target == "drawn/linked":
                path.symlink_to(rng.choice(["../pictures/b.png", "../file", "../nowhere"]))
            elif target == "drawn/hard link":
                path.hardlink_to(folder / "file")
            elif target == "drawn/folder":
                path.mkdir()
        place = "drawn" if target.startswith("drawn/") else target
        return ["predict", f"--ckpt={detector()}", f"--draw={place}", threshold, *given]

    harmless = target in ("\x1b[2Jd", "drawn", "", "dangling")
    names = {"\x1b[2Jd": r"\x1b[2Jd", "": "draw"}.get(
        target, target.partition("/")[0] if target[0:1] != "/" else target
    )
    return Case(f"drawing {seed}: {target[:20]!r}, {given}", prepare, names, "either" if harmless else "error")
