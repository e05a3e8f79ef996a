"""Images in Parquet files, in the layout of Hugging Face's data sets."""

from __future__ import annotations

import glob
import json
from functools import cached_property
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from awconv.data.images import BrokenImageError, read_image
from awconv.data.module import ImageDataModule, Split
from awconv.extras import require


class ParquetImages(Dataset[tuple[Image.Image, int]]):
    """The rows of some Parquet files: a column of structs {bytes, path} and one of class indices.

    Args:
        pattern: a file, or a glob pattern of several, read in alphabetical order.
        image_column: name of the column of images.
        label_column: name of the column of labels.

    Raises:
        FileNotFoundError: no file matches.
        ValueError: a column is missing, or there are labels outside the list of classes.
    """

    def __init__(self, pattern: str, image_column: str, label_column: str) -> None:
        pyarrow = require("pyarrow", extra="parquet")
        parquet = require("pyarrow.parquet", extra="parquet")
        files = sorted(glob.glob(pattern, recursive=True))
        if not files:
            raise FileNotFoundError(f"no file matches {pattern!r}; expected a Parquet file or a glob pattern of some")
        present = parquet.read_schema(files[0]).names
        for column in (image_column, label_column):
            if column not in present:
                raise ValueError(
                    f"{files[0]} must have a column {column!r}, got {present}; "
                    "name the right one with image_column or label_column"
                )
        table = parquet.ParquetDataset(files).read(columns=[image_column, label_column])
        self._images = table.column(image_column)
        self._pattern = pattern
        if not pyarrow.types.is_struct(self._images.type) or self._images.type.get_field_index("bytes") < 0:
            raise ValueError(
                f"{pattern}: column {image_column!r} must hold structs with a field 'bytes', got {self._images.type}"
            )
        labels = table.column(label_column)
        if not pyarrow.types.is_integer(labels.type) or labels.null_count:
            raise ValueError(
                f"{pattern}: column {label_column!r} must hold class indices, an integer in every row, "
                f"got {labels.type} with {labels.null_count} nulls"
            )
        self.targets: list[int] = labels.to_pylist()
        self.classes = _class_names(table.schema, label_column) or [
            str(index) for index in range(max(self.targets, default=-1) + 1)
        ]
        wrong = [index for index, target in enumerate(self.targets) if not 0 <= target < len(self.classes)]
        if wrong:
            raise ValueError(
                f"{pattern}: labels must be from 0 to {len(self.classes) - 1}, got {self.targets[wrong[0]]} in row "
                f"{wrong[0]} (and {len(wrong) - 1} more)"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name = f"{self._pattern}, row {index}"
        image = self._images[index].as_py()
        if image is None or image["bytes"] is None:
            raise BrokenImageError(f"{name}: the row has no image")
        return read_image(image["bytes"], name), self.targets[index]


def _class_names(schema: Any, column: str) -> list[str] | None:
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return None
    names: list[str] | None = json.loads(metadata).get("info", {}).get("features", {}).get(column, {}).get("names")
    return names


class Parquet(ImageDataModule):
    """Images in Parquet files, in the layout of Hugging Face's data sets: ``image`` {bytes, path} and ``label``.

    The names of the classes come from the files' metadata, where they have any.

    Args:
        train: a file, or a glob pattern of several.
        val: the same; None holds out ``val_fraction`` of the training split.
        test: the same; None tests on the validation split.
        image_column: name of the column of images.
        label_column: name of the column of labels.
        **kwargs: as for :class:`ImageDataModule`; ``val_fraction`` is used only without ``val``.

    Raises:
        FileNotFoundError: no file matches.
        ValueError: a column is missing, or splits have different classes.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.files: dict[Split, str | None] = {"train": train, "val": val, "test": test}
        self.columns = (image_column, label_column)

    @cached_property
    def _train(self) -> ParquetImages:
        assert self.files["train"] is not None
        return ParquetImages(self.files["train"], *self.columns)

    @property
    def classes(self) -> list[str]:
        return self._train.classes

    def open(self, split: Split) -> ParquetImages | None:
        if split == "train":
            return self._train
        pattern = self.files[split]
        if pattern is None:
            return None
        dataset = ParquetImages(pattern, *self.columns)
        # Files without names count classes by the largest label, which a small split may lack.
        if dataset.classes != self.classes[: len(dataset.classes)]:
            raise ValueError(
                f"{pattern} must have the {len(self.classes)} classes of {self.files['train']}, got "
                f"{len(dataset.classes)} classes: {dataset.classes[:10]}"
            )
        return dataset
