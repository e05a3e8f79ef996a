"""``awconv bench data``: training images a second, beside torchvision's."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from awconv.bench.report import Format, Measurement, check_range, environment, names, print_measurements
from awconv.bench.timing import Ratio, ratios
from awconv.data import ImageDataModule, ImageFolder, Parquet, WebDataset
from awconv.data.files import walk
from awconv.data.images import ENDINGS
from awconv.data.loading import most_processes
from awconv.extras import require
from awconv.tables import Table

RIVAL = "torchvision"
READERS = ("ImageFolder", "Parquet", "WebDataset")
WAYS = ("uint8", *READERS, "pillow")
_CLASSES = 10
_SEED = 0


def bench_data(
    folder: Path | None = None,
    ways: str = ",".join(WAYS),
    size: int = 224,
    images: int = 1024,
    batch: int = 64,
    workers: int = 2,
    rounds: int = 9,
    format: Format = "table",
) -> int:
    """Measures how many training images a second and a core are read, decoded and cropped, beside torchvision's.

    All ways read the same files, which lie in the memory of the system: no disk is measured. They draw random resized
    crops and flips. Those of torchvision are normalised by its workers, as its recipes do it; ours are by the GPU.

    Args:
        folder: photographs to take, searched with the folders in it; by default crops of two photographs that
            scikit-learn ships, as large as ImageNet's.
        ways: with commas, beside ``torchvision``, its ImageFolder: ``uint8``, the same without normalisation; our
            ``ImageFolder``, ``Parquet`` and ``WebDataset``; ``pillow``, our ImageFolder whose crops Pillow resizes.
        size: height and width of the crops, in pixels.
        images: of an epoch. Fewer photographs are repeated.
        batch: images of a batch.
        workers: processes that load, each on a core.
        rounds: how often each way loads an epoch.
        format: a table, the same as Markdown, or JSON with all figures.

    Returns:
        The exit status, 0.

    Raises:
        FileNotFoundError: the folder holds no images.
        ValueError: an argument is out of range.
        ModuleNotFoundError: Parquet is among the ways, and pyarrow is not installed.
    """
    check_range(size=size, images=images, batch=batch, workers=workers, rounds=rounds)
    wanted = names("ways", ways, WAYS)
    if workers > (most := most_processes()):
        raise ValueError(f"workers must be at most {most} (4 for each core, or 32), got {workers}")
    if images < max(batch, _CLASSES):
        raise ValueError(f"images must be at least a batch, and {_CLASSES}, one of each class; got {images}")
    photographs = made_photographs(64) if folder is None else read_photographs(folder, images)
    with TemporaryDirectory() as place:
        write_layouts(photographs, images, Path(place), wanted)
        loaders = {way: loader(way, Path(place), size, batch, workers) for way in (RIVAL, *wanted)}
        measured = ratios({way: _epoch_of(one) for way, one in loaders.items()}, rounds, "cpu")
    facts: dict[str, Any] = dict(size=size, batch=batch, workers=workers, images=images)
    facts |= dict(pixels=_mean(map(_pixels, photographs)), bytes=_mean(map(len, photographs)))
    _print(measured, images // batch * batch, workers, facts, format)
    return 0


def made_photographs(count: int) -> list[bytes]:
    """JPEG files of about ImageNet's sizes: crops of scikit-learn's photographs, 500x375 on the average.

    Args:
        count: of them.
    """
    generator = np.random.default_rng(_SEED)
    whole = [Image.fromarray(one) for one in load_sample_images().images]
    found = []
    for number in range(count):
        width, height = int(generator.integers(440, 561)), int(generator.integers(330, 421))
        left, top = int(generator.integers(640 - width + 1)), int(generator.integers(427 - height + 1))
        file = io.BytesIO()
        crop = whole[number % len(whole)].crop((left, top, left + width, top + height))
        crop.save(file, "JPEG", quality=int(generator.integers(90, 97)), subsampling="4:4:4" if number % 4 else "4:2:0")
        found.append(file.getvalue())
    return found


def read_photographs(folder: Path, most: int) -> list[bytes]:
    """Image files of a folder, evenly chosen.

    Raises:
        FileNotFoundError: there are none.
    """
    files = [path for path in walk(folder) if os.path.splitext(path)[1].lower() in ENDINGS] if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(f"{folder} must be a folder with image files ({', '.join(sorted(ENDINGS))}) in it")
    chosen = np.linspace(0, len(files) - 1, min(most, len(files))).round().astype(int)
    return [Path(files[index]).read_bytes() for index in chosen]


def write_layouts(photographs: Sequence[bytes], images: int, place: Path, ways: Sequence[str]) -> None:
    """Writes the same images in the layouts that some ways read."""
    rows = [(photographs[index % len(photographs)], index % _CLASSES) for index in range(images)]
    for index, (content, label) in enumerate(rows):
        path = place / "folder" / "train" / str(label) / f"{index:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if "Parquet" in ways:
        arrow, parquet = require("pyarrow", extra="parquet"), require("pyarrow.parquet", extra="parquet")
        columns = {
            "image": [{"bytes": content, "path": None} for content, _ in rows],
            "label": [row[1] for row in rows],
        }
        parquet.write_table(arrow.table(columns), place / "train.parquet", row_group_size=100, use_dictionary=False)
    if "WebDataset" in ways:
        with tarfile.open(place / "train.tar", "w") as tar:
            for index, (content, label) in enumerate(rows):
                for ending, data in (("jpg", content), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{index:06}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def loader(way: str, place: Path, size: int, batch: int, workers: int) -> Any:
    """The loader of a way."""
    if way in (RIVAL, "uint8"):
        last: list[Any] = [transforms.PILToTensor()]
        if way == RIVAL:
            last = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *last]
        files = datasets.ImageFolder(str(place / "folder" / "train"), transforms.Compose(steps))
        return DataLoader(files, batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True)
    options: dict[str, Any] = dict(image_size=size, batch_size=batch, num_workers=workers, val_fraction=0)
    options |= dict(in_memory=False, resizing="pillow" if way == "pillow" else "torch")
    data: ImageDataModule
    if way == "Parquet":
        data = Parquet(str(place / "train.parquet"), **options)
    elif way == "WebDataset":
        data = WebDataset(str(place / "train.tar"), **options)
    else:
        data = ImageFolder(place / "folder", **options)
    return data.train_dataloader()


def _epoch_of(batches: Any) -> Callable[[], None]:
    def load() -> None:
        for _ in batches:
            pass

    return load


def _mean(values: Any) -> int:
    return round(float(np.mean(list(values))))


def _pixels(content: bytes) -> int:
    with Image.open(io.BytesIO(content)) as image:
        return image.width * image.height


def _print(measured: dict[str, Ratio], images: int, workers: int, facts: dict[str, Any], format: Format) -> None:
    rates = {way: images / ratio.seconds / workers for way, ratio in measured.items()}
    subject = f"{facts['images']} images at {facts['size']}x{facts['size']}"
    if format == "json":
        rows = [
            Measurement(subject, "epoch", way, ratio, facts | {"images_a_second_and_core": round(rates[way], 1)})
            for way, ratio in measured.items()
        ]
        print_measurements(rows, "cpu", format)
        return
    machine = environment("cpu")
    Table(
        headings=("", "images a second and core", f"of {RIVAL}'s"),
        rows=[
            (
                way,
                f"{rates[way]:.0f}",
                "1" if way == RIVAL else f"{1 / one.median:.2f} ({1 / one.high:.2f} to {1 / one.low:.2f})",
            )
            for way, one in measured.items()
        ],
        note=f"{subject}, of {facts['pixels']:,} pixels and {facts['bytes']:,} bytes on the average, by {workers} "
        f"processes: median (first to ninth decile) of the rounds. {machine['device']}, torch {machine['torch']}.",
    ).print(format)
