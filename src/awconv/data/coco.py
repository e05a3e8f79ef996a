"""Images with boxes in COCO's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from awconv.data.detection import Annotated, DetectionDataModule
from awconv.data.loading import Split

_PARTS = ("images", "annotations", "categories")


class Coco(DetectionDataModule):
    """Images with boxes in COCO's format, by default in COCO's own layout: ``root/train2017/*.jpg`` and
    ``root/annotations/instances_train2017.json``.

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
        ValueError: a file is not in COCO's format, or splits have different categories.
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
    def _training(self) -> dict[str, Any]:
        assert self.splits["train"] is not None
        return self._read(self.splits["train"])

    @cached_property
    def _named(self) -> dict[str, int]:
        """The numbers of the categories that are wanted, by their names."""
        return self._wanted(self._training)

    @property
    def classes(self) -> list[str]:
        return list(self._named)

    @property
    def category_ids(self) -> list[int]:
        return list(self._named.values())

    def _read(self, name: str) -> dict[str, Any]:
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
        missing = [part for part in _PARTS if not isinstance(content, dict) or part not in content]
        if missing:
            raise ValueError(f"{shown} is not in COCO's format: it has no {' and no '.join(missing)}")
        return dict(content)

    def _wanted(self, content: Mapping[str, Any]) -> dict[str, int]:
        named = {category["name"]: category["id"] for category in sorted(content["categories"], key=lambda c: c["id"])}
        if self.categories is None:
            return named
        unknown = [name for name in self.categories if name not in named]
        if unknown:
            raise ValueError(f"there is no category {', '.join(unknown)}; there are {', '.join(named)}")
        return {name: named[name] for name in self.categories}

    def open(self, split: Split) -> list[Annotated] | None:
        name = self.splits[split]
        if name is None:
            return None
        content = self._training if split == "train" else self._read(name)
        named = self._wanted(content)
        if named != self._named:
            differing = sorted(set(named.items()) ^ set(self._named.items()))
            raise ValueError(
                f"split {name} must have the categories of {self.splits['train']}; these are only in one of them, or "
                f"have another number there: {', '.join(f'{name} ({number})' for name, number in differing[:10])}"
            )
        label = {number: index + 1 for index, number in enumerate(named.values())}
        known = {category["id"] for category in content["categories"]}
        marked: dict[int, list[Mapping[str, Any]]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            what = f"annotation {annotation.get('id')} of split {name}"
            _check(annotation, ("image_id", "category_id", "bbox"), what)
            number = annotation["category_id"]
            if annotation["image_id"] not in marked or number not in known:
                raise ValueError(
                    f"{what} names image {annotation['image_id']} and category {number}, of which one is not in the "
                    "file"
                )
            if number in label:
                marked[annotation["image_id"]].append(annotation)
            elif split == "train":
                self.summary.other_boxes += 1
        for image in content["images"]:
            _check(image, ("file_name", "width", "height"), f"image {image['id']} of split {name}")
        folder = self.images.format(split=name)
        return [_annotated(image, marked[image["id"]], folder, label) for image in content["images"]]


def _check(entry: Mapping[str, Any], names: tuple[str, ...], what: str) -> None:
    missing = [name for name in names if name not in entry]
    if missing:
        raise ValueError(f"{what} is not in COCO's format: it has no {' and no '.join(missing)}")


def _annotated(
    image: Mapping[str, Any], marked: list[Mapping[str, Any]], folder: str, label: Mapping[int, int]
) -> Annotated:
    boxes = np.array([annotation["bbox"] for annotation in marked], float).reshape(-1, 4)
    areas = [annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3]) for annotation in marked]
    boxes[:, 2:] += boxes[:, :2]
    return Annotated(
        path=f"{folder}/{image['file_name']}" if folder else image["file_name"],
        image_id=image["id"],
        width=image["width"],
        height=image["height"],
        boxes=boxes,
        labels=np.array([label[annotation["category_id"]] for annotation in marked], int),
        areas=np.array(areas, float),
        crowd=np.array([annotation.get("iscrowd", 0) for annotation in marked], bool),
    )
