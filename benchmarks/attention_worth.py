"""What the attention of a trained classifier is worth: its accuracy with other maps in their places.

python benchmarks/attention_worth.py CHECKPOINT FILE.parquet [--images 1500]
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor, nn

from awconv.data import to_uint8
from awconv.layers import AW_LAYERS
from awconv.sources import load_task
from awconv.tasks import ClassificationTask

Change = Callable[[str, Tensor], Tensor]  # of a layer's map, given its name and the batch's maps


def read(file: Path, number: int, size: int) -> tuple[Tensor, Tensor]:
    """A random choice of a file's images, the same each time, and their labels."""
    table = parquet.read_table(file, columns=["image", "label"])
    chosen = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))[:number].tolist()
    files = (io.BytesIO(table.column("image")[index].as_py()["bytes"]) for index in chosen)
    images = torch.stack([to_uint8(Image.open(file).convert("RGB"), 3, size, 1.0) for file in files])
    return images, torch.tensor(table.column("label").to_pylist())[chosen]


def accuracy(task: ClassificationTask, images: Tensor, labels: Tensor, change: Change) -> float:
    """In percent, with changed maps."""
    with ExitStack() as hooks, torch.inference_mode():
        for name, layer in task.evaluated.named_modules():
            if isinstance(layer, AW_LAYERS):
                hooks.enter_context(_changed(name, layer.attention, change))
        right = sum((task(x).argmax(1) == y).sum() for x, y in zip(images.split(100), labels.split(100), strict=True))
    return 100 * int(right) / len(labels)


def _changed(name: str, branch: nn.Module, change: Change) -> torch.utils.hooks.RemovableHandle:
    return branch.register_forward_hook(lambda module, arguments, maps: change(name, maps))


def main(checkpoint: Path, file: Path, number: int) -> None:
    """Prints the accuracies, and how far the maps differ between images."""
    task = load_task(checkpoint)
    assert isinstance(task, ClassificationTask)
    images, labels = read(file, number, task.input_size[1])
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, maps: Tensor) -> Tensor:
        seen.setdefault(name, []).append(maps)
        return maps

    print(f"as trained: {accuracy(task, images, labels, keep):.1f}")
    means = {name: torch.cat(maps).mean(0, keepdim=True) for name, maps in seen.items()}
    spread = _root_mean_square({name: torch.cat(maps) - means[name] for name, maps in seen.items()})
    for what, change in {
        "each layer's mean over the images": lambda name, maps: means[name].expand_as(maps),
        "another image's": lambda name, maps: maps.roll(1, 0),
        "zero": lambda name, maps: torch.zeros_like(maps),
    }.items():
        print(f"{what}: {accuracy(task, images, labels, change):.1f}")
    print(f"root mean square of the maps: {_root_mean_square(means):.4f} of their means, {spread:.4f} around these")


def _root_mean_square(tensors: Mapping[str, Tensor]) -> float:
    squares = sum(float(tensor.double().square().sum()) for tensor in tensors.values())
    return float((squares / sum(tensor.numel() for tensor in tensors.values())) ** 0.5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path, help="Parquet with the columns image and label")
    parser.add_argument("--images", type=int, default=1500)
    arguments = parser.parse_args()
    main(arguments.checkpoint, arguments.file, arguments.images)
