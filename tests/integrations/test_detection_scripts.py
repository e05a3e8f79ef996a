"""Converted detectors with what torchvision's detection scripts do around their loop."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models.detection import FasterRCNN, fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops._utils import split_normalization_params

import awconv
from tests.networks import converted


def faster_rcnn() -> nn.Module:
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)
    return awconv.convert(FasterRCNN(backbone, num_classes=3, min_size=64, max_size=64), init="identity")


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    targets = [{"boxes": torch.tensor([[8.0, 16, 40, 48]]), "labels": torch.tensor([label])} for label in (1, 2)]
    loss = sum(model.train()([torch.rand(3, 64, 64), torch.rand(3, 64, 64)], targets).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, nn.Module]:
    """A detector before and after two steps of all parameters that require a gradient."""
    torch.manual_seed(0)
    model = faster_rcnn()
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
    for _ in range(2):
        step(model, optimizer)
    return before, model


def test_frozen_stages_keep_their_weights_and_train_their_branches(trained: tuple[nn.Module, nn.Module]) -> None:
    before, model = (network.backbone.body.layer1[0].conv1 for network in trained)
    assert isinstance(model, awconv.AWConv2d)
    assert torch.equal(model.weight, before.weight)
    assert not torch.equal(model.attention.conv2.weight, before.attention.conv2.weight)
    assert isinstance(model.attention.norm2, FrozenBatchNorm2d)
    assert all(
        torch.equal(value, before.attention.norm2.state_dict()[key])
        for key, value in model.attention.norm2.state_dict().items()
    )


def test_averaged_weights_average_the_branches(trained: tuple[nn.Module, nn.Module]) -> None:
    averaged = AveragedModel(trained[0], use_buffers=True)
    for network in trained:
        averaged.update_parameters(network)
    first, last, mean = (dict(network.named_parameters()) for network in (*trained, averaged.module))
    branches = [name for name in mean if ".attention." in name]
    assert len(branches) == 2 * len(converted(trained[1]))
    for name in branches:
        torch.testing.assert_close(mean[name], (first[name] + last[name]) / 2)


@pytest.mark.parametrize("norms", ["frozen", "batch"])
def test_the_scripts_groups_have_each_parameter_once(norms: str) -> None:
    if norms == "frozen":
        model = faster_rcnn()
    else:
        plain = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=3)
        model = awconv.convert(plain, init="identity")
    of_norms, others = split_normalization_params(model)
    found = Counter(map(id, (*of_norms, *others)))
    assert found == Counter(id(p) for p in model.parameters() if p.requires_grad)
    trained_norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert {id(p) for p in of_norms} == trained_norms
    assert bool(trained_norms) is (norms == "batch")
