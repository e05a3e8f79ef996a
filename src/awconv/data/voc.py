"""Images with boxes in the format of PASCAL VOC (The PASCAL Visual Object Classes Challenge, IJCV 2010)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from awconv.data.detection import Annotated, DetectionDataModule
from awconv.data.loading import Split

CATEGORIES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class Voc(DetectionDataModule):
    """Images with boxes in VOC's format: ``root/VOC2007/`` with ``JPEGImages``, ``Annotations`` and
    ``ImageSets/Main``, and other years beside it.

    Pixels are counted from 1 there, and a box includes its last ones: boxes are moved accordingly. Objects marked as
    difficult are handled as crowd regions: they are not trained on, and not counted in the evaluation.

    Args:
        root: the folder that holds the years (``VOCdevkit``), or a zip archive of it.
        train: the years and lists of the training split.
        val: the same; None holds out ``val_fraction`` of the training split.
        test: the same; None tests on the validation split.
        categories: names of those that are wanted, which may be other ones than VOC's; None for VOC's 20.
        **kwargs: as for :class:`DetectionDataModule`.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ValueError: an annotation is not in VOC's format, or no object of the training split is of a category that is
            asked for.
    """

    def __init__(
        self,
        root: Path,
        train: Sequence[str] = ("VOC2007/trainval", "VOC2012/trainval"),
        val: Sequence[str] | None = None,
        test: Sequence[str] | None = ("VOC2007/test",),
        categories: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, categories or CATEGORIES, **kwargs)
        self.splits: dict[Split, Sequence[str] | None] = {"train": train, "val": val, "test": test}

    @property
    def classes(self) -> list[str]:
        return list(self.categories or ())

    @property
    def category_ids(self) -> list[int]:
        return list(range(1, len(self.classes) + 1))

    def open(self, split: Split) -> list[Annotated] | None:
        lists = self.splits[split]
        if lists is None:
            return None
        images: list[Annotated] = []
        seen: set[str] = set()
        for given in lists:
            year, slash, name = given.partition("/")
            if not slash:
                raise ValueError(f"a split of VOC is YEAR/LIST, such as VOC2007/trainval, got {given!r}")
            try:
                listed = self.files.read(f"{year}/ImageSets/Main/{name}.txt").decode().split()
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{error}; name the lists that are there, such as --data.{split}='[VOC2007/trainval]'"
                    + ("" if split == "train" else f", or none with --data.{split}=null")
                ) from error
            for stem in listed:
                images.append(self._annotated(year, stem, len(images), seen))
        unknown = [name for name in self.classes if name not in seen and name not in CATEGORIES]
        if unknown and split == "train":
            raise ValueError(
                f"no object of {', '.join(lists)} is of the category {', '.join(unknown)}; there are "
                f"{', '.join(sorted(seen)) or 'none'}"
            )
        return images

    def _annotated(self, year: str, stem: str, image_id: int, seen: set[str]) -> Annotated:
        path = f"{year}/Annotations/{stem}.xml"
        boxes, labels, difficult, others = [], [], [], 0
        try:
            root = ElementTree.fromstring(self.files.read(path))
            width, height = (int(_text(root, f"size/{side}")) for side in ("width", "height"))
            for marked in root.iter("object"):
                name = _text(marked, "name")
                seen.add(name)
                if name not in self.classes:
                    others += 1
                    continue
                left, top, right, bottom = (
                    float(_text(marked, f"bndbox/{edge}")) for edge in ("xmin", "ymin", "xmax", "ymax")
                )
                boxes.append((left - 1, top - 1, right, bottom))
                labels.append(self.classes.index(name) + 1)
                difficult.append(marked.findtext("difficult", "0").strip() == "1")
        except (ElementTree.ParseError, ValueError) as error:
            raise ValueError(f"{self.files.name(path)} is not in VOC's format: {error}") from error
        corners = np.array(boxes, float).reshape(-1, 4)
        return Annotated(
            path=f"{year}/JPEGImages/{stem}.jpg",
            image_id=image_id,
            width=width,
            height=height,
            boxes=corners,
            labels=np.array(labels, int),
            areas=(corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1]),
            crowd=np.array(difficult, bool),
            others=others,
        )


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"there is no {path}")
    return text.strip()
