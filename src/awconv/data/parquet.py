"""Images in Parquet files, in the layout of Hugging Face's data sets."""

from __future__ import annotations

import bisect
import glob
import json
import threading
from collections import OrderedDict
from functools import cached_property
from itertools import accumulate
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from awconv.data.images import BrokenImageError, read_image
from awconv.data.loading import Split
from awconv.data.module import ImageDataModule
from awconv.data.order import WINDOW
from awconv.extras import require


class ParquetImages(Dataset[tuple[Image.Image, int]]):
    """The rows of some Parquet files: a column of structs {bytes, path} and one of class indices.

    The labels are read at once. The images are streamed: a file's row groups are read when one of their rows is asked
    for, and the last few are kept.

    Args:
        pattern: a file, or a glob pattern of several, read in alphabetical order.
        image_column: name of the column of images.
        label_column: name of the column of labels.

    Attributes:
        targets: the class index of each row.
        classes: the names of the classes.
        blocks: number of rows in each row group.

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
        for file in files:
            try:
                present = parquet.read_schema(file)
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise ValueError(f"{file} is not a Parquet file, or a broken one: {error}") from error
            for column in (image_column, label_column):
                if column not in present.names:
                    raise ValueError(
                        f"{file} must have a column {column!r}, got {present.names}; "
                        "name the right one with image_column or label_column"
                    )
            images = present.field(image_column).type
            if not pyarrow.types.is_struct(images) or images.get_field_index("bytes") < 0:
                raise ValueError(
                    f"{file}: column {image_column!r} must hold structs with a field 'bytes', got {images}"
                )
        self._pattern, self._column = pattern, image_column
        groups = [(file, group) for file in files for group in range(parquet.read_metadata(file).num_row_groups)]
        self._groups = groups
        self.blocks = [parquet.read_metadata(file).row_group(group).num_rows for file, group in groups]
        self._ends = list(accumulate(self.blocks))
        self._forget()
        table = parquet.ParquetDataset(files).read(columns=[label_column])
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
        group = bisect.bisect_right(self._ends, index)
        image = self._read(group)[index - self._ends[group]].as_py()  # counted from the group's end
        if image is None or image["bytes"] is None:
            raise BrokenImageError(f"{name}: the row has no image")
        return read_image(image["bytes"], name), self.targets[index]

    def _read(self, group: int) -> Any:
        """The images of a row group, and those of the last few asked for without reading them again."""
        with self._lock:
            if group not in self._kept:
                parquet = require("pyarrow.parquet", extra="parquet")
                file, number = self._groups[group]
                with parquet.ParquetFile(file) as opened:
                    self._kept[group] = opened.read_row_group(number, columns=[self._column]).column(0)
                if len(self._kept) > WINDOW:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            return self._kept[group]

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


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
