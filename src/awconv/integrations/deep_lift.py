"""DeepLift's contributions through the products of AW-convolutions (arXiv 1704.02685), for the library Captum."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from awconv.input_gain import unit_of
from awconv.integrations.stand_in import StandIn, made_class, refuse_nested, standing_in
from awconv.layers import AW_LAYERS
from awconv.ops import aw_conv1d, aw_conv2d, aw_conv3d

_CONVOLVE: dict[int, Any] = {1: aw_conv1d, 2: aw_conv2d, 3: aw_conv3d}


@contextmanager
def complete_products(model: nn.Module) -> Iterator[None]:
    """Makes DeepLift complete for a network with AW-convolutions, while the context lasts.

    An AW layer multiplies two things that depend on the image: the image's features, and the weights that its attention
    makes. A product changes from a b to a' b' by (a' - a) (b + b') / 2 + (b' - b) (a + a') / 2. So each factor's
    gradient is taken where the other one is halfway between image and baseline. What the layers compute is the same.

    While the context lasts, a batch must hold images and then as many baselines, as Captum's ``DeepLift`` and
    ``DeepLiftShap`` make one.

    Args:
        model: a network with AW-convolutions, in evaluation mode.

    Raises:
        ValueError: the network has no AW-convolution, or is within such a context already, or a batch is of an odd
            size.

    Examples:
        >>> import timm
        >>> import torch
        >>> from awconv.integrations.deep_lift import complete_products
        >>> model = timm.create_model("aw_resnet8_cifar.digits", pretrained=True).eval()
        >>> with complete_products(model):  # doctest: +SKIP
        ...     captum.attr.DeepLift(model).attribute(images, baselines, target=labels)
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AW_LAYERS)}
    refuse_nested(layers, "complete_products")
    if not layers:
        raise ValueError(
            f"complete_products: {type(model).__name__} has no AW-convolution; Captum's rules are complete without it"
        )
    with standing_in({layer: made_class(_Halfway, type(layer)) for layer in layers.values()}):
        yield


class _Halfway(StandIn):
    """An AW layer whose gradients are those halfway between images and baselines."""

    def forward(self: Any, input: Tensor) -> Tensor:
        """Shapes as the layer's; the batch is images and as many baselines."""
        if input.shape[0] % 2:
            raise ValueError(
                f"complete_products: a batch must hold images and as many baselines, got {input.shape[0]}; it is for "
                "Captum's DeepLift alone, and what else runs the network belongs outside of the context"
            )
        if self.input_attention is not None:
            gain = self.input_attention(input).squeeze(1) + unit_of(self.input_attention)
            input = _exactly(input * gain, _halfway(input) * _halfway(gain))
        attention = self.attention(input)
        return _exactly(self.with_map(input, attention), self.with_map(_halfway(input), _halfway(attention)))

    def with_map(self: Any, input: Tensor, attention: Tensor) -> Tensor:
        """The convolution by a map."""
        padded, padding = self._pad(input)
        geometry = (self.bias, self.stride, padding, self.dilation, self.groups)
        convolve, residual = _CONVOLVE[len(self.kernel_size)], bool(unit_of(self.attention))
        output: Tensor = convolve(padded, self.weight, attention, *geometry, residual=residual)
        return output


def _halfway(tensor: Tensor) -> Tensor:
    """The mean of images and baselines in the place of both, with their gradient."""
    images, baselines = tensor.detach().chunk(2)
    mean = (images + baselines) / 2
    return tensor + (torch.cat([mean, mean]) - tensor.detach())


def _exactly(value: Tensor, gradient: Tensor) -> Tensor:
    """One tensor's values with another one's gradient."""
    return value.detach() + (gradient - gradient.detach())
