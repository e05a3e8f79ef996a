"""Quantisation of AW networks by torchao."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

import awconv
from tests.networks import moved

quantization: Any = pytest.importorskip("torchao.quantization", reason="needs torchao")


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_the_classifier_is_quantised_and_the_rest_is_as_it_was(config: str) -> None:
    model, images = moved(timm.create_model("aw_resnet8_cifar")), torch.randn(4, 3, 16, 16)
    small = copy.deepcopy(model)
    quantization.quantize_(small, getattr(quantization, config)())
    changed = {name for name, parameter in small.named_parameters() if type(parameter) is not nn.Parameter}
    assert changed == {"fc.weight"}
    before, after = model(images), small(images)
    # Half a step of 254 in a weight's and an activation's range, over 64 products: far below the logits' own size.
    assert 0 < (after - before).abs().max() < 0.05 * before.abs().max()


@pytest.mark.parametrize("kind", [nn.Conv2d, awconv.AWConv2d])
def test_convolutions_with_attention_or_without_have_no_int8(kind: Any) -> None:
    """The page says so; the day that they have one, the page may say that."""
    model = nn.Sequential(kind(3, 32, 3)).eval()
    config = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(model, config, filter_fn=lambda module, name: type(module) is kind)
    assert type(model[0].weight) is not nn.Parameter
    with pytest.raises(NotImplementedError, match="Int8Tensor dispatch"):
        model(torch.randn(2, 3, 8, 8))
