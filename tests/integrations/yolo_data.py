"""Small data sets in the layout of Ultralytics."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def coco128(archive: Path, folder: Path, count: int) -> Path:
    """The first images of coco128, whose boxes are [x, y, width, height] in pixels, and the YAML file of the set."""
    with zipfile.ZipFile(archive) as file:
        coco = json.loads(file.read("annotations/instances_train2017.json"))
        classes = {category["id"]: index for index, category in enumerate(coco["categories"])}
        for image in coco["images"][:count]:
            boxes = []
            for found in coco["annotations"]:
                if found["image_id"] == image["id"]:
                    x, y, width, height = found["bbox"]
                    box = (x + width / 2, y + height / 2, width, height)
                    sizes = (image["width"], image["height"]) * 2
                    boxes.append(
                        (classes[found["category_id"]], *(v / size for v, size in zip(box, sizes, strict=True)))
                    )
            _write(folder, image["file_name"], file.read(f"train2017/{image['file_name']}"), boxes)
    return _described(folder, [category["name"] for category in coco["categories"]])


def rectangles(folder: Path, count: int, names: list[str]) -> Path:
    """Noise of 64x64 pixels with a bright rectangle in each."""
    generator = np.random.default_rng(0)
    for index in range(count):
        pixels = generator.integers(0, 128, (64, 64, 3), dtype=np.uint8)
        pixels[16:48, 8:40] = 255
        (folder / "drawn").mkdir(parents=True, exist_ok=True)
        file = folder / "drawn" / f"{index}.png"
        Image.fromarray(pixels).save(file)
        _write(folder, file.name, file.read_bytes(), [(index % len(names), 24 / 64, 0.5, 0.5, 0.5)])
    return _described(folder, names)


def _write(folder: Path, name: str, image: bytes, boxes: list[tuple[float, ...]]) -> None:
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "images" / name).write_bytes(image)
    lines = [" ".join(map(str, box)) for box in boxes]
    (folder / "labels" / name).with_suffix(".txt").write_text("\n".join(lines))


def _described(folder: Path, names: list[str]) -> Path:
    described = folder / "data.yaml"
    described.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: {json.dumps(names)}\n")
    return described
