"""What an ImageNet training of ResNet-50 with AW takes, from the measured steps of a GPU: docs/scaling.md.

    python benchmarks/imagenet_cost.py [--steps results/h200/alone.json] [--json results/imagenet_cost.json]

Steps and images a second are arithmetic on the steps that ``--steps`` holds. The bytes of a checkpoint are those of
one that this writes: weights, and the momentum of SGD.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

import awconv  # noqa: F401  # registers its networks with timm
from awconv.tables import Table

IMAGES = 1_281_167  # of ImageNet-1k's training split
NETWORKS = ("resnet50", "aw_resnet50")
_ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=Path, default=_ROOT / "results" / "h200" / "alone.json")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = costs(json.loads(options.steps.read_text()))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found).markdown(), end="")


def costs(measured: dict[str, Any]) -> dict[str, Any]:
    """The figures of both networks.

    Args:
        measured: what ``benchmarks/gpu.py`` has measured.
    """
    recipe = yaml.safe_load((_ROOT / "recipes" / "imagenet_resnet50.yaml").read_text())
    epochs, batch = recipe["trainer"]["max_epochs"], recipe["data"]["init_args"]["batch_size"]
    per_epoch = IMAGES // batch
    networks = {}
    for name, way in zip(NETWORKS, ("plain", "aw"), strict=True):
        (step,) = (one["seconds"] for one in _entries(measured, "training") if one["way"] == way)
        (memory,) = (one["bytes"] for one in _entries(measured, "memory") if one["way"] == way)
        parameters, checkpoint = _sizes(name)
        networks[name] = {
            "parameters": parameters,
            "step_ms": 1000 * step,
            "images_per_second": batch / step,
            "gpu_hours": epochs * per_epoch * step / 3600,
            "peak_memory_bytes": memory,
            "checkpoint_bytes": checkpoint,
            "gradient_bytes": 4 * parameters,
        }
    about = measured["about"]
    return {
        "device": about["device"],
        "torch": about["torch"],
        "batch": batch,
        "epochs": epochs,
        "images": IMAGES,
        "steps_per_epoch": per_epoch,
        "networks": networks,
    }


def table(found: dict[str, Any]) -> Table:
    """The figures, with their ratios."""
    plain, aw = (found["networks"][name] for name in NETWORKS)
    rows = [
        (title, form(plain[name]), form(aw[name]), f"{aw[name] / plain[name]:.3f}")
        for title, name, form in (
            ("parameters", "parameters", lambda value: f"{value:,}"),
            (f"step of {found['batch']} images, ms", "step_ms", lambda value: f"{value:.1f}"),
            ("images a second, one GPU", "images_per_second", lambda value: f"{value:,.0f}"),
            (f"GPU hours, {found['epochs']} epochs", "gpu_hours", lambda value: f"{value:.1f}"),
            ("peak memory of a step, GB", "peak_memory_bytes", lambda value: f"{value / 1e9:.2f}"),
            ("checkpoint, MB", "checkpoint_bytes", lambda value: f"{value / 1e6:.0f}"),
            ("gradients that GPUs exchange each step, MB", "gradient_bytes", lambda value: f"{value / 1e6:.1f}"),
        )
    ]
    return Table(("", *NETWORKS, "ratio"), rows, "lrrr")


def _entries(measured: dict[str, Any], work: str) -> list[dict[str, Any]]:
    """The results of ResNet-50, not compiled."""
    return [
        one
        for one in measured["runs"]["eager"]["entries"]
        if one["network"] == NETWORKS[1] and one.get("work") == work and one["mode"] is None
    ]


def _sizes(name: str) -> tuple[int, int]:
    """The number of a network's parameters, and the bytes of a checkpoint."""
    network = timm.create_model(name)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    file = io.BytesIO()
    torch.save({"state_dict": network.state_dict(), "optimizer_states": [optimizer.state_dict()]}, file)
    return sum(parameter.numel() for parameter in network.parameters()), file.tell()


if __name__ == "__main__":
    main()
