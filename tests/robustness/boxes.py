"""Spoiled data sets with boxes, in the formats of COCO and VOC."""

from __future__ import annotations

import copy
import functools
import io
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.robustness.commands import FIT, named, retyped, something_was_trained, with_options
from tests.robustness.harness import Case

IMAGES = 4
WIDTH, HEIGHT = 48, 36
NAMES = ("boat", "buoy")
_SMALL = (
    "--model.network=test_resnet",
    "--model.norm=batch",
    "--model.min_size=32",
    "--model.max_size=64",
    "--model.detector_args={out_channels: 32, box_batch_size_per_image: 16, rpn_batch_size_per_image: 16, "
    "rpn_pre_nms_top_n_train: 50, rpn_post_nms_top_n_train: 20, rpn_pre_nms_top_n_test: 50, "
    "rpn_post_nms_top_n_test: 20}",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--data.num_workers=0",
    "--data.root=data",
)
COCO = (*FIT[:-1], "--data=Coco", *_SMALL, "--data.train=train", "--data.val_fraction=0.25")
VOC = (*FIT[:-1], "--data=Voc", *_SMALL, "--data.train=VOC2007/trainval", "--data.test=null")
VOC += (
    "--data.val_fraction=0.25",
    f"--data.categories=[{', '.join(NAMES)}]",
)


@functools.cache
def picture(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """A PNG file with a rectangle in it."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = 200
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def a_coco() -> dict[str, Any]:
    """COCO's annotations of the images."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(IMAGES)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": i % 2 + 1, "bbox": [8, 6, 20.5, 15], "area": 307.5, "iscrowd": 0}
            for i in range(IMAGES)
        ],
        "categories": [{"id": i, "name": name, "supercategory": "sea"} for i, name in enumerate(NAMES, 1)],
    }


def coco_files() -> dict[str, bytes]:
    """The files of a data set in COCO's format, by their paths."""
    images = {f"train/{i}.png": picture(i) for i in range(IMAGES)}
    return images | {"annotations/instances_train.json": json.dumps(a_coco(), indent=1).encode()}


def an_xml(name: str) -> str:
    """VOC's annotations of an image."""
    return (
        f"<annotation>\n<folder>VOC2007</folder>\n<filename>x.jpg</filename>\n<size>\n<width>{WIDTH}</width>\n"
        f"<height>{HEIGHT}</height>\n<depth>3</depth>\n</size>\n<object>\n<name>{name}</name>\n<difficult>0</difficult>"
        "\n<bndbox>\n<xmin>9</xmin>\n<ymin>7</ymin>\n<xmax>28.5</xmax>\n<ymax>21</ymax>\n</bndbox>\n</object>\n"
        "</annotation>\n"
    )


def voc_files() -> dict[str, bytes]:
    """The files of a data set in VOC's format, by their paths."""
    files = {"VOC2007/ImageSets/Main/trainval.txt": "".join(f"{i}\n" for i in range(IMAGES)).encode()}
    for i in range(IMAGES):
        files[f"VOC2007/JPEGImages/{i}.jpg"] = picture(i)
        files[f"VOC2007/Annotations/{i}.xml"] = an_xml(NAMES[i % 2]).encode()
    return files


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Writes files below a folder."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e308", "1" + "0" * 400, "9" * 5000, "-1", "0", "true")
_NUMBERS += (
    '"0"',
    '"text"',
    "null",
    "[]",
    "{}",
    "[[1]]",
    "0.5",
    "-1e-320",
    "9223372036854775808",
    '"\\ud800"',
    '"\\u0000"',
)


def _number(content: bytes, rng: random.Random) -> bytes:
    """One number in JSON becomes another value."""
    text = json.dumps(a_coco())
    places = [place for place, character in enumerate(text) if character.isdigit() and text[place - 1] in " ["]
    start = rng.choice(places)
    end = start
    while text[end].isdigit() or text[end] == ".":
        end += 1
    return (text[:start] + rng.choice(_NUMBERS) + text[end:]).encode()


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) - 2)]


def flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 5])):
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _misspelt(content: bytes, rng: random.Random) -> bytes:
    key = rng.choice(
        [
            b"images",
            b"annotations",
            b"categories",
            b"file_name",
            b"bbox",
            b"image_id",
            b"category_id",
            b'"id"',
            b'"name"',
        ]
    )
    return content.replace(key, key[:-2] + b"q" + key[-2:])


