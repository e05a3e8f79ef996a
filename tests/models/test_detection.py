"""Detectors of torchvision on networks with attention."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import FrozenBatchNormAct2d, norm_act
from torch import Tensor, nn
from torchvision.models import detection as torchvisions
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms.v2.functional import pil_to_tensor

from awconv import AWConv2d, convert
from awconv.models.detection import faster_rcnn, ssd300
from tests.photographs import photograph

SMALL: dict[str, Any] = dict(min_size=96, max_size=160)
CHEAP: dict[str, Any] = SMALL | dict(out_channels=32, box_batch_size_per_image=16, rpn_post_nms_top_n_train=50)


@pytest.fixture
def images() -> list[Tensor]:
    return [pil_to_tensor(photograph(name)) / 255 for name in ("china", "flower")]


def targets() -> list[dict[str, Tensor]]:
    box = torch.tensor([[16.0, 8, 93, 102]])
    return [{"boxes": box, "labels": torch.tensor([1])}, {"boxes": box + 4, "labels": torch.tensor([2])}]


def detect(model: nn.Module, images: list[Tensor]) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        return model.eval()(images)


def assert_same_detections(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    """Each detection has a partner in the other list. Scores of a network that never learned lie close together: their
    order is not compared."""
    for one, other in zip(found, expected, strict=True):
        assert len(one["boxes"]) == len(other["boxes"]) > 10
        apart = torch.cdist(one["boxes"], other["boxes"], p=torch.inf)
        apart[one["labels"][:, None] != other["labels"]] = torch.inf
        pairs = apart.min(1)
        # In pixels: division by a constant and multiplication by it in single precision, through up to 31 layers.
        assert pairs.values.max() < 0.02
        torch.testing.assert_close(one["scores"], other["scores"][pairs.indices], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "arguments", "layers"),
    [
        (torchvisions.fasterrcnn_resnet50_fpn, SMALL | dict(box_score_thresh=0.0, box_detections_per_img=50), 21),
        (torchvisions.maskrcnn_resnet50_fpn, SMALL | dict(box_score_thresh=0.0, box_detections_per_img=20), 25),
        (torchvisions.retinanet_resnet50_fpn, SMALL | dict(score_thresh=0.0, detections_per_img=50), 31),
        (torchvisions.ssd300_vgg16, dict(score_thresh=0.0, detections_per_img=50), 29),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_ready_detectors_become_aw_with_unchanged_detections(
    build: Any, arguments: dict[str, Any], layers: int, images: list[Tensor]
) -> None:
    plain = build(weights=None, weights_backbone=None, num_classes=4, **arguments)
    expected = detect(plain, images)
    converted = convert(copy.deepcopy(plain), init="identity")
    assert sum(isinstance(module, AWConv2d) for module in converted.modules()) == layers
    assert_same_detections(detect(converted, images), expected)


@pytest.mark.parametrize("norm", ["batch", "frozen", "group"])
@pytest.mark.parametrize("backbone", ["aw_resnet18", "aw_mobilenetv1_100", "seresnet20_cifar"])
def test_any_network_of_timm_is_a_backbone(backbone: str, norm: Any, images: list[Tensor]) -> None:
    model = faster_rcnn(backbone, 3, norm=norm, **CHEAP)
    for tensor in model.backbone.body.state_dict().values():
        if not tensor.any():  # the last norms of blocks, which start at zero and keep gradients from the rest
            tensor.fill_(0.1)
    losses = model.train()(images, targets())
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    reached = [p.grad.abs().max() > 0 for name, p in model.named_parameters() if ".attention.conv2." in name]  # type: ignore[union-attr]
    assert all(reached)
    kinds = {type(module) for module in model.backbone.body.modules()}
    assert any(issubclass(kind, nn.BatchNorm2d) for kind in kinds) == (norm == "batch")
    assert bool(kinds & {FrozenBatchNorm2d, FrozenBatchNormAct2d, norm_act.FrozenBatchNorm2d}) == (norm == "frozen")
    assert any(issubclass(kind, nn.GroupNorm) for kind in kinds) == (norm == "group")
    for found in detect(model, images):
        assert found["boxes"].shape == (len(found["labels"]), 4)


def test_the_pyramid_has_the_networks_strides(images: list[Tensor]) -> None:
    model = faster_rcnn("aw_resnet18", 3, out_channels=48, **SMALL)
    levels = model.backbone(torch.rand(1, 3, 128, 192))
    assert [tuple(level.shape[1:]) for level in levels.values()] == [
        (48, 32, 48),
        (48, 16, 24),
        (48, 8, 12),
        (48, 4, 6),
        (48, 2, 3),
    ]
    assert model.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert model.transform.image_mean == timm.get_pretrained_cfg("resnet18").mean
    with pytest.raises(ValueError, match=r"a backbone must have a feature map of stride 4 or more, got \[1, 2\]"):
        faster_rcnn("resnet20_cifar", 3, network_args=dict(out_indices=(0, 1)))


@pytest.mark.parametrize("stage_names", ["hooks", "channels last"])
def test_networks_whose_stages_differ_are_backbones(stage_names: str, images: list[Tensor]) -> None:
    backbone, arguments = {
        "hooks": ("xception41", {}),
        "channels last": ("swin_tiny_patch4_window7_224", {"strict_img_size": False}),
    }[stage_names]
    model = faster_rcnn(backbone, 3, trainable_layers="usual", network_args=arguments, norm="frozen", **CHEAP)
    trained = [p.requires_grad for p in model.backbone.body.parameters()]
    assert all(trained) == (stage_names == "hooks")
    assert trained[-1]
    if stage_names == "hooks":
        with pytest.raises(ValueError, match=r"trainable_layers must be 5 .all., got 2: .* are no separate modules"):
            faster_rcnn(backbone, 3, trainable_layers=2)
    sum(model.train()(images, targets()).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def load_around(attentive: nn.Module, plain: nn.Module) -> None:
    """Gives a detector another's heads, which were drawn after other numbers of draws; AW's own weights stay, divided
    by their starting attention."""
    layers = {name for name, module in attentive.named_modules() if isinstance(module, AWConv2d)}
    state = {key: t for key, t in plain.state_dict().items() if key.rpartition(".")[0] not in layers}
    attentive.load_state_dict(state, strict=False)


def save(network: nn.Module, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    return path


def test_a_classifiers_weights_start_the_backbone(tmp_path: Path, images: list[Tensor]) -> None:
    classifier = timm.create_model("aw_resnet18", num_classes=17)
    file = save(classifier, tmp_path / "weights.safetensors")
    model = faster_rcnn("aw_resnet18", 3, pretrained=file, **CHEAP)
    body = model.backbone.body
    for name, tensor in classifier.state_dict().items():
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            assert torch.equal(body.state_dict()[name], tensor), name
    assert any(isinstance(module, FrozenBatchNorm2d | FrozenBatchNormAct2d) for module in body.modules())
    trained = {name.partition(".")[0] for name, p in body.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    with pytest.raises(ValueError, match=r"does not hold the weights of resnet18: \d+ names differ"):
        faster_rcnn("resnet18", 3, pretrained=file)
    with pytest.raises(FileNotFoundError, match=r"weights must be a file .*none\.pth"):
        faster_rcnn("resnet18", 3, pretrained="none.pth")
    # A plain classifier's weights, converted by identity, detect what the plain detector does.
    network = timm.create_model("resnet18", zero_init_last=False)  # as one that has learned
    plain = save(network, tmp_path / "plain.safetensors")
    detectors = []
    for arguments in ({}, {"convert": {"init": "identity"}}):
        torch.manual_seed(1)
        detectors.append(faster_rcnn("resnet18", 3, pretrained=plain, box_score_thresh=0.0, **CHEAP, **arguments))
    one, other = detectors
    load_around(other, one)
    assert_same_detections(detect(other, images), detect(one, images))
    sum(other.train()(images, targets()).values()).backward()
    branches = [module.attention for module in other.backbone.body.layer4.modules() if isinstance(module, AWConv2d)]
    assert len(branches) == 4
    assert all(branch.conv2.weight.grad.abs().max() > 0 for branch in branches)  # they learn, with frozen norms too


@pytest.mark.parametrize("trainable", range(6))
def test_only_the_last_stages_are_trained(trainable: int) -> None:
    body = faster_rcnn("aw_resnet18", 3, trainable_layers=trainable, **CHEAP).backbone.body
    stages = ("conv1", "layer1", "layer2", "layer3", "layer4")
    trained = {name.partition(".")[0] for name, p in body.named_parameters() if p.requires_grad} - {"bn1"}
    assert trained == set(stages[len(stages) - trainable :])


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="trainable_layers must be from 0 to the backbone's 5 stages, got 6"):
        faster_rcnn("resnet18", 3, trainable_layers=6)
    with pytest.raises(ValueError, match="norm must be 'batch', 'frozen', 'group' or 'sync', got 'layer'"):
        faster_rcnn("resnet18", 3, norm="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="network of ssd300 must be 'vgg16' or 'aw_vgg16', got 'resnet18'"):
        ssd300("resnet18")
    with pytest.raises(ValueError, match="trainable_layers must be from 0 to VGG's 5 stages, got 6"):
        ssd300(trainable_layers=6)
    with pytest.raises(FileNotFoundError, match=r"pretrained must be true, false or a file of weights"):
        ssd300(pretrained="none.pth")


def test_ssd_on_an_aw_vgg_detects_as_on_a_vgg(tmp_path: Path, images: list[Tensor]) -> None:
    vgg = timm.create_model("vgg16", num_classes=1, mlp_ratio=0.01)
    file = save(vgg, tmp_path / "vgg.safetensors")
    plain = ssd300("vgg16", 4, pretrained=file, score_thresh=0.0, detections_per_img=50)
    expected = [m for m in vgg.features if isinstance(m, nn.Conv2d)]
    found = [m for m in plain.backbone.modules() if isinstance(m, nn.Conv2d)][:13]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(found, expected, strict=True))
    assert [m.weight.requires_grad for m in found] == [False] * 2 + [True] * 11  # torchvision's usual 4 stages
    attentive = ssd300("aw_vgg16", 4, pretrained=file, score_thresh=0.0, detections_per_img=50)
    assert sum(isinstance(module, AWConv2d) for module in attentive.modules()) == 12
    converted = ssd300("vgg16", 4, pretrained=file, convert={"reduction": 8})
    assert [m.reduction for m in converted.modules() if isinstance(m, AWConv2d)] == [8] * 12
    load_around(attentive, plain)
    assert_same_detections(detect(attentive, images), detect(plain, images))
    save(timm.create_model("resnet18"), file)
    with pytest.raises(ValueError, match=r"vgg\.safetensors does not hold the weights of a VGG-16"):
        ssd300("vgg16", 4, pretrained=file)


def test_ssd_trains_its_branches(images: list[Tensor]) -> None:
    model = ssd300(num_classes=4, trainable_layers=1)
    losses = model.train()(images, targets())
    sum(losses.values()).backward()
    convolutions = [m for m in model.backbone.modules() if isinstance(m, AWConv2d)]
    assert [m.attention.conv2.weight.grad is not None for m in convolutions[-3:]] == [True] * 3
    assert [m.weight.grad is not None for m in convolutions] == [False] * 9 + [True] * 3


def strip(image: Tensor) -> Tensor:
    """A panorama, of which a detector sees a few lines."""
    return image[:, :16].repeat(1, 1, 4)


def test_detections_do_not_depend_on_the_first_image(images: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = faster_rcnn("resnet18", 3, box_score_thresh=0.0, **CHEAP)
    copied = copy.deepcopy(model)
    detect(model, [strip(images[0])])
    for name, found in detect(model, images[:1])[0].items():
        # bit for bit: both compute the same
        assert torch.equal(found, detect(copied, images[:1])[0][name]), name


def test_uint8_images_are_those_of_0_to_1(images: list[Tensor]) -> None:
    """Memory for a large photograph is a third, and no bit is another."""
    torch.manual_seed(0)
    model = faster_rcnn("resnet18", 3, box_score_thresh=0.0, **CHEAP)
    whole = [(image * 255).round().to(torch.uint8) for image in images]
    before = [image.clone() for image in whole]
    for found, expected in zip(detect(model, whole), detect(model, [image / 255 for image in whole]), strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(image, kept) for image, kept in zip(whole, before, strict=True))


def test_an_image_too_narrow_to_be_seen_is_refused(images: list[Tensor]) -> None:
    model = faster_rcnn("resnet18", 3, **CHEAP)
    with pytest.raises(ValueError, match="2000x3 pixels shrink to less than one"):
        detect(model, [torch.zeros(3, 3, 2000)])
    detect(model, [torch.zeros(3, 13, 2000)])
