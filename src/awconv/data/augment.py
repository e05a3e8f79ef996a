"""Augmentation of whole batches on the device that trains, every sample by numbers of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def shift(images: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Pads with zeros and crops each sample to its size again.

    Args:
        images: shape (N, C, H, W), of any dtype.
        padding: pixels on each side.
        top: where the crops begin in the padded images, from 0 to 2 * padding, shape (N,).
        left: the same.
    """
    count, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    rows = (top[:, None] + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width, device=images.device))[:, None, None, :]
    sample = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[sample, channel, rows, columns]


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirrors the samples of a batch, shape (N, C, H, W), where ``chosen``, shape (N,), is true."""
    return torch.where(chosen[:, None, None, None], images.flip(3), images)
