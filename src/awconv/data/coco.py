"""Images with boxes in COCO's format."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from awconv.data.detection import Annotated, DetectionDataModule
from awconv.data.loading import Split


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


_Kind = tuple[Callable[[Any], bool], str]
_NUMBER: _Kind = (lambda value: isinstance(value, int), "a whole number")
_TEXT: _Kind = (lambda value: isinstance(value, str), "text")
_BOX: _Kind = (
    lambda value: isinstance(value, list) and len(value) == 4 and all(map(_is_finite, value)),
    "x, y, width and height in pixels",
)
_FIELDS: dict[str, dict[str, _Kind]] = {
    "images": {"id": _NUMBER, "file_name": _TEXT, "width": _NUMBER, "height": _NUMBER},
    "annotations": {"image_id": _NUMBER, "category_id": _NUMBER, "bbox": _BOX},
    "categories": {"id": _NUMBER, "name": _TEXT},
}


class Coco(DetectionDataModule):
    """Images with boxes in COCO's format, by default in COCO's own layout: ``root/train2017/*.jpg`` and
    ``root/annotations/instances_train2017.json``. An annotation without an area has that of its box.

    Args:
        root: the folder, or a zip archive of it.
        train: name of the training split.
        val: the same; None holds out ``val_fraction`` of the training split.
        test: the same; None tests on the validation split.
        images: the folder of a split's images, under ``root``; ``{split}`` stands for the name of the split.
        annotations: the same, for the file of its annotations.
        **kwargs: as for :class:`DetectionDataModule`.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ValueError: a file is not in COCO's format, splits have different categories, or one that is asked for is not
            there.
    """

    def __init__(
        self,
        root: Path,
        train: str = "train2017",
        val: str | None = None,
        test: str | None = None,
        images: str = "{split}",
        annotations: str = "annotations/instances_{split}.json",
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        self.splits: dict[Split, str | None] = {"train": train, "val": val, "test": test}
        self.images, self.annotations = images, annotations

    @cached_property
    def _training(self) -> tuple[dict[str, int], list[Annotated]]:
        assert self.splits["train"] is not None
        return self._read(self.splits["train"])

    @property
    def classes(self) -> list[str]:
        return list(self._training[0])

    @property
    def category_ids(self) -> list[int]:
        return list(self._training[0].values())

    def open(self, split: Split) -> list[Annotated] | None:
        name = self.splits[split]
        if name is None:
            return None
        if split == "train":
            return self._training[1]
        (expected, _), (named, images) = self._training, self._read(name)
        if named != expected:
            differing = sorted(set(named.items()) ^ set(expected.items()))
            raise ValueError(
                f"split {name} must have the categories of {self.splits['train']}; these are only in one of them, or "
                f"have another number there: {', '.join(f'{name} ({number})' for name, number in differing[:10])}"
            )
        return images

    def _read(self, name: str) -> tuple[dict[str, int], list[Annotated]]:
        """The numbers of the categories that are wanted, by their names, and the images of a split."""
        content = self._content(name)
        named = self._wanted(content["categories"])
        label = {number: index + 1 for index, number in enumerate(named.values())}
        known = {category["id"] for category in content["categories"]}
        marked: dict[int, list[Mapping[str, Any]]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            number = annotation["category_id"]
            if annotation["image_id"] not in marked or number not in known:
                raise ValueError(
                    f"annotation {annotation.get('id')} of split {name} names image {annotation['image_id']} and "
                    f"category {number}, of which one is not in the file"
                )
            marked[annotation["image_id"]].append(annotation)
        folder = self.images.format(split=name)
        return named, [_annotated(image, marked[image["id"]], folder, label) for image in content["images"]]

    def _content(self, name: str) -> dict[str, list[dict[str, Any]]]:
        path = self.annotations.format(split=name)
        shown = self.files.name(path)
        try:
            content = json.loads(self.files.read(path))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"annotations {shown} are not there; give --data.annotations and --data.images if the layout is "
                "another one than COCO's"
            ) from error
        except ValueError as error:
            raise ValueError(f"{shown} is no JSON: {error}") from error
        missing = [part for part in _FIELDS if not isinstance(content, dict) or part not in content]
        if missing:
            raise ValueError(f"{shown} is not in COCO's format: it has no {' and no '.join(missing)}")
        for part in _FIELDS:
            _check_entries(content[part], part, name)
        for part, key in (("images", "id"), ("categories", "id"), ("categories", "name")):
            ((value, count),) = Counter(entry[key] for entry in content[part]).most_common(1) or [("", 0)]
            if count > 1:
                raise ValueError(f"split {name}: {count} {part} have the {key} {value!r}, of which there must be one")
        return dict(content)

    def _wanted(self, categories: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        named = {category["name"]: category["id"] for category in sorted(categories, key=lambda c: c["id"])}
        if self.categories is None:
            return named
        unknown = [name for name in self.categories if name not in named]
        if unknown:
            raise ValueError(f"there is no category {', '.join(unknown)}; there are {', '.join(named)}")
        return {name: named[name] for name in self.categories}


def _check_entries(entries: Any, part: str, split: str) -> None:
    """Raises a ValueError that names what is not in COCO's format."""
    if not isinstance(entries, list):
        raise ValueError(f"split {split} is not in COCO's format: {part} must be a list, got {entries!r:.40}")
    one = {"images": "image", "annotations": "annotation", "categories": "category"}[part]
    for position, entry in enumerate(entries):
        number = entry.get("id", f"at position {position}") if isinstance(entry, dict) else f"at position {position}"
        what = f"{one} {number} of split {split} is not in COCO's format"
        if not isinstance(entry, dict):
            raise ValueError(f"{what}: it must be an object, got {entry!r:.40}")
        missing = [name for name in _FIELDS[part] if name not in entry]
        if missing:
            raise ValueError(f"{what}: it has no {' and no '.join(missing)}")
        for name, (is_right, kind) in _FIELDS[part].items():
            if not is_right(entry[name]):
                raise ValueError(f"{what}: {name} must be {kind}, got {entry[name]!r:.80}")


def _annotated(
    image: Mapping[str, Any], marked: list[Mapping[str, Any]], folder: str, label: Mapping[int, int]
) -> Annotated:
    wanted = [annotation for annotation in marked if annotation["category_id"] in label]
    boxes = np.array([annotation["bbox"] for annotation in wanted], float).reshape(-1, 4)
    given: list[Any] = [annotation.get("area") for annotation in wanted]
    areas = [area if _is_finite(area) and area > 0 else w * h for area, (_, _, w, h) in zip(given, boxes, strict=True)]
    boxes[:, 2:] += boxes[:, :2]
    return Annotated(
        path=f"{folder}/{image['file_name']}" if folder else image["file_name"],
        image_id=image["id"],
        width=image["width"],
        height=image["height"],
        boxes=boxes,
        labels=np.array([label[annotation["category_id"]] for annotation in wanted], int),
        areas=np.array(areas, float),
        crowd=np.array([annotation.get("iscrowd", 0) for annotation in wanted], bool),
        others=len(marked) - len(wanted),
    )