def _retyped(content: bytes, rng: random.Random) -> bytes:
    return json.dumps(retyped(a_coco(), rng)).encode()


def _deep(content: bytes, rng: random.Random) -> bytes:
    depth = 10 ** rng.randint(4, 6)
    opened, closed = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    nested = opened * depth + (b"1" if opened != b"[" else b"") + closed * depth
    return rng.choice([nested, content.replace(b'"bbox": [', b'"bbox": ' + nested + b', "x": [', 1)])


def _other(content: bytes, rng: random.Random) -> bytes:
    return rng.choice(
        [b"", b"[]", b"{}", b"null", b"3", b"\xff\xfe\x00", b"\x80" * 50, b"<xml/>", b'"' + b"\xed\xa0\x80" + b'"']
    )


def _shape(content: bytes, rng: random.Random) -> bytes:
    """A file of the right types that contradicts itself."""
    spoiled = copy.deepcopy(a_coco())
    images, marked, categories = spoiled["images"], spoiled["annotations"], spoiled["categories"]
    rng.choice(
        [
            lambda: images[1].update(id=0),
            lambda: marked[1].update(id=0),
            lambda: marked[1].update(image_id=77),
            lambda: marked[1].update(category_id=77),
            lambda: categories[1].update(id=1),
            lambda: categories[1].update(name="boat"),
            lambda: categories[1].update(name=" "),
            lambda: categories.clear(),
            lambda: images.clear(),
            lambda: marked.clear(),
            lambda: images[1].update(width=WIDTH + 1),
            lambda: images[1].update(file_name="../../../etc/passwd"),
            lambda: images[1].update(file_name="/dev/zero"),
            lambda: images[1].update(file_name="none.png"),
            lambda: images[1].update(file_name="n" * 5000),
            lambda: images[1].update(file_name="\x00\x1b[2J"),
            lambda: [one.update(bbox=[900, 900, 20, 20]) for one in marked],
            lambda: [one.update(bbox=[0.1, 0.1, 0.3, 0.3]) for one in marked],
            lambda: [one.update(iscrowd="0") for one in marked],
        ]
    )()
    return json.dumps(spoiled).encode()


_JSON: dict[str, tuple[Callable[[bytes, random.Random], bytes], bool]] = {  # whether it cannot be used
    "a number": (_number, False),
    "retyped": (_retyped, False),
    "cut": (cut, True),
    "flipped": (flipped, False),
    "misspelt": (_misspelt, True),
    "deep": (_deep, True),
    "of another kind": (_other, True),
    "contradictory": (_shape, True),
}


def _image(files: dict[str, bytes], path: str, rng: random.Random) -> None:
    """Spoils one of the images."""
    rule = rng.randrange(6)
    if rule == 0:
        del files[path]
        return
    contents = [
        lambda: cut(files[path], rng),
        lambda: picture(0, HEIGHT + 3, WIDTH),
        lambda: b"%!PS-Adobe-3.0\n(executed) (w) file closefile\n" * 9,
        lambda: b"",
        lambda: picture(0, 6000, 1),
    ]
    files[path] = contents[rule - 1]()


def coco(seed: int) -> Case:
    """A data set in COCO's format of which one file was damaged, retyped, or contradicts another."""
    rng = random.Random(f"coco {seed}")
    rule = [*_JSON, "an image"][seed % (len(_JSON) + 1)]

    def prepare(folder: Path) -> Sequence[str]:
        files, path = coco_files(), "annotations/instances_train.json"
        if rule == "an image":
            _image(files, f"train/{rng.randrange(IMAGES)}.png", rng)
        else:
            files[path] = _JSON[rule][0](files[path], rng)
        write(folder / "data", files)
        return COCO

    wrong = rule == "an image" or _JSON[rule][1]
    return Case(f"coco {seed}: {rule}", prepare, "train", "error" if wrong else "either", something_was_trained)


_TEXTS = ("", "nan", "inf", "-inf", "1e999", "1e308", "-1", "0", "1_0", "true", "yes", "2", "text", "9" * 5000, "<a/>")
_ENTITIES = '<!DOCTYPE a [<!ENTITY a0 "xxxxxxxxxx">' + "".join(
    f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10)
)


def _element(text: str, rng: random.Random) -> str:
    """One element's text becomes another."""
    lines = [line for line in text.splitlines() if "</" in line and not line.startswith("</")]
    line = rng.choice(lines)
    tag = line[1 : line.index(">")]
    return text.replace(line, f"<{tag}>{rng.choice(_TEXTS)}</{tag}>")


