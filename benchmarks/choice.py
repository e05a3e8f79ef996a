"""Times every algorithm of the operator on typical layers, and says how good the automatic choice is.

Each layer is timed forward and backward, the algorithms and the plain convolution in turn, as ratios of medians to the
plain one. The regret is how much slower the chosen algorithm is than the fastest.

    python benchmarks/choice.py [--device cuda] [--rounds 9] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

import torch

from awconv.bench.op import Layer

# Channels, size, batch, stride, groups: the 3x3 layers of ResNet-50, of ResNet-20 for CIFAR, of ResNet-8 on digits,
# and of MobileNets.
LAYERS = [
    (64, 56, 8, 1, 1),
    (128, 56, 8, 2, 1),
    (128, 28, 8, 1, 1),
    (256, 28, 8, 2, 1),
    (256, 14, 8, 1, 1),
    (512, 14, 8, 2, 1),
    (512, 7, 8, 1, 1),
    (16, 32, 128, 1, 1),
    (32, 16, 128, 1, 1),
    (64, 8, 128, 1, 1),
    (16, 8, 64, 1, 1),
    (32, 4, 64, 1, 1),
    (64, 2, 64, 1, 1),
    (144, 28, 8, 1, 144),
    (384, 14, 8, 1, 384),
]


def time_layer(channels: int, size: int, batch: int, stride: int, groups: int, rounds: int, device: str) -> dict:
    """The ratios of one layer's algorithms to the plain convolution."""
    layer = Layer(channels, size, batch, 3, stride=stride, groups=groups, device=device)
    timed = layer.time(["all"], "step", rounds)
    ratios = {way: ratio.median for way, ratio in timed.items() if way != "plain"}
    return {
        "layer": dict(channels=channels, size=size, batch=batch, stride=stride, groups=groups),
        "ratios": ratios,
        "chosen": layer.chosen,
        "fastest": min(ratios, key=ratios.__getitem__),
        "regret": ratios[layer.chosen] / min(ratios.values()) - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    print("| channels at size (batch, stride, groups) | fused | per tap | per sample | naive | chosen | regret |")
    print("| --- | ---: | ---: | ---: | ---: | --- | ---: |")
    for layer in LAYERS:
        result = time_layer(*layer, rounds=arguments.rounds, device=arguments.device)
        results.append(result)
        channels, size, batch, stride, groups = layer
        ratios = " | ".join(
            f"{result['ratios'].get(name, float('nan')):.2f}" for name in ("fused", "per_tap", "per_sample", "naive")
        )
        print(
            f"| {channels} at {size} ({batch}, {stride}, {groups}) | {ratios} | {result['chosen']} | "
            f"{100 * result['regret']:.0f} % |",
            flush=True,
        )
    right = sum(result["chosen"] == result["fastest"] for result in results)
    print(
        f"\nThe fastest was chosen for {right} of {len(results)} layers; the mean regret is "
        f"{100 * mean(result['regret'] for result in results):.1f} %. torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {arguments.device}."
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
