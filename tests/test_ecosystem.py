"""AW networks in timm, torchvision, segmentation, fx, compilation, export, FSDP, safetensors and torch.hub."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork

from awconv import AWConv2d, convert
from awconv.models import BASELINES
from tests.networks import moved

ROOT = Path(__file__).parent.parent
IMAGENET_MODELS = [name for name in BASELINES if name.startswith("aw_") and "cifar" not in name]
STAGES = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}


def aw_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, AWConv2d)]


def converted_resnet18() -> nn.Module:
    return convert(torchvision.models.resnet18(weights=None)).eval()


def tiny() -> nn.Module:
    """A network that has learned, with branches of the paper's form and relative ones."""
    model = timm.create_model("resnet8_cifar")
    convert(model, "layer1.*", reduction=2)
    convert(model, ["layer2.*", "layer3.*"], reduction=2, init="identity")
    with torch.no_grad():
        moved(model).train()(torch.randn(8, 3, 32, 32))  # statistics other than 0 and 1
    return model.eval()


@pytest.mark.parametrize("name", IMAGENET_MODELS)
def test_timm_makes_a_backbone_of_every_imagenet_model(name: str) -> None:
    with torch.device("meta"):
        plain = timm.create_model(BASELINES[name], features_only=True)
        backbone = timm.create_model(name, features_only=True).eval()
        features = backbone(torch.zeros(1, 3, 64, 64))
    info = backbone.feature_info
    assert info.channels() == plain.feature_info.channels()
    finest = [1, 2] if "vgg" in name else [2]  # VGG begins with the image's own size
    assert info.reduction() == plain.feature_info.reduction() == [*finest, 4, 8, 16, 32]
    assert [tuple(feature.shape) for feature in features] == [
        (1, channels, 64 // reduction, 64 // reduction)
        for channels, reduction in zip(info.channels(), info.reduction(), strict=True)
    ]
    assert aw_layers(backbone)


def test_torchvision_takes_a_converted_network_as_backbone_of_a_feature_pyramid() -> None:
    model = converted_resnet18()
    images = torch.randn(2, 3, 64, 64)
    features = IntermediateLayerGetter(model, STAGES)(images)
    assert [tuple(feature.shape) for feature in features.values()] == [
        (2, 64, 16, 16),
        (2, 128, 8, 8),
        (2, 256, 4, 4),
        (2, 512, 2, 2),
    ]
    pooled = model.avgpool(features["3"]).flatten(1)
    torch.testing.assert_close(model.fc(pooled), model(images))
    widths = [64, 128, 256, 512]
    pyramid = FeaturePyramidNetwork(widths, 32)
    detector = BackboneWithFPN(model, STAGES, widths, 32)
    detector.fpn.load_state_dict(pyramid.state_dict(), strict=False)
    levels = detector(images)
    for name, level in pyramid(features).items():
        assert level.shape == (2, 32, *features[name].shape[2:])
        torch.testing.assert_close(levels[name], level)
    levels["0"].sum().backward()
    assert model.layer1[0].conv1.attention.conv1.weight.grad is not None


def test_torchvision_extracts_features_of_a_converted_network() -> None:
    model = converted_resnet18()
    extractor = create_feature_extractor(model, {"layer2.0.conv1": "aw", "layer4": "last"})
    for batch in (2, 3):
        images = torch.randn(batch, 3, 64, 64)
        expected = IntermediateLayerGetter(model, {"layer4": "last"})(images)["last"]
        features = extractor(images)
        assert features["aw"].shape == (batch, 128, 8, 8)
        torch.testing.assert_close(features["last"], expected)


def test_a_converted_encoder_segments_as_before_and_learns() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("resnet18", encoder_weights=None).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        convert(model.encoder, init="identity")
        after = model(images)
    # The sum over taps has another order, in each of some 30 layers.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * before.abs().max().item())
    model.train()(images).square().mean().backward()
    layers = aw_layers(model)
    assert len(layers) == 16
    for name in layers:
        assert model.get_submodule(name).attention.norm2.weight.grad.abs().max() > 0, name


def network_to_trace(name: str) -> nn.Module:
    if name == "tiny":
        return tiny()
    if name.startswith("aw_"):
        return timm.create_model(name)
    if name == "mobilenet_v2":
        return convert(torchvision.models.mobilenet_v2(weights=None))
    # Without the stem, too: torch.fx cannot trace timm's own Conv2dSame, whose padding depends on the input's size.
    model = timm.create_model(name)
    convert(model, lambda name, module: max(module.kernel_size) > 1)
    assert not any(type(module) is Conv2dSame for module in model.modules())
    return model


@pytest.mark.parametrize("name", ["aw_resnet18", "tiny", "mobilenet_v2", "tf_efficientnet_lite0"])
def test_a_network_traced_by_fx_computes_the_same_at_any_batch(name: str) -> None:
    model = network_to_trace(name)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))
        model.eval()
        traced = torch.fx.symbolic_trace(model)
        for batch in (2, 3):
            images = torch.randn(batch, 3, 64, 64)
            assert torch.equal(traced(images), model(images))