def _without_element(text: str, rng: random.Random) -> str:
    line = rng.choice([line for line in text.splitlines() if line.startswith(("<xm", "<ym", "<name"))])
    return text.replace(line, "")


def _renamed(text: str, rng: random.Random) -> str:
    tag = rng.choice(["annotation", "bndbox", "xmin", "ymax", "name"])
    return text.replace(f"{tag}>", f"{tag}q>")


def _laughs(text: str, rng: random.Random) -> str:
    return rng.choice(
        [
            _ENTITIES + "]>" + text.replace("x.jpg", "&a9;"),
            '<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + text.replace("x.jpg", "&a;"),
            '<!DOCTYPE a SYSTEM "http://127.0.0.1:9/a.dtd">' + text,
            text.replace("x.jpg", "&a;"),
        ]
    )


def _nested(text: str, rng: random.Random) -> str:
    depth = 10 ** rng.randint(4, 6)
    return "<annotation>" + "<object>" * depth + rng.choice(["", "</object>" * depth + "</annotation>"])


def _encoded(text: str, rng: random.Random) -> str:
    return f'<?xml version="1.0" encoding="{rng.choice(["utf-7", "gb2312", "x"])}"?>{text}'


_XML: dict[str, tuple[Callable[[str, random.Random], str], bool]] = {
    "an element": (_element, False),
    "without an element": (_without_element, True),
    "renamed": (_renamed, True),
    "entities": (_laughs, True),
    "nested": (_nested, True),
    "of another kind": (lambda text, rng: rng.choice(["", "{}", "<html></html>", "\x00" * 50, "text"]), True),
    "in an encoding": (_encoded, True),
}
_LISTS = (b"", b"\n \n", b"none\n", b"\xff\xfe0\n", b"../../../../etc/passwd\n", b"0 1 2 3\n", b"n" * 5000, b"\x00")
_LISTS += (b"/etc/passwd\n", b"0 7\n", b"\x1b[2J\n")
_ENTRIES = ("VOC2012/trainval", "trainval", "[]", "[[]]", "/etc", "..", "", "null")


def voc(seed: int) -> Case:
    """A data set in VOC's format of which one file was damaged, or contradicts another."""
    rng = random.Random(f"voc {seed}")
    rules = [*_XML, "cut", "flipped", "an image", "a list", "an entry"]
    rule = rules[seed % len(rules)]

    def prepare(folder: Path) -> Sequence[str]:
        files, number = voc_files(), rng.randrange(IMAGES)
        path, given = f"VOC2007/Annotations/{number}.xml", list(VOC)
        if rule in _XML:
            files[path] = _XML[rule][0](files[path].decode(), rng).encode()
        elif rule == "an image":
            _image(files, f"VOC2007/JPEGImages/{number}.jpg", rng)
        elif rule == "a list":
            files["VOC2007/ImageSets/Main/trainval.txt"] = rng.choice(_LISTS)
        elif rule == "an entry":
            given.append(f"--data.train={rng.choice(_ENTRIES)}")
        else:
            files[path] = (cut if rule == "cut" else flipped)(files[path], rng)
        write(folder / "data", files)
        return given

    harmless = rule == "flipped" or (rule in _XML and not _XML[rule][1])
    return Case(f"voc {seed}: {rule}", prepare, "data", "either" if harmless else "error", something_was_trained)


DETECTORS_OPTIONS = with_options(
    [f"model.{name}" for name in ("min_size", "max_size", "trainable_layers", "norm", "detector", "detector_args")]
    + [f"data.{name}" for name in ("categories", "val_fraction", "augmentation", "jitter_size", "images_without_boxes")]
    + [f"data.{name}" for name in ("batch_size", "max_pixels", "max_annotations", "inspect", "train", "val")]
)


def detectors_options(seed: int) -> Case:
    """A value out of range, or of another type, for one option that only a detector or its data have."""
    name, value = DETECTORS_OPTIONS[seed]

    def prepare(folder: Path) -> Sequence[str]:
        write(folder / "data", coco_files())
        return *COCO, f"--{name}={value}".replace("\x00", "\\0")

    return Case(
        f"detectors_options {seed}: --{name}={value[:40]!r}",
        prepare,
        named(name, value),
        "either",
        something_was_trained,
    )
