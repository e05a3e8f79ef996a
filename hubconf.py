"""awconv's models for torch.hub: ``torch.hub.load("OWNER/awconv", "aw_resnet50")``."""

dependencies = ["torch", "torchvision", "timm"]

import sys
from pathlib import Path as _Path

sys.path.insert(0, str(_Path(__file__).parent / "src"))

import timm

import awconv.models  # noqa: F401  # registers them with timm

for _name in timm.list_models(module="registry"):
    globals()[_name] = timm.models.model_entrypoint(_name)
