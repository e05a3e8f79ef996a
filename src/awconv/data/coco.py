"""Images with boxes in COCO's format."""

from __future__ import annotations

import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from awconv.data.boxes import Annotated, is_id, is_number, size
from awconv.data.detection import DetectionDataModule
from awconv.data.files import Files, composed, leads_out
from awconv.data.loading import Split
from awconv.roles import Role
from awconv.terminal import printable

_ANNOTATIONS = "annotations/instances_{split}.json"
_TEST_IMAGES = "annotations/image_info_{split}.json"
_Kind = tuple[Callable[[Any], bool], str]
_ID: _Kind = (is_id, "a whole number")
_TEXT: _Kind = (lambda value: isinstance(value, str) and bool(value.strip()), "text")
_SIZE: _Kind = (
    lambda value: value is None or (isinstance(value, int | float) and not isinstance(value, bool)),
    "a whole number",
)
_AREA: _Kind = (lambda value: value is None or is_number(value), "a number, in square pixels")
_CROWD: _Kind = (lambda value: value is None or (isinstance(value, int | float) and value in (0, 1)), "0 or 1")
_BOX: _Kind = (
    lambda value: isinstance(value, list) and len(value) == 4 and all(map(is_number, value)),
    "x, y, width and height in pixels",
)
_FIELDS: dict[str, dict[str, _Kind]] = {
    "images": {"id": _ID, "file_name": _TEXT},
    "annotations": {"image_id": _ID, "category_id": _ID, "bbox": _BOX},
    "categories": {"id": _ID, "name": _TEXT},
}
_OPTIONAL: dict[str, dict[str, _Kind]] = {
    "images": {"width": _SIZE, "height": _SIZE},
    "annotations": {
        "id": (lambda value: is_id(value) or isinstance(value, str), _ID[1]),
        "area": _AREA,
        "iscrowd": _CROWD,
    },
    "categories": {},
}


