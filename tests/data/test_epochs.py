"""Epochs of data sets that are decoded at each access: every image once, whoever loads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from awconv.data import ImageDataModule, ImageFolder, Parquet, WebDataset
from tests.data.samples import digit, png, write_tar
from tests.photographs import photograph

COUNT = 96  # images, each of a class of its own, so that labels tell which one is where


def folder(place: Path) -> Callable[..., ImageDataModule]:
    for index in range(COUNT):
        (place / f"{index:03}").mkdir()
        digit(index).save(place / f"{index:03}" / "a.png")
    return lambda **options: ImageFolder(place, **options)


def parquet(place: Path) -> Callable[..., ImageDataModule]:
    table = pa.table({"image": [png(digit(index)) for index in range(COUNT)], "label": list(range(COUNT))})
    for number in range(2):
        pq.write_table(table.slice(number * COUNT // 2, COUNT // 2), place / f"{number}.parquet", row_group_size=4)
    return lambda **options: Parquet(str(place / "*.parquet"), **options)


def shards(place: Path) -> Callable[..., ImageDataModule]:
    for number in range(0, COUNT, 4):
        content: dict[str, Any] = {}
        for index in range(number, number + 4):
            content |= {f"{index:03}.png": png(digit(index)), f"{index:03}.cls": str(index)}
        write_tar(place / f"{number:03}.tar", content)
    return lambda **options: WebDataset(str(place / "*.tar"), **options)


def labels(batches: Any) -> list[int]:
    return [label for _, targets in batches for label in targets.tolist()]


@pytest.mark.parametrize("layout", [folder, parquet, shards])
def test_every_image_comes_once_an_epoch_in_a_new_order_from_any_number_of_workers(
    layout: Callable[[Path], Callable[..., ImageDataModule]], tmp_path: Path
) -> None:
    made = layout(tmp_path)
    options = dict(image_size=8, val_fraction=0, in_memory=False)
    epochs: dict[int, list[list[int]]] = {}
    for workers in (0, 3):
        loader = made(**options, batch_size=8, num_workers=workers).train_dataloader()
        epochs[workers] = [labels(loader) for _ in range(2)]
    assert epochs[0] == epochs[3]
    first, second = epochs[0]
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert first != second
    assert [label // 4 for label in first] != sorted(label // 4 for label in first)  # not a shard after the other
    parts = []
    for rank in range(2):
        data = made(**options, batch_size=4, num_workers=0)
        progress = SimpleNamespace(current=SimpleNamespace(ready=5))  # a training that was interrupted
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
        device = SimpleNamespace(root_device=SimpleNamespace(type="cpu"))
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2, fit_loop=loop, strategy=device)  # type: ignore[assignment]
        parts.append(labels(data.train_dataloader()))
    assert sorted(parts[0] + parts[1]) == sorted(first[5 * 8 :])


def test_many_shards_are_indexed_by_processes_to_the_same(tmp_path: Path) -> None:
    shards(tmp_path)
    alone, several = (WebDataset(str(tmp_path / "*.tar"), num_workers=workers).open("train") for workers in (0, 2))
    assert alone is not None
    assert several is not None
    assert alone.chunks == several.chunks == [4] * (COUNT // 4)
    assert list(alone.targets) == list(several.targets) == list(range(COUNT))
    assert [alone.encoded(index) for index in range(COUNT)] == [several.encoded(index) for index in range(COUNT)]
    (tmp_path / "000.tar").write_bytes(b"no tar file")
    with pytest.raises(ValueError, match=r"000\.tar is not a plain tar file, or is broken"):
        WebDataset(str(tmp_path / "*.tar"), num_workers=2).open("train")


def test_crops_by_torch_and_by_pillow_show_the_same(tmp_path: Path) -> None:
    for name in ("china", "flower"):
        (tmp_path / name).mkdir()
        for index in range(16):
            photograph(name).save(tmp_path / name / f"{index}.jpg")
    batches = []
    for resizing in ("torch", "pillow"):
        options: dict[str, Any] = dict(resizing=resizing, in_memory=False, val_fraction=0, image_size=16)
        images, targets = next(iter(ImageFolder(tmp_path, **options, batch_size=32, num_workers=0).train_dataloader()))
        batches.append((images.int(), targets.tolist()))
    assert batches[0][1] == batches[1][1]
    assert 0 < (batches[0][0] - batches[1][0]).abs().max() <= 2  # by the rounding, so both were at work
