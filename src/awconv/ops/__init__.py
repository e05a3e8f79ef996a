"""The operator. ``naive.py`` defines it; every other file computes the same faster; ``choose.py`` chooses."""

from awconv.ops import flops  # noqa: F401 - tells torch what the operators cost
from awconv.ops.choose import use_algorithm
from awconv.ops.functional import aw_conv1d, aw_conv2d, aw_conv3d

__all__ = ["aw_conv1d", "aw_conv2d", "aw_conv3d", "use_algorithm"]
