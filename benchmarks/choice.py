"""Times every algorithm of the operator on typical layers, and says how good the automatic choice is.

Each layer is timed forward and backward, the algorithms and the plain convolution in turn, as ratios of medians to the
plain one. The regret is how much slower the chosen algorithm is than the fastest.

    python benchmarks/choice.py [--device cuda] [--rounds 9] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F
from timing import interleaved

from awconv.ops import aw_conv2d
from awconv.ops.choose import ALGORITHMS, choose
from awconv.ops.problem import describe

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
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device).requires_grad_()

    input, weight = tensor(batch, channels, size, size), tensor(channels, channels // groups, 3, 3)
    attention = tensor(batch, channels, 1, 3, 3)
    problem = describe(2, input, weight, attention, None, stride, 1, 1, groups, True)

    def step(run: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def both_ways() -> None:
            output = run()
            output.backward(torch.ones_like(output))

        return both_ways

    functions = {"plain": step(lambda: F.conv2d(input, weight, None, stride, 1, 1, groups))}
    for name, algorithm in ALGORITHMS.items():
        if algorithm.obstacle(problem) is None:
            functions[name] = step(
                lambda name=name: aw_conv2d(input, weight, attention, None, stride, 1, 1, groups, algorithm=name)
            )
    seconds = {name: median(values) for name, values in interleaved(functions, rounds, device).items()}
    plain = seconds.pop("plain")
    ratios = {name: value / plain for name, value in seconds.items()}
    chosen = choose(problem, "auto", "").name
    return {
        "layer": dict(channels=channels, size=size, batch=batch, stride=stride, groups=groups),
        "ratios": ratios,
        "chosen": chosen,
        "fastest": min(ratios, key=ratios.__getitem__),
        "regret": ratios[chosen] / min(ratios.values()) - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    print("| channels at size (batch, stride, groups) | per tap | per sample | naive | chosen | regret |")
    print("| --- | ---: | ---: | ---: | --- | ---: |")
    for layer in LAYERS:
        result = time_layer(*layer, rounds=arguments.rounds, device=arguments.device)
        results.append(result)
        channels, size, batch, stride, groups = layer
        ratios = " | ".join(f"{result['ratios'][name]:.2f}" for name in ("per_tap", "per_sample", "naive"))
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
