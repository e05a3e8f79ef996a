"""What the attention of a trained network does: its maps, their statistics, what they are worth, and a page of it."""

from awconv.explain.cam import grad_cam, overlay
from awconv.explain.maps import attention_maps

__all__ = ["attention_maps", "grad_cam", "overlay"]
