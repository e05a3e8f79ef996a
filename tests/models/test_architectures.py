"""Networks of many families compute the same after a conversion with ``init="identity"``."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from awconv import AWConv1d, AWConv2d, AWConv3d, convert

# One or more of each family of timm that looks at more than one position in more than its stem.
TIMM = (
    "convmixer_768_32@32",
    "convnext_atto",
    "cs3darknet_focus_s",
    "cspresnet50",
    "davit_tiny",
    "densenet121",
    "dla46x_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformerv2_s0@224",
    "efficientvit_b0",
    "efficientvit_m0@224",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gernet_s",
    "ghostnet_050",
    "hgnetv2_b0",
    "hrnet_w18_small",
    "inception_next_atto",
    "legacy_seresnet18",
    "legacy_xception",
    "levit_128s@224",
    "mixnet_s",
    "mnasnet_small",
    "mobilenetv1_100",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "mobilevit_xxs",
    "poolformerv2_s12",
    "pvt_v2_b0",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m1",
    "res2net50_14w_8s",
    "resnest14d",
    "resnet10t",
    "resnet50_gn",
    "resnetv2_50",
    "rexnet_100",
    "selecsls42",
    "seresnet18",
    "skresnet18",
    "cbamresnet20_cifar",
    "tf_efficientnet_lite0",
    "tf_mixnet_s",
    "visformer_tiny@224",
    "ese_vovnet19b_slim_dw",
    "xcit_nano_12_p16_224@224",
)
TORCHVISION = (
    "alexnet",
    "convnext_tiny",
    "efficientnet_b0",
    "googlenet",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
)
VIDEO = ("mc3_18", "r2plus1d_18", "r3d_18")
SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
AW = (AWConv1d, AWConv2d, AWConv3d)
# Seconds each, and made of the layers of others here: make campaign runs them.
SLOW = (
    *("convmixer_768_32", "davit_tiny", "efficientformerv2_s0", "focalnet_tiny_srf", "legacy_xception"),
    *("res2net50_14w_8s", "selecsls42", "visformer_tiny", "xcit_nano_12_p16_224"),
    *("torchvision-convnext_tiny", "torchvision-r2plus1d_18", "torchvision-r3d_18"),
)


def networks() -> list[Any]:
    weightless = dict(weights=None, weights_backbone=None, num_classes=5)
    cases: list[tuple[Any, ...]] = []
    for given in TIMM:
        name, _, size = given.partition("@")
        cases.append((name, timm.create_model, (name,), dict(num_classes=5), (3, int(size or 64))))
    for name in TORCHVISION:
        arguments = dict(weights=None, num_classes=5) | (dict(init_weights=False) if name == "googlenet" else {})
        cases.append((f"torchvision-{name}", torchvision.models.get_model, (name,), arguments, (3, 64)))
    for name in VIDEO:
        model, arguments = torchvision.models.get_model, dict(weights=None, num_classes=5)
        cases.append((f"torchvision-{name}", model, (name,), arguments, (3, 4, 32)))
    for name in SEGMENTATION:
        cases.append((f"torchvision-{name}", torchvision.models.get_model, (name,), weightless, (3, 64)))
    assert set(SLOW) <= {name for name, *_ in cases}
    return [pytest.param(*case, id=name, marks=pytest.mark.campaign if name in SLOW else ()) for name, *case in cases]


def spread(model: nn.Module) -> nn.Module:
    """Gives norms and scales random values: many networks start with blocks that add nothing to their input."""
    for parameter in model.parameters():
        if parameter.dim() == 1 or parameter.numel() == max(parameter.shape, default=1):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    torch.manual_seed(1)  # of dropout
    given = model(images)
    if isinstance(given, dict):  # torchvision's segmentation
        given = given["out"]
    return given[0] if isinstance(given, tuple) else given  # GoogLeNet's auxiliary outputs


@pytest.mark.parametrize(("build", "names", "arguments", "size"), networks())
def test_identity_keeps_what_a_network_computes_and_gives_every_branch_a_gradient(
    build: Any, names: tuple[str], arguments: dict[str, Any], size: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    # In double precision, so that rounding (1e-16) stays far below the tolerance however deep and wild the network is,
    # and an error of any layer far above it.
    plain = spread(build(*names, **arguments)).double()
    images = torch.randn(2, size[0], *size[1:-1], size[-1], size[-1]).double()
    with caplog.at_level(logging.ERROR, logger="awconv"):
        converted = convert(copy.deepcopy(plain), init="identity")
    layers = {name: module for name, module in converted.named_modules() if isinstance(module, AW)}
    assert layers
    called: set[str] = set()
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: called.add(name))

    for train in (True, False):
        expected, computed = (outputs(model.train(train), images) for model in (plain, converted))
        scale = expected.abs().max()
        assert torch.isfinite(scale)
        assert scale > 0
        torch.testing.assert_close(computed / scale, expected / scale, rtol=0, atol=1e-9)

    converted.zero_grad()
    outputs(converted.train(), images).square().sum().backward()
    assert called
    for name in called:
        gradient = layers[name].attention.norm2.weight.grad
        assert torch.isfinite(gradient).all(), name
        assert gradient.any(), name
