"""awconv's models for torch.hub: ``torch.hub.load("OWNER/awconv", "aw_resnet50")``."""

dependencies = ["torch", "torchvision", "timm"]

import sys
from pathlib import Path as _Path

sys.path.insert(0, str(_Path(__file__).parent / "src"))

import timm

import awconv.models

for _name in timm.list_models(module=awconv.models.registry.__name__.split(".")[-1]):
    globals()[_name] = timm.models.model_entrypoint(_name)
