"""What the kernels for GPUs share: Triton, the layout of images, sizes of tiles."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def triton_obstacle() -> str | None:
    """Why Triton's kernels cannot be compiled here, a constant to torch.compile; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "its kernels for GPUs need Triton, which is not installed"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "its kernels for GPUs need compute capability 8.0"
    return None


def is_channels_last(image: Tensor) -> bool:
    """Whether an image of two spatial axes has its channels last, and cannot be read otherwise."""
    return image.dim() == 4 and image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()


def empty_like_image(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised image, with its channels last where those of another are."""
    last = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=last)


def power_of_two(size: int, most: int, least: int = 1) -> int:
    """The power of two that holds a number of channels or positions, within what a tile may have."""
    return min(max(1 << (size - 1).bit_length(), least), most)


def divider(divisor: int) -> tuple[int, int]:
    """Multiplier (in 32 bits, signed) and shift by which kernels divide: see ``divide`` in ``triton_arithmetic.py``."""
    shift = (divisor - 1).bit_length()
    multiplier = -(-(2 ** (31 + shift)) // divisor)
    return multiplier - 2**32 if multiplier >= 2**31 else multiplier, shift