class Coco(DetectionDataModule):
    """Images with boxes in COCO's format. The default is COCO's own layout: ``root/train2017/*.jpg`` and
    ``root/annotations/instances_train2017.json``.

    An annotation whose area is missing, or 0 or less, gets the area of its box. Training and evaluation leave out a
    category that only groups others, such as Roboflow's first one: it is the supercategory of another, and no object of
    the training split has it.

    An image's file name may come from the machine of the annotator: an absolute path, or one with backslashes or
    percent signs, as CVAT, VIA and Label Studio write them. If there is no file ``images/NAME``, the image is the file
    below ``images`` that shares the longest end of that path.

    A test split may have no annotations, for detections that somebody else evaluates: in COCO's own layout,
    ``root/annotations/image_info_test2017.json``.

    Args:
        root: the folder of the data set, or a zip archive of it.
        train: name of the training split.
        val: name of the validation split. None holds out ``val_fraction`` of the training split.
        test: name of the test split. None tests on the validation split.
        images: folder of a split's images, relative to ``root``. ``{split}`` stands for the name of the split.
        annotations: file of a split's annotations, likewise.
        max_annotations: largest size of a file of annotations, in bytes, unpacked. Reading it takes ten times as much
            memory.
        **kwargs: further arguments of :class:`DetectionDataModule`.

    Raises:
        FileNotFoundError: a file is missing. The message names it.
        ValueError: a file is not in COCO's format, splits have different categories, or a wanted category does not
            exist.
    """

    roles: ClassVar[Mapping[str, Role]] = {**DetectionDataModule.roles, "max_annotations": Role.NOTHING}

    def __init__(
        self,
        root: Path,
        train: str = "train2017",
        val: str | None = None,
        test: str | None = None,
        images: str = "{split}",
        annotations: str = _ANNOTATIONS,
        max_annotations: int = 2**31,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        self.splits: dict[Split, str | None] = {"train": train, "val": val, "test": test}
        self.images, self.annotations = images, annotations
        if max_annotations < 1:
            raise ValueError(f"max_annotations must be at least 1, got {max_annotations}")
        self.max_annotations = max_annotations

    @cached_property
    def _content(self) -> dict[str, Any]:
        """The content of the training split's annotations."""
        if not self.splits["train"]:
            raise ValueError("--data.train must name a split, such as train2017")
        return self._load("train")

    @cached_property
    def _grouping(self) -> dict[int, str]:
        """Names of the categories that only group others, by id."""
        categories = self._content["categories"]
        annotated = {annotation["category_id"] for annotation in self._content["annotations"]}
        supercategories: dict[Any, set[int]] = {}
        for category in categories:
            if isinstance(category.get("supercategory"), str):
                supercategories.setdefault(category["supercategory"], set()).add(category["id"])
        grouping = {
            category["id"]: category["name"]
            for category in categories
            if category["id"] not in annotated and supercategories.get(category["name"], set()) - {category["id"]}
        }
        for number, name in grouping.items():
            rank_zero_info(
                printable(f"category {name!r} ({number}) left out: it only groups others, and no object has it")
            )
        return grouping

    @cached_property
    def _training(self) -> tuple[dict[str, int], list[Annotated]]:
        return self._read("train", self._content)

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
        (expected, _), (named, images) = self._training, self._read(split, self._load(split))
        if named != expected:
            differing = sorted(set(named.items()) ^ set(expected.items()))
            raise ValueError(
                f"split {name} must have the categories of {self.splits['train']}; these are in only one of them, or "
                f"have different ids: {', '.join(f'{name} ({number})' for name, number in differing[:10])}"
            )
        return images

    def _place(self, pattern: str, split: Split) -> str:
        """The path of a split, from an option's pattern.

        Raises:
            ValueError: the path leads out of the root.
        """
        path = posixpath.normpath(pattern.replace("{split}", str(self.splits[split])) or ".")
        if leads_out(path):
            raise ValueError(
                f"--data.images and --data.annotations must be paths below --data.root = {self.root}, got {pattern!r}"
            )
        return path

    def _read(self, split: Split, content: Mapping[str, Any]) -> tuple[dict[str, int], list[Annotated]]:
        """The ids of the wanted categories, by name, and the images of a split."""
        name = self.splits[split]
        named = self._wanted(content["categories"], f"split {name}")
        label = {number: index + 1 for index, number in enumerate(named.values())}
        known = {category["id"] for category in content["categories"]}
        marked: dict[int, list[Mapping[str, Any]]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            number, what = annotation["category_id"], f"annotation {annotation.get('id')} of split {name}"
            if annotation["image_id"] not in marked or number not in known:
                raise ValueError(
                    f"{what} refers to image {annotation['image_id']} and category {number}; the file must hold both"
                )
            if self.categories is None and number not in label:
                raise ValueError(
                    f"{what} has the category {self._grouping[number]!r} ({number}), which only groups others in split "
                    f"{self.splits['train']}; give the wanted categories with --data.categories"
                )
            marked[annotation["image_id"]].append(annotation)
        folder = self._place(self.images, split)
        self._looked_in.add(folder)
        paths = _Paths(self.files, folder)
        found = {image["id"]: paths.find(image["file_name"]) for image in content["images"]}
        again = len(found) - len(set(found.values()))
        if again:
            rank_zero_info(
                f"split {name}: {again:,} images share a file with another one; each counts, since their ids differ"
            )
        if paths.moved:
            rank_zero_info(f"split {name}: {paths.moved:,} images were found by the end of their path, below {folder}")
        return named, [_annotated(image, marked[image["id"]], found[image["id"]], label) for image in content["images"]]

    def _load(self, split: Split) -> dict[str, Any]:
        """The content of a split's annotations, with its types checked."""
        path, name = self._place(self.annotations, split), self.splits[split]
        if split == "test" and self.annotations == _ANNOTATIONS and not self.files.holds(path):
            images_alone = self._place(_TEST_IMAGES, split)
            path = images_alone if self.files.holds(images_alone) else path
        shown = self.files.name(path)
        self._annotation_files.add(path)
        self._looked_in.add(posixpath.dirname(path))
        try:
            text = self.files.read(path, self.max_annotations, "max_annotations")
        except FileNotFoundError as error:
            there = [other for other in self.files.below(".") if other.endswith(".json")]
            found = f"the JSON files are {', '.join(there[:5])}" if there else "there is no JSON file"
            raise FileNotFoundError(
                f"annotations {shown} do not exist; if the layout is not COCO's own, give --data.annotations and "
                f"--data.images; {found}"
            ) from error
        try:
            content = json.loads(text)
        except RecursionError as error:
            raise ValueError(f"{shown} is not in COCO's format: it nests too deeply") from error
        except ValueError as error:  # bad JSON, a bad encoding, or a number with thousands of digits
            raise ValueError(f"{shown} is not JSON: {error}") from error
        missing = [part for part in _FIELDS if not isinstance(content, dict) or part not in content]
        if split == "test" and missing == ["annotations"]:
            rank_zero_info(f"split {name} has no annotations: its figures are -1 and mean nothing")
            content["annotations"], missing = [], []
        if missing:
            raise ValueError(f"{shown} is not in COCO's format: it has no {' and no '.join(missing)}")
        for part in _FIELDS:
            _check_entries(content[part], part, str(name))
        for category in content["categories"]:
            texts = {key: category.get(key) for key in ("name", "supercategory")}
            category.update({key: composed(text) for key, text in texts.items() if isinstance(text, str)})
        return dict(content)

    def _wanted(self, categories: Sequence[Mapping[str, Any]], split: str) -> dict[str, int]:
        in_order = sorted(categories, key=lambda category: category["id"])
        groups = [one for one in in_order if self._grouping.get(one["id"]) == one["name"]]
        own = [one for one in in_order if one not in groups]
        _check_different(own, "categories", "name", split)
        named = {category["name"]: category["id"] for category in own}
        if self.categories is None:
            return named
        named = {category["name"]: category["id"] for category in groups} | named  # users may want a grouping one
        unknown = [name for name in self.categories if name not in named]
        if unknown:
            raise ValueError(f"there is no category {', '.join(unknown)}; the categories are {', '.join(named)}")
        return {name: named[name] for name in self.categories}


class _Paths:
    """Finds the images of a folder.

    Attributes:
        moved: number of images found by the end of their path.
    """

    def __init__(self, files: Files, folder: str) -> None:
        self._files, self._folder = files, folder
        self._known = set(files.below(folder))
        self._by_name: dict[str, list[str]] | None = None
        self.moved = 0

    def find(self, name: str) -> str:
        """The path of an image, from its file name in the annotations.

        Raises:
            ValueError: the name fits several files.
        """
        exact = posixpath.normpath(f"{self._folder}/{name}")
        if exact in self._known or self._files.holds(exact):
            return exact
        alike = [path for path in self._named(posixpath.basename(exact)) if composed(path) == composed(exact)]
        if len(alike) == 1:
            return alike[0]
        for given in dict.fromkeys((name, unquote(name))):
            written = composed(given.rpartition("?d=")[2])
            parts = [part for part in re.split(r"[\\/]", written) if part not in ("", ".", "..")]
            for start in range(len(parts)):
                end = "/" + "/".join(parts[start:])
                found = [path for path in self._named(parts[-1]) if composed(f"/{path}").endswith(end)]
                if len(found) > 1:
                    raise ValueError(
                        f"image {name!r:.200} is not at {self._files.name(exact)} and could be {found[0]} or "
                        f"{found[1]}; give its path below --data.images"
                    )
                if found:
                    self.moved += 1
                    return found[0]
        return exact

    def _named(self, name: str) -> list[str]:
        if self._by_name is None:
            self._by_name = {}
            for path in sorted(self._known):
                self._by_name.setdefault(composed(posixpath.basename(path)), []).append(path)
        return self._by_name.get(composed(name), [])


def _check_entries(entries: Any, part: str, split: str) -> None:
    """Raises a ValueError that names the first entry with an error."""
    if not isinstance(entries, list):
        raise ValueError(f"split {split} is not in COCO's format: {part} must be a list, got {entries!r:.40}")
    one = {"images": "image", "annotations": "annotation", "categories": "category"}[part]
    for position, entry in enumerate(entries):
        number = entry.get("id", f"at position {position}") if isinstance(entry, dict) else f"at position {position}"
        what = f"{one} {number!s:.40} of split {split} is not in COCO's format"
        if not isinstance(entry, dict):
            raise ValueError(f"{what}: it must be an object, got {entry!r:.40}")
        missing = [name for name in _FIELDS[part] if name not in entry]
        if missing:
            raise ValueError(f"{what}: it has no {' and no '.join(missing)}")
        for name, (is_right, kind) in (_FIELDS[part] | _OPTIONAL[part]).items():
            if name in entry and not is_right(entry[name]):
                raise ValueError(f"{what}: {name} must be {kind}, got {entry[name]!r:.80}")
    _check_different(entries, part, "id", f"split {split}")


def _check_different(entries: Sequence[Mapping[str, Any]], part: str, key: str, split: str) -> None:
    """Raises a ValueError if several entries have the same value of a key."""
    given = Counter(entry[key] for entry in entries if key in entry)
    ((value, count),) = given.most_common(1) or [("", 0)]
    if count > 1:
        raise ValueError(f"{split}: {count} {part} have the same {key}, {value!r}; each must have its own")


def _annotated(
    image: Mapping[str, Any], marked: list[Mapping[str, Any]], path: str, label: Mapping[int, int]
) -> Annotated:
    wanted = [annotation for annotation in marked if annotation["category_id"] in label]
    boxes = np.array([annotation["bbox"] for annotation in wanted], float).reshape(-1, 4)
    given = [annotation.get("area") or 0 for annotation in wanted]
    areas = [area if area > 0 else w * h for area, (_, _, w, h) in zip(given, boxes, strict=True)]
    boxes[:, 2:] += boxes[:, :2]
    width, height = size(image.get("width"), image.get("height"))
    return Annotated(
        path=path,
        image_id=image["id"],
        width=width,
        height=height,
        boxes=boxes,
        labels=np.array([label[annotation["category_id"]] for annotation in wanted], int),
        areas=np.array(areas, float),
        crowd=np.array([annotation.get("iscrowd") or 0 for annotation in wanted], bool),
        others=len(marked) - len(wanted),
    )
