"""Augmentation of whole batches on the device that trains, every sample with its own draw."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Pads with zeros and crops each sample to its size again, at a place of its own.

    Args:
        images: shape (N, C, H, W), of any dtype.
        padding: pixels on each side.
    """
    count, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1), device=images.device)
    rows = (top + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (left + torch.arange(width, device=images.device))[:, None, None, :]
    sample = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[sample, channel, rows, columns]


def random_horizontal_flip(images: Tensor) -> Tensor:
    """Mirrors each sample of a batch, shape (N, C, H, W), with probability 1/2."""
    flip = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flip, images.flip(3), images)
