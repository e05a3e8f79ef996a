"""Where in an image a classifier finds its class: Grad-CAM (arXiv 1610.02391), by the library grad-cam."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from awconv.explain.maps import on_device_of, plain_name, running, unwrapped
from awconv.extras import require

if TYPE_CHECKING:
    from PIL import Image


class NoFeatureMapError(ValueError):
    """No feature map of a network has more than a pixel for images of this size."""


def grad_cam(
    network: nn.Module,
    images: Tensor,
    classes: Sequence[int] | Tensor | None = None,
    layer: str | nn.Module | None = None,
) -> Tensor:
    """How much each place of an image speaks for a class, by Grad-CAM (Selvaraju et al. 2017, equations 1 and 2).

    The feature map's channels are summed with weights, the mean gradients of the class's logit; what is positive is
    resized to the image, and goes from 0 to 1 in each image. A feature map of few pixels gives a coarse picture.

    The network runs in evaluation mode and is left as it was: modes, hooks, gradients, and what of it is frozen.

    Args:
        network: a classifier of images: logits of shape (N, classes). It may be compiled, fused, frozen or plain.
        images: as the network takes them, shape (N, C, H, W).
        classes: the index of a class for each image; None takes the class that the network predicts.
        layer: the feature map is the output of this module, or of the one with this name. None takes the last one that
            has an output of four axes and more than one pixel: what the classifier pools. It runs once in a pass.

    Returns:
        float32, shape (N, H, W), from 0 to 1, on the CPU. All 0 where nothing speaks for the class, or all places
            alike.

    Raises:
        ModuleNotFoundError: the extra ``explain`` is not installed.
        TypeError: ``network`` is no module.
        NoFeatureMapError: no feature map has more than a pixel; a ValueError.
        ValueError: images, classes or the layer are not as above, or the network is no classifier or in bfloat16.

    Examples:
        >>> import timm
        >>> import torch
        >>> from awconv.explain import grad_cam
        >>> model = timm.create_model("aw_resnet8_cifar.digits", pretrained=True)
        >>> heat = grad_cam(model, torch.randn(2, 1, 8, 8))
        >>> heat.shape, bool((heat >= 0).all() and (heat <= 1).all())
        (torch.Size([2, 8, 8]), True)
    """
    library = require("pytorch_grad_cam", extra="explain")
    model = unwrapped(network, "grad_cam")
    if any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        raise ValueError("grad_cam: the library takes no network in bfloat16; give copy.deepcopy(network).float()")
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            "grad_cam: images must be a floating-point tensor of shape (N, C, H, W), as the network takes them; got "
            + (f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__)
        )
    with torch.inference_mode(False), running(model), _frozen(model), ExitStack() as stack:
        images = on_device_of(model, images.detach().clone())
        target, count = _feature_map(model, images[:1], None if layer is None else _named(model, layer))
        targets = _targets(library, classes, len(images), count)
        # The graph starts at the feature map: nothing before it needs gradients.
        stack.callback(target.register_forward_hook(_start_graph).remove)
        cam = library.GradCAM(model=model, target_layers=[target], reshape_transform=torch.clone)
        stack.callback(cam.activations_and_grads.release)
        with torch.enable_grad():
            heat = cam(input_tensor=images, targets=targets)
    return torch.from_numpy(heat).float().clamp(0, 1)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of parameters, which the library would clear."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, requires_grad, gradient in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def _start_graph(module: nn.Module, arguments: Any, output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 4:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"grad_cam: layer must have an output of shape (N, C, H, W), and it has {got}")
    with torch.enable_grad():
        return output.detach().requires_grad_().clone()  # which what follows may change in place


def _feature_map(model: nn.Module, images: Tensor, layer: nn.Module | None) -> tuple[nn.Module, int]:
    """The module whose output is the feature map, and the number of classes.

    Args:
        model: the network.
        images: one, with a batch axis.
        layer: the module; None finds the last one.
    """
    seen: list[nn.Module] = []
    calls: Counter[nn.Module] = Counter()

    def see(module: nn.Module, arguments: Any, output: Any) -> None:
        calls[module] += 1
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2:].numel() > 1:
            seen.append(module)

    with ExitStack() as hooks, torch.no_grad():
        for module in model.modules():
            hooks.callback(module.register_forward_hook(see).remove)
        logits = model(images)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = f"of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"grad_cam: network must be a classifier, with logits of shape (N, classes); its output is {got}"
        )
    if layer is not None:
        if calls[layer] != 1:
            raise ValueError(
                f"grad_cam: layer must run once in a pass, and this {type(layer).__name__} runs {calls[layer]} times"
            )
        return layer, logits.shape[1]
    once = [module for module in seen if calls[module] == 1]
    if not once:
        raise NoFeatureMapError(
            f"grad_cam: {type(model).__name__} has no feature map of more than one pixel, of a module that runs once, "
            f"for images of {images.shape[2]}x{images.shape[3]} pixels; take larger images, or name an earlier layer"
        )
    return once[-1], logits.shape[1]


def _named(model: nn.Module, layer: str | nn.Module) -> nn.Module:
    modules = {plain_name(name): module for name, module in model.named_modules()}
    found = modules.get(layer) if isinstance(layer, str) else layer
    if found is None or found not in modules.values():
        raise ValueError(
            f"grad_cam: layer must be a module of the network or its name, got {layer!r}; its parts are "
            f"{', '.join(name for name, _ in model.named_children())}"
        )
    return found


def _targets(library: Any, classes: Sequence[int] | Tensor | None, images: int, count: int) -> list[Any] | None:
    if classes is None:
        return None
    indices = [int(index) for index in classes]
    if len(indices) != images or not all(0 <= index < count for index in indices):
        raise ValueError(
            f"grad_cam: classes must hold an index from 0 to {count - 1} for each of {images} images, got {indices}"
        )
    of_class = library.utils.model_targets.ClassifierOutputTarget
    return [of_class(index) for index in indices]


def overlay(image: Image.Image, heat: Tensor, opacity: float = 0.6) -> Image.Image:
    """An image in grey under the colours of a heat map, by matplotlib's "inferno", which the colour-blind read, too.

    Args:
        image: any Pillow image.
        heat: from 0 to 1, shape (H, W); it is resized to the image.
        opacity: of the colours where the heat is 1, from 0 to 1; where it is 0 they have a third of it.

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: ``heat`` or ``opacity`` is not as above.

    Examples:
        >>> import torch
        >>> from PIL import Image
        >>> from awconv.explain import overlay
        >>> overlay(Image.new("RGB", (40, 30)), torch.rand(15, 20)).size
        (40, 30)
    """
    require("matplotlib", extra="explain")
    from matplotlib import colormaps
    from PIL import Image as Images

    if not isinstance(heat, Tensor) or heat.dim() != 2 or not bool(((heat >= 0) & (heat <= 1)).all()):
        raise ValueError("overlay: heat must be a tensor of shape (H, W) with values from 0 to 1")
    if not 0 <= opacity <= 1:
        raise ValueError(f"overlay: opacity must be from 0 to 1, got {opacity}")
    grey = image.convert("L").convert("RGB")
    size = (grey.height, grey.width)
    resized = torch.nn.functional.interpolate(heat[None, None].float().cpu(), size, mode="bilinear")[0, 0].clamp(0, 1)
    colours = Images.fromarray(colormaps["inferno"](resized.numpy(), bytes=True)[..., :3])
    shown = Images.fromarray((255 * opacity * (1 + 2 * resized) / 3).round().to(torch.uint8).numpy())
    return Images.composite(colours, grey, shown)
