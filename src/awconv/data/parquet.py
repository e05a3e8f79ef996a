"""Images in Parquet files, in the layout of Hugging Face's data sets."""

from __future__ import annotations

import bisect
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch.utils.data import Dataset

from awconv.data.classification import ImageDataModule
from awconv.data.files import check_ratio, composed, log_unused, matching
from awconv.data.images import MAX_PIXELS, BrokenImageError, Encoded, check_bytes, read_image
from awconv.data.labels import checked_names, numbered
from awconv.data.loading import Split
from awconv.data.order import WINDOW
from awconv.extras import require
from awconv.terminal import printable

_KIND = "a Parquet file"
_TEXT, _BINARY = ("string", "large_string", "string_view"), ("binary", "large_binary", "binary_view")  # Arrow's types


class _Shard(NamedTuple):
    """A Parquet file.

    Attributes:
        path: of the file.
        groups: number of rows in each row group.
        labels: of all rows.
        texts: whether the labels are names.
        names: of the classes, by index, if the metadata have any.
    """

    path: str
    groups: list[int]
    labels: list[Any]
    texts: bool
    names: list[str] | None


class ParquetImages(Dataset[tuple[Image.Image, int]]):
    """The rows of Parquet files, with a column of images and a column of labels.

    An image is a struct {bytes, path}, the content of a file, or a path relative to the Parquet file's folder. A label
    is the index of a class, or its name.

    All labels are read at once. Images are streamed: the first access to a row reads its row group, and the last few
    row groups stay in memory.

    Args:
        pattern: a file, or a glob pattern of several files, which are read in alphabetical order.
        image_column: name of the column of images.
        label_column: name of the column of labels.
        training: the training images, whose classes these must have. None takes the classes from the files.
        max_pixels: the largest number of pixels of an image.

    Attributes:
        targets: class index of each row.
        classes: names of the classes: those in the files' metadata, or the names among the labels in alphabetical
            order, or numbers.
        chunks: number of rows in each row group.

    Raises:
        FileNotFoundError: no file matches.
        ValueError: a column is missing or has a wrong type, files differ in their classes, or a label is no class.
    """

    def __init__(
        self,
        pattern: str,
        image_column: str,
        label_column: str,
        training: ParquetImages | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._column, self._max_pixels = image_column, max_pixels
        shards = [_read_shard(file, image_column, label_column) for file in matching(pattern, _KIND)]
        first = shards[0]
        self._kind = (first.texts, first.names)
        for shard in shards:
            if (shard.texts, shard.names) != self._kind:
                raise ValueError(
                    f"{shard.path} must have labels like those of {first.path}: {_described(*self._kind)}; got "
                    f"{_described(shard.texts, shard.names)}"
                )
        if training is not None and training._kind != self._kind:
            raise ValueError(
                f"{pattern} must have the {len(training.classes)} classes of {training.files[0]}: "
                f"{_described(*training._kind)}; got {_described(*self._kind)}"
            )
        self.classes: list[str] = _classes(shards, pattern) if training is None else training.classes
        self.targets: np.ndarray[Any, np.dtype[np.int64]] = np.concatenate(
            [_targets(shard, self.classes) for shard in shards]
        )
        self.files: list[str] = [shard.path for shard in shards]
        self._groups = [(shard.path, group) for shard in shards for group in range(len(shard.groups))]
        self.chunks = [count for shard in shards for count in shard.groups]
        self._ends = list(accumulate(self.chunks))
        self._forget()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(*self.encoded(index), max_pixels=self._max_pixels), int(self.targets[index])

    def encoded(self, index: int) -> Encoded:
        """An image as it is stored.

        Raises:
            BrokenImageError: the row has no image, or its row group is broken or too large.
        """
        group = bisect.bisect_right(self._ends, index)
        file, number = self._groups[group]
        row = index - (self._ends[group] - self.chunks[group])
        name = f"{file}, row {row + sum(self.chunks[group - number : group])}"
        image = self._read(group)[row]
        try:
            value = image.as_py()
        except ValueError as error:  # a path that is not UTF-8
            raise BrokenImageError(f"{name}: {error}") from error
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(content, str):
            content, path = None, content
        if content is None:
            path = path and os.path.join(os.path.dirname(file), path)
            if not path or not os.path.isfile(path):
                raise BrokenImageError(
                    f"{name}: the row has no image" + (f", and {path} is not a file" if path else "")
                )
            content = path
        return Encoded(content, name)

    def _read(self, group: int) -> Any:
        """The images of a row group. Keeps the last few row groups in memory."""
        with self._lock:
            if group not in self._kept:
                parquet = require("pyarrow.parquet", extra="parquet")
                file, number = self._groups[group]
                try:
                    with parquet.ParquetFile(file, page_checksum_verification=True) as opened:
                        self._check_size(opened.metadata.row_group(number), f"{file}, row group {number}")
                        images = opened.read_row_group(number, columns=[self._column]).column(0)
                    if len(images) != self.chunks[group]:
                        raise ValueError(f"it must have {self.chunks[group]} rows, got {len(images)}")
                    self._kept[group] = images
                except BrokenImageError:
                    raise
                except Exception as error:  # pyarrow raises errors of many kinds
                    raise BrokenImageError(f"{file}: row group {number} is broken: {error}") from error
                if len(self._kept) > WINDOW:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            return self._kept[group]

    def _check_size(self, group: Any, name: str) -> None:
        """Raises an error if the images of a row group are too large, or packed too tightly to be plausible."""
        chunks = [group.column(index) for index in range(group.num_columns)]
        chunks = [one for one in chunks if f"{one.path_in_schema}.".startswith(f"{self._column}.")]
        size = sum(one.total_uncompressed_size for one in chunks)
        check_bytes(size, name, self._max_pixels, group.num_rows)
        packed = sum(one.total_compressed_size for one in chunks)
        check_ratio(size, packed, f"its column {self._column!r}", "write the file without compression")

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _read_shard(file: str, image_column: str, label_column: str) -> _Shard:
    pyarrow = require("pyarrow", extra="parquet")
    parquet = require("pyarrow.parquet", extra="parquet")
    try:
        with parquet.ParquetFile(file, page_checksum_verification=True) as opened:
            schema, metadata = opened.schema_arrow, opened.metadata
            groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            _check_columns(schema, file, image_column, label_column)
            labels = opened.read(columns=[label_column]).column(0)
            if len(labels) != sum(groups):
                raise OSError(f"it has {len(labels)} labels for {sum(groups)} rows")
            listed = labels.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file} is not a Parquet file, or is broken: {error}") from error
    if pyarrow.types.is_dictionary(labels.type):  # pandas' categories
        labels = labels.cast(labels.type.value_type)
    texts = _is(labels.type, *_TEXT)
    if not (texts or pyarrow.types.is_integer(labels.type)) or labels.null_count:
        raise ValueError(
            f"{file}: column {label_column!r} must hold a class index (integer) or a name (text) in every row, got "
            f"{labels.type} with {labels.null_count} nulls"
        )
    if texts:
        listed = [composed(text) for text in listed]
    unused = [name for name in schema.names if name not in (image_column, label_column)]
    if unused:
        rank_zero_info(printable(f"{file}: columns not used: {', '.join(unused[:20])}"))
    return _Shard(file, groups, listed, texts, _class_names(schema, label_column, file))


