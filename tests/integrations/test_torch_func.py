"""torch.func over whole networks: ensembles side by side, and the gradients of each image."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import awconv
from tests.networks import moved

EXACT = dict(rtol=1e-8, atol=1e-10)  # float64; products come side by side, which changes the order of sums


def resnet8(name: str = "resnet8_cifar") -> nn.Module:
    model: nn.Module = timm.create_model(name, num_classes=3)
    return model


def by_identity(**arguments: bool) -> nn.Module:
    """A network that has left the identity."""
    return moved(awconv.convert(resnet8(), init="identity", **arguments))


def all_kinds() -> nn.Module:
    """One, two and three axes, groups, padding that the operator does not know, norms of a sample."""
    group_norm = partial(nn.GroupNorm, 1)
    return nn.Sequential(
        awconv.AWConv2d(3, 6, 3, padding=1, padding_mode="reflect", norm_layer=group_norm),
        nn.ReLU(),
        awconv.AWConv2d(6, 6, 3, stride=2, groups=6, bias=False, norm_layer=None),
        nn.Unflatten(1, (2, 3)),
        awconv.AWConv3d(2, 3, (1, 2, 3), norm_layer=group_norm),
        nn.Flatten(2),
        awconv.AWConv1d(3, 3, 5, input_gain=True, norm_layer=group_norm),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "the paper's": lambda: resnet8("aw_resnet8_cifar"),
    "by identity": by_identity,
    "with a gain over input channels": lambda: by_identity(input_gain=True),
    "ODConv": lambda: moved(resnet8("od_resnet8_cifar")),
    "all kinds of layers": all_kinds,
}


def made(name: str) -> nn.Module:
    model = NETWORKS[name]().double()
    model(torch.randn(2, 3, 16, 16).double())  # lazy layers; running statistics other than 0 and 1
    return model


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_networks_of_an_ensemble_train_side_by_side(name: str, training: bool) -> None:
    images, labels = torch.randn(4, 3, 16, 16).double(), torch.tensor([0, 1, 2, 1])
    models = [made(name).train(training) for _ in range(3)]
    parameters, buffers = stack_module_state(copy.deepcopy(models))
    skeleton = copy.deepcopy(models[0]).to("meta")

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = functional_call(skeleton, (parameters, buffers), (images,))
        return F.cross_entropy(logits, labels), logits

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns where it runs one network after another
        grads, together = vmap(grad(loss, has_aux=True))(parameters, buffers)
    for index, model in enumerate(models):
        logits = model(images)
        torch.testing.assert_close(together[index], logits, **EXACT)
        F.cross_entropy(logits, labels).backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(grads[key][index], parameter.grad, **EXACT, msg=key)
        for key, buffer in model.named_buffers():
            torch.testing.assert_close(buffers[key][index], buffer, **EXACT, msg=key)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_image_has_gradients_of_its_own(name: str) -> None:
    images, labels = torch.randn(3, 3, 16, 16).double(), torch.tensor([0, 1, 2])
    model = made(name).eval()
    state = {key: tensor.detach() for key, tensor in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    grads = vmap(grad(loss), (None, 0, 0))(state, images, labels)
    for index in range(len(images)):
        model.zero_grad()
        F.cross_entropy(model(images[index : index + 1]), labels[index : index + 1]).backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(grads[key][index], parameter.grad, **EXACT, msg=key)


def test_an_ensemble_predicts_without_gradients_in_channels_last() -> None:
    models = [resnet8("aw_resnet8_cifar").eval() for _ in range(2)]
    images = torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last)
    parameters, buffers = stack_module_state(models)
    with torch.no_grad():
        together = vmap(lambda *state: functional_call(models[0], state, (images,)))(parameters, buffers)
        each = torch.stack([model(images) for model in models])
    torch.testing.assert_close(together, each, rtol=1e-4, atol=1e-5)  # float32, sums in another order in ten layers
