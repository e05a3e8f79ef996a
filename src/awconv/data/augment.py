"""Augmentation of whole batches on the training device. Every sample has random numbers of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def shift(images: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Pads each sample with zeros, then crops it to its former size.

    Args:
        images: shape (N, C, H, W), of any dtype.
        padding: pixels on each side.
        top: first row of each crop in the padded image, from 0 to 2 * padding, shape (N,).
        left: first column of each crop, likewise.
    """
    count, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    rows = (top[:, None] + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width, device=images.device))[:, None, None, :]
    sample = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[sample, channel, rows, columns]


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirrors the samples of a batch, shape (N, C, H, W), for which ``chosen``, shape (N,), is true."""
    return torch.where(chosen[:, None, None, None], images.flip(3), images)