def _check_columns(schema: Any, file: str, image_column: str, label_column: str) -> None:
    for column in (image_column, label_column):
        if schema.names.count(column) != 1:
            raise ValueError(
                f"{file} must have a column {column!r}, got {schema.names}; "
                "give the right name with image_column or label_column"
            )
    images = schema.field(image_column).type
    if _is(images, "struct"):
        kinds = {"bytes": (*_BINARY, "null"), "path": (*_TEXT, "null")}
        found = [(field.type, kinds[field.name]) for field in images if field.name in kinds]
        right = bool(found) and all(_is(kind, *wanted) for kind, wanted in found)
    else:
        right = _is(images, *_BINARY, *_TEXT)
    if not right:
        raise ValueError(
            f"{file}: column {image_column!r} must hold the content of image files, paths of them (text), or "
            f"structs with the fields 'bytes' and 'path', got {images}"
        )


def _is(kind: Any, *names: str) -> bool:
    """Whether a type of Arrow has one of these names."""
    types = require("pyarrow", extra="parquet").types
    return any(getattr(types, f"is_{name}")(kind) for name in names)


def _class_names(schema: Any, column: str, file: str) -> list[str] | None:
    """The names of the classes in the metadata of Hugging Face's data sets, or None."""
    content = (schema.metadata or {}).get(b"huggingface")
    if content is None:
        return None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        rank_zero_info(f"{file}: metadata 'huggingface' not used: they are not JSON")
        return None
    for key in ("info", "features", column, "names"):
        found = found.get(key) if isinstance(found, dict) else None
    if found is None:  # the column is of another kind, without names
        return None
    if not isinstance(found, list):
        raise ValueError(f"{file}: the names of the classes in its metadata must be a list, got {found!r:.80}")
    return checked_names(found, f"{file}, metadata")


