"""Attributions of AW networks by Captum and pytorch-grad-cam."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import awconv
from awconv import AWConv2d
from awconv.explain import grad_cam
from awconv.integrations.deep_lift import complete_products
from tests.networks import moved

attr: Any = pytest.importorskip("captum.attr", reason="needs captum")
LABELS = torch.tensor([3, 7])


def network() -> nn.Module:
    return moved(timm.create_model("aw_resnet8_cifar", in_chans=1))


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).gather(1, LABELS[:, None])[:, 0]


def test_integrated_gradients_are_complete() -> None:
    model, images = network(), torch.randn(2, 1, 16, 16)
    baseline = torch.zeros_like(images)
    difference = logits(model, images) - logits(model, baseline)
    errors = []
    for steps in (20, 500):
        found = attr.IntegratedGradients(model).attribute(images, baseline, target=LABELS, n_steps=steps)
        errors.append(((found.sum((1, 2, 3)) - difference) / difference).abs().max().item())
    # The error of a sum for an integral, across the kinks of ReLU: it falls with the number of steps.
    assert errors[1] < min(0.01, errors[0])


NETWORKS: dict[str, dict[str, Any]] = {
    "fresh": {},
    "identity": dict(init="identity", activation="tanh"),
    "without residual": dict(init="identity", residual=False),
    "input gain": dict(init="identity", input_gain=True),
    "shared values": dict(activation="relu", out_expansion=4, in_expansion=4, kernel_expansion=3),
    "without norms": dict(norm_layer=None),
}


@pytest.mark.parametrize("shap", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_deep_lift_is_complete_with_our_rule_for_products_and_not_without(kind: str, shap: bool) -> None:
    # In double precision, so that what is missing is not rounding.
    model = moved(awconv.convert(timm.create_model("resnet8_cifar", in_chans=1), **NETWORKS[kind])).double()
    images, baselines = torch.randn(2, 1, 8, 8).double(), torch.randn(3 if shap else 2, 1, 8, 8).double()
    method = attr.DeepLiftShap(model) if shap else attr.DeepLift(model)
    expected = logits(model, images) - (
        model(baselines).detach()[:, LABELS].mean(0) if shap else logits(model, baselines)
    )
    alone = method.attribute(images, baselines, target=LABELS).sum((1, 2, 3))
    assert (alone - expected).abs().max() > 1e-3 * expected.abs().max()
    before = model(images)
    with complete_products(model):
        torch.testing.assert_close(model(images), before, rtol=1e-9, atol=1e-9)  # another algorithm's order
        found = method.attribute(images, baselines, target=LABELS).sum((1, 2, 3))
    # DeepLift divides by differences of activations, and takes the gradient where one is below 1e-10.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(model(images), before)


def test_contributions_of_a_product_are_those_of_its_two_halves() -> None:
    """A layer by itself, against the rule by hand: both factors linear in the image."""
    layer = awconv.AWConv2d(2, 3, 1, norm_layer=None, activation=nn.Identity(), bias=False).eval().double()
    nn.init.ones_(layer.attention.conv1.weight)  # positive before ReLU, which is then linear
    images, baselines = torch.rand(2, 2, 4, 4).double() + 1, torch.rand(2, 2, 4, 4).double() + 1
    network = nn.Sequential(layer, nn.Flatten())
    with complete_products(network):
        found = attr.DeepLift(network).attribute(images, baselines, target=5)
    attention = [layer.attention(batch)[:, 0, 0, 0, 0] for batch in (images, baselines)]
    weight, place = layer.weight[0, :, 0, 0], (slice(None), slice(None), 1, 1)  # logit 5: channel 0, row 1, column 1
    gain = 1 + (attention[0] + attention[1]) / 2
    of_pixel = (images - baselines)[place] * weight * gain[:, None]
    product = ((images + baselines)[place] / 2 * weight).sum(1)
    of_map = torch.autograd.functional.jacobian(lambda x: layer.attention(x)[:, 0, 0, 0, 0].sum(), images)
    expected = of_map * (images - baselines) * product[:, None, None, None]
    expected[place] += of_pixel
    torch.testing.assert_close(found, expected.detach())


def test_what_is_not_deep_lifts_is_refused() -> None:
    model = network()
    with complete_products(model):
        with pytest.raises(ValueError, match="images and as many baselines, got 3"):
            model(torch.randn(3, 1, 8, 8))
        assert type(model.layer1[0].conv1) is not AWConv2d
    assert type(model.layer1[0].conv1) is AWConv2d
    with pytest.raises(ValueError, match="Sequential has no AW-convolution"), complete_products(nn.Sequential()):
        pass


def test_attributions_of_occlusion_are_differences_of_logits() -> None:
    model, images = network(), torch.randn(2, 1, 8, 8)
    found = attr.Occlusion(model).attribute(images, (1, 4, 4), target=LABELS, strides=(1, 4, 4), baselines=0)
    for top in (0, 4):
        for left in (0, 4):
            covered = images.clone()
            covered[:, :, top : top + 4, left : left + 4] = 0
            expected = logits(model, images) - logits(model, covered)
            # Other batch sizes add in another order.
            torch.testing.assert_close(found[:, 0, top, left], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["layer2", "layer2.0.conv2"])
def test_grad_cam_of_both_libraries_is_ours(name: str) -> None:
    library: Any = pytest.importorskip("pytorch_grad_cam", reason="needs grad-cam")
    model, images = network(), torch.randn(2, 1, 16, 16)
    layer = model.get_submodule(name)
    expected = grad_cam(model, images, LABELS, name)
    raw = attr.LayerGradCam(model, layer).attribute(images, target=LABELS, relu_attributions=True).detach()
    resized = F.interpolate(raw, (16, 16), mode="bilinear")[:, 0]
    low, high = resized.amin((1, 2), keepdim=True), resized.amax((1, 2), keepdim=True)
    # OpenCV, by which grad-cam resizes, adds in another order; and it divides by the maximum and 1e-7.
    torch.testing.assert_close((resized - low) / (high - low), expected, rtol=0, atol=1e-4)
    targets = [library.utils.model_targets.ClassifierOutputTarget(int(label)) for label in LABELS]
    with library.GradCAM(model=model, target_layers=[layer]) as cam:
        assert torch.equal(torch.from_numpy(cam(input_tensor=images, targets=targets)), expected)


@pytest.mark.parametrize("method", ["ScoreCAM", "AblationCAM", "FullGrad", "EigenCAM"])
def test_methods_that_hook_or_replace_layers_leave_the_network_as_it_was(method: str) -> None:
    library: Any = pytest.importorskip("pytorch_grad_cam", reason="needs grad-cam")
    model, images = network(), torch.randn(2, 1, 16, 16)
    before, modules = model(images), list(model.modules())
    targets = [library.utils.model_targets.ClassifierOutputTarget(int(label)) for label in LABELS]
    with getattr(library, method)(model=model, target_layers=[model.layer2[0].conv2]) as cam:
        heat = torch.from_numpy(cam(input_tensor=images, targets=targets))
    assert heat.shape == (2, 16, 16)
    assert heat.isfinite().all()
    assert heat.max() > 0.99  # of an image with a place that speaks for its class
    assert list(model.modules()) == modules
    assert isinstance(model.layer2[0].conv2, AWConv2d)
    assert torch.equal(model(images), before)


def test_lrp_has_no_rule_for_the_end_of_a_branch() -> None:
    with pytest.raises(TypeError, match="Sigmoid"):
        attr.LRP(network()).attribute(torch.randn(2, 1, 8, 8), target=LABELS)


def test_a_copy_that_is_made_meanwhile_is_the_network_itself() -> None:
    model, images = network().eval(), torch.randn(3, 1, 16, 16)  # an odd batch, which the context refuses
    expected = model(images)
    with complete_products(model):
        copied = copy.deepcopy(model)
        with pytest.raises(ValueError, match="is within such a context already"), complete_products(model):
            pass
    for one in (copied, model):
        assert type(one.layer1[0].conv1) is AWConv2d
        assert torch.equal(one(images), expected)
