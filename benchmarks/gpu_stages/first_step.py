"""Prints how long a network's first and second training steps take in a fresh process, as JSON.

python -m gpu_stages.first_step NETWORK BATCH SIZE DEVICE ALGORITHM
"""

from __future__ import annotations

import json
import sys
import time

import timm
import torch

import awconv  # noqa: F401  # its networks
from awconv.bench.model import Side


def main(network: str, batch: str, size: str, device: str, algorithm: str) -> None:
    images = torch.randn(int(batch), 3, int(size), int(size), device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    side = Side(timm.create_model(network), algorithm, images, "bfloat16", device, channels_last=True)
    seconds = []
    for _ in range(2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        side.training()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"first": seconds[0], "second": seconds[1]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