def _classes(shards: Sequence[_Shard], pattern: str) -> list[str]:
    names = shards[0].names
    labels = [label for shard in shards for label in shard.labels]
    if names is not None:
        return names
    return checked_names(sorted(set(labels)), pattern) if shards[0].texts else numbered(labels, pattern)


def _targets(shard: _Shard, classes: list[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    indices = {name: index for index, name in enumerate(classes)} if shard.texts else range(len(classes))
    wrong = [row for row, label in enumerate(shard.labels) if label not in indices]
    if wrong:
        wanted = f"one of {', '.join(classes[:10])}" if shard.texts else f"from 0 to {len(classes) - 1}"
        label = shard.labels[wrong[0]]
        raise ValueError(
            f"{shard.path}: labels must be {wanted}, got {label!r} in row {wrong[0]} (and {len(wrong) - 1} more)"
            + ("; -1 marks images without a label, which cannot be used" if label == -1 else "")
        )
    return np.asarray([indices[label] for label in shard.labels], np.int64)


def _described(texts: bool, names: list[str] | None) -> str:
    kind = "names as labels" if texts else "class indices"
    if names is None:
        return f"{kind}, without a list of names in the metadata"
    return f"{kind} of {len(names)} classes, {', '.join(map(repr, names[:10]))}"


class Parquet(ImageDataModule):
    """Images in Parquet files, in the layout of Hugging Face's data sets: ``image`` {bytes, path} and ``label``.

    The column of images may also hold the content of files, or paths relative to the Parquet file's folder. Labels are
    class indices or names. The names of indices come from the files' metadata, if they have any. Unused columns, and
    unused files beside the used ones, are logged.

    Args:
        train: the training split: a file, or a glob pattern of several.
        val: the validation split, likewise. None holds out ``val_fraction`` of the training split.
        test: the test split, likewise. None tests on the validation split.
        image_column: name of the column of images.
        label_column: name of the column of labels.
        **kwargs: further arguments of :class:`ImageDataModule`. ``val_fraction`` counts only without ``val``.

    Raises:
        FileNotFoundError: no file matches.
        ValueError: a column is missing, or files or splits have different classes.
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
        log_unused(self.files.values(), _KIND)
        return ParquetImages(self.files["train"], *self.columns, max_pixels=self.max_pixels)

    @property
    def classes(self) -> list[str]:
        return self._train.classes

    def open(self, split: Split) -> ParquetImages | None:
        pattern = self.files[split]
        if split == "train" or pattern is None:
            return self._train if split == "train" else None
        return ParquetImages(pattern, *self.columns, training=self._train, max_pixels=self.max_pixels)
