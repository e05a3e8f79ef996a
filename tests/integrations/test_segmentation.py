"""Converted networks of segmentation-models-pytorch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import awconv
from tests.networks import converted, moved

smp = pytest.importorskip("segmentation_models_pytorch", reason="needs segmentation-models-pytorch")

RESNET = ["Unet", "UnetPlusPlus", "FPN", "DeepLabV3Plus", "PSPNet", "MAnet", "Linknet", "Segformer", "UPerNet"]


@pytest.mark.parametrize(
    ("architecture", "encoder", "size"),
    [*((name, "resnet18", 64) for name in RESNET), ("DPT", "tu-vit_tiny_patch16_224.augreg_in21k", 224)],
)
def test_every_architecture_computes_the_same_after_a_conversion_by_identity(
    architecture: str, encoder: str, size: int
) -> None:
    model = getattr(smp, architecture)(encoder, encoder_weights=None, classes=3).eval()
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        before = model(images)
        awconv.convert(model, init="identity")
        # The sum over taps has another order, in each of some 30 layers.
        torch.testing.assert_close(model(images), before, rtol=0, atol=1e-5 * before.abs().max().item())
        assert len(converted(model)) > 10
        assert not torch.equal(moved(model)(images), before)


def test_a_frozen_encoder_has_frozen_branches_and_the_decoder_learns() -> None:
    model = smp.Unet("resnet18", encoder_weights=None, classes=1)
    awconv.convert(model, init="identity")
    model.freeze_encoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    masks = torch.zeros(2, 1, 64, 64)
    masks[..., 16:48, 16:48] = 1
    optimizer = torch.optim.SGD(awconv.parameter_groups(model), lr=0.1)
    smp.losses.DiceLoss("binary")(model(torch.rand(2, 3, 64, 64)), masks).backward()
    optimizer.step()
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert not [name for name in changed if name.startswith("encoder.")]
    learned = {f"{name}.attention.norm2.weight" for name in converted(model) if not name.startswith("encoder.")}
    assert learned <= changed


def test_branches_train_beside_a_frozen_encoder() -> None:
    model = awconv.convert(smp.Unet("resnet18", encoder_weights=None, classes=1), init="identity")
    awconv.train_only(model, "branch", "decoder.*", "segmentation_head.*")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "encoder.layer1.0.conv1.attention.conv1.weight" in trained
    assert "encoder.layer1.0.conv1.weight" not in trained
    assert {name for name, _ in model.named_parameters() if name.startswith("decoder.")} <= trained


def test_loading_a_converted_network_without_a_conversion_is_an_error(tmp_path: Path) -> None:
    model = awconv.convert(smp.Unet("resnet18", encoder_weights=None, classes=1), init="identity")
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*attention\.conv1\.weight"):
        smp.from_pretrained(tmp_path)
