"""Two photographs that scikit-learn ships, with boxes, written in the layouts of COCO and VOC."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_sample_images

SHRINK = 4  # so that tests take seconds
SIZE = (640 // SHRINK, 427 // SHRINK)
CATEGORIES = {"temple": 3, "flower": 7, "tree": 10}  # with gaps between their numbers, as COCO's have
# x1, y1, x2, y2 in pixels of the whole photographs, by hand; the last rows are lost when they are made small.
SEEN = {
    "china": [("temple", (62, 29, 372, 410)), ("tree", (548, 135, 640, 424))],
    "flower": [("flower", (169, 85, 446, 360)), ("flower", (288, 374, 468, 424))],
}


def photograph(name: str) -> Image.Image:
    """A photograph, made small."""
    whole = load_sample_images().images[list(SEEN).index(name)]
    return Image.fromarray(whole).resize(SIZE)


def boxes(name: str) -> list[tuple[str, tuple[float, ...]]]:
    """The names and boxes of what is seen in a small photograph."""
    return [(category, tuple(edge / SHRINK for edge in box)) for category, box in SEEN[name]]


def annotations() -> dict[str, Any]:
    """COCO's annotations of the small photographs."""
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name} for name, number in CATEGORIES.items()],
    }
    for image_id, name in enumerate(SEEN, 40):
        content["images"].append({"id": image_id, "file_name": f"{name}.png", "width": SIZE[0], "height": SIZE[1]})
        for category, box in boxes(name):
            annotate(content, image_id, category, box)
    return content


def annotate(content: dict[str, Any], image_id: int, category: str, box: tuple[float, ...], **more: Any) -> None:
    """Adds a box, given by its corners."""
    left, top, right, bottom = box
    content["annotations"].append(
        {
            "id": len(content["annotations"]) + 1,
            "image_id": image_id,
            "category_id": CATEGORIES[category],
            "bbox": [left, top, right - left, bottom - top],
            "area": (right - left) * (bottom - top),
            "iscrowd": 0,
            **more,
        }
    )


def write_coco(root: Path, content: dict[str, Any] | None = None, split: str = "train2017") -> Path:
    """Writes a data set in COCO's layout, and returns its folder."""
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    for name in SEEN:
        photograph(name).save(root / split / f"{name}.png")
    file = root / "annotations" / f"instances_{split}.json"
    file.write_text(json.dumps(content or annotations()))
    return root