def test_a_compiled_network_computes_the_same_without_graph_breaks() -> None:
    torch._dynamo.reset()
    model = tiny()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # the default one: tests of the layer
    for batch in (2, 3):
        images = torch.randn(batch, 3, 32, 32)
        torch._dynamo.mark_dynamic(images, 0)  # compiled once, for both
        with torch.no_grad():
            torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


def test_an_exported_network_is_saved_and_computes_the_same_at_any_batch(tmp_path: Path) -> None:
    model = tiny()
    sizes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=sizes)
    torch.export.save(program, tmp_path / "network.pt2")
    loaded = torch.export.load(tmp_path / "network.pt2").module()
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-5)


def network_to_shard() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()), nn.Conv2d(8, 6, 3)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    convert(model, "1.0", init="identity")
    return moved(convert(model, "2")).train()


def step(model: nn.Module, images: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images).square().sum().backward()
    optimizer.step()


def train_sharded(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = network_to_shard()
    fully_shard(model[1], mesh=dist.init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
    step(model, torch.load(f"{folder}/images.pt"))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(state, f"{folder}/state.pt")
    dist.barrier()
    dist.destroy_process_group()
    # gloo's threads may still hold tensors: an interpreter that ends meanwhile aborts (pytorch/pytorch#179291).
    os._exit(0)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_a_sharded_step_is_the_plain_one_and_its_state_loads_into_a_plain_network(tmp_path: Path) -> None:
    images = torch.randn(4, 3, 10, 10)
    torch.save(images, tmp_path / "images.pt")
    torch.multiprocessing.spawn(train_sharded, (str(tmp_path),), nprocs=2)
    expected, before = network_to_shard(), network_to_shard()
    step(expected, images)
    gathered = network_to_shard()
    gathered.load_state_dict(torch.load(tmp_path / "state.pt"))
    for name, parameter in gathered.named_parameters():
        torch.testing.assert_close(
            parameter, expected.get_parameter(name), msg=lambda text, name=name: f"{name}: {text}"
        )
    assert not torch.equal(gathered[1][0].attention.conv1.weight, before[1][0].attention.conv1.weight)


def test_safetensors_keep_a_network(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, images = tiny(), torch.randn(2, 3, 32, 32)
    safetensors.save_file(model.state_dict(), tmp_path / "state.safetensors")
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    from_state, from_model = (timm.create_model("aw_resnet8_cifar").eval() for _ in range(2))
    from_state.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))
    missing, unexpected = safetensors.load_model(from_model, tmp_path / "model.safetensors")
    assert not missing
    assert not unexpected
    for loaded in (from_state, from_model):
        assert torch.equal(loaded(images), model(images))


def test_a_converted_network_is_copied_and_pickled() -> None:
    model, images = converted_resnet18(), torch.randn(2, 3, 64, 64)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.layer1[0].conv1.weight is not model.layer1[0].conv1.weight
        assert torch.equal(copied(images), model(images))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_a_plain_state_dict_loads_into_the_twin_which_misses_only_its_branches(name: str) -> None:
    model = timm.create_model("aw_" + name)
    missing, unexpected = model.load_state_dict(timm.create_model(name).state_dict(), strict=False)
    assert not unexpected
    # A norm that was saved before PyTorch counted batches, or not at all, misses no count.
    branches = {key for key in model.state_dict() if ".attention." in key}
    assert set(missing) == {key for key in branches if not key.endswith("num_batches_tracked")}


def test_torch_hub_loads_a_model() -> None:
    model = torch.hub.load(str(ROOT), "aw_resnet8_cifar", source="local", pretrained=False, num_classes=7)
    assert len(aw_layers(model)) == 6
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_torch_hub_takes_the_package_beside_it(tmp_path: Path) -> None:
    code = (
        "import torch;"
        f"model = torch.hub.load({str(ROOT)!r}, 'aw_resnet8_cifar', source='local', pretrained=False);"
        "import awconv; print(awconv.__file__)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.split()[-1]) == ROOT / "src" / "awconv" / "__init__.py"
