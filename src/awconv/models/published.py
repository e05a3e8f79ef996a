"""Weights that come with the package: a folder each, in the layout of Hugging Face's hub.

``weights/NETWORK.TAG/`` holds ``model.safetensors``, ``config.json`` (timm's, and the file's SHA-256) and the model
card, ``README.md``. ``timm.create_model("NETWORK.TAG", pretrained=True)`` loads them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).with_name("weights")
FILE, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
PICKLED = "pytorch_model.bin"  # in the place of FILE, of timm's save_for_hf; read as data alone
ADAPTER = "adapter.safetensors"  # in the place of FILE, where the rest of the network was frozen


def published(network: str) -> dict[str, dict[str, Any]]:
    """timm's configurations of the weights that there are for a network, by tag."""
    found = {}
    for folder in sorted(WEIGHTS.glob(f"{network}.*")):
        config = json.loads((folder / CONFIG).read_text())
        found[folder.name.removeprefix(f"{network}.")] = config["pretrained_cfg"] | dict(file=str(folder / FILE))
    return found


def sha256(file: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def verify(file: Path) -> None:
    """Compares a file of published weights with the checksum in the configuration beside it, if there is one.

    Raises:
        ValueError: they differ.
    """
    config = file.parent / CONFIG
    if file.name != FILE or not config.is_file():
        return
    expected = json.loads(config.read_text()).get("sha256")
    if expected is not None and sha256(file) != expected:
        raise ValueError(
            f"{file} is not the published file: its SHA-256 must be {expected}, got {sha256(file)}; download it or "
            "install awconv again"
        )
