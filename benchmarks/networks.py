"""Times networks against their plain twins: forward in evaluation, and a training step.

Twins take turns in one process; the ratios are of medians.

    python benchmarks/networks.py aw_resnet20_cifar --batch 128
    python benchmarks/networks.py aw_resnet50 --batch 8
"""

from __future__ import annotations

import argparse
from statistics import median

import timm
import torch
from timing import interleaved

import awconv  # noqa: F401  # registers the models with timm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="name of an AW network; its plain twin has the name without aw_")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    names = (arguments.network.removeprefix("aw_"), arguments.network)
    networks = {name: timm.create_model(name).to(arguments.device) for name in names}
    size = networks[arguments.network].default_cfg["input_size"]
    images = torch.randn(arguments.batch, *size, device=arguments.device)

    def forward(name: str) -> None:
        with torch.inference_mode():
            networks[name].eval()(images)

    def step(name: str) -> None:
        networks[name].train().zero_grad()
        networks[name](images).square().mean().backward()

    for work, function in (("forward", forward), ("training step", step)):
        functions = {name: (lambda name=name, function=function: function(name)) for name in names}
        seconds = interleaved(functions, arguments.rounds, arguments.device)
        plain, aw = (median(seconds[name]) for name in names)
        rounds = sorted(b / a for a, b in zip(*(seconds[name] for name in names), strict=True))
        print(
            f"{arguments.network}, {work}, batch {arguments.batch}, {arguments.device}: ratio {aw / plain:.2f} "
            f"(rounds {rounds[0]:.2f} to {rounds[-1]:.2f})",
            flush=True,
        )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
