"""Networks on Hugging Face's hub, by a server of its HTTP interface on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import awconv
from awconv.cli import main
from awconv.hub import downloaded
from awconv.models.published import ADAPTER, CARD, CONFIG, FILE, PICKLED, WEIGHTS
from tests.data.samples import digit
from tests.documents import ROOT, examples
from tests.integrations.hub_server import hub
from tests.networks import moved

hf = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
hub_of_timm = pytest.importorskip("timm.models._hub")
if not hasattr(timm.create_model("resnet8_cifar"), "_model_args"):
    pytest.skip("timm keeps a network's arguments since 1.0.31", allow_module_level=True)

DIGITS = WEIGHTS / "aw_resnet8_cifar.digits"


def client(code: str, address: str, folder: Path) -> str:
    """What a program prints that uses the hub at an address, with a cache of its own."""
    settings = dict(
        HF_ENDPOINT=address, HF_HOME=str(folder / "hf"), HF_TOKEN="hf_none", HF_HUB_DISABLE_XET="1", no_proxy="*"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | settings | {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


PAGE = examples(ROOT / "docs" / "integrations" / "hub.md", "python")
USES = """
import json, torch
import awconv.cli
from huggingface_hub import HfApi
from awconv.adapter import load_adapter

torch.manual_seed(0)
assert torch.equal(trained.network(images), expected), "awconv.load"
model.eval(), other.eval()
assert torch.equal(model(images), expected), "timm"
assert other(images).shape == (2, 3)
assert torch.equal(other.layer4[1].conv2.attention.conv1.weight, model.layer4[1].conv2.attention.conv1.weight)

api = HfApi()
for folder in ("DIGITS", "adapter"):
    api.create_repo("OWNER/" + folder.rpartition("/")[2])
    api.upload_folder(repo_id="OWNER/" + folder.rpartition("/")[2], folder_path=folder)
name = "DIGITS".rpartition("/")[2]
digits, image = awconv.load("hf_hub:OWNER/" + name), torch.randn(2, 1, 8, 8)
assert torch.equal(digits.network(image), awconv.load("DIGITS").network(image))
assert torch.equal(timm.create_model("hf_hub:OWNER/" + name, pretrained=True).eval()(image), digits.network(image))
adapted = awconv.load("hf-hub:OWNER/adapter")
assert torch.equal(adapted.network(image), awconv.load("adapter").network(image))
assert not torch.equal(adapted.network(image), digits.network(image))
try:
    timm.create_model("hf-hub:OWNER/adapter", pretrained=True)
except Exception as error:
    assert "pytorch_model.bin" in str(error), error
else:
    raise AssertionError("timm takes an adapter for whole weights")
assert awconv.cli.main(["predict", "--ckpt=hf-hub:OWNER/" + name, "--format=json", "digit.png"]) == 0
for wrong in ("OWNER/none", "OWNER/flowers@v9", "OWNER/empty"):
    api.create_repo("OWNER/empty", exist_ok=True)
    try:
        awconv.load("hf-hub:" + wrong)
    except ValueError as error:
        assert ("hf-hub:" + wrong + " cannot be loaded from the hub: ") in str(error), error
    else:
        raise AssertionError(wrong)
"""


@pytest.fixture(scope="module")
def hub_after_use(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    """The hub after the page's blocks and further uses by one program, and what that printed."""
    folder = tmp_path_factory.mktemp("client")
    adapted = timm.create_model(DIGITS.name, pretrained=True)
    awconv.train_only(adapted, "branch", "head")
    with torch.no_grad():
        adapted.fc.bias.add_(1.0)
    config = json.loads((DIGITS / CONFIG).read_text())
    told = dict(
        network=DIGITS.name,
        network_args={},
        convert=None,
        classes=config["pretrained_cfg"]["label_names"],
        input_size=[1, 8, 8],
        crop_pct=1.0,
        mean=[0.305],
        std=[0.376],
        pretrained=True,
    )
    (folder / "adapter").mkdir()
    awconv.save_adapter(adapted, folder / "adapter" / ADAPTER, metadata={"task": json.dumps(told)})
    (folder / "adapter" / CONFIG).write_text((DIGITS / CONFIG).read_text())
    digit(3, 8).save(folder / "digit.png")
    blocks = [block.text for block in PAGE]
    code = "\n".join([blocks[0], "expected = model(images)", *blocks[1:3], USES.replace("DIGITS", str(DIGITS))])
    with hub() as (address, state):
        yield state, client(code, address, folder)


def test_the_code_of_the_page_uploads_and_loads(hub_after_use: tuple[Any, str]) -> None:
    state, printed = hub_after_use
    assert set(state.repositories["OWNER/flowers"]) == {FILE, CONFIG, CARD}
    assert json.loads(printed)["predictions"][0]["label"] == "3"
    asked = " ".join(state.requests)
    assert "/OWNER/flowers.git/info/lfs/objects/batch" in asked
    assert "HEAD /OWNER/flowers/resolve/main/model.safetensors" in asked


def test_uploaded_files_are_those_of_the_folder(hub_after_use: tuple[Any, str]) -> None:
    there = hub_after_use[0].repositories[f"OWNER/{DIGITS.name}"]
    assert there == {file.name: file.read_bytes() for file in DIGITS.iterdir()}


@pytest.mark.parametrize("name", ["x", "../x", "a/b/c", "a b/c", "owner/name@"])
def test_a_name_that_the_hub_cannot_have_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="is called hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION, got "):
        downloaded(f"hf-hub:{name}")
    assert main(["predict", f"--ckpt=hf-hub:{name}", str(DIGITS)]) == 1


def plain() -> nn.Module:
    return timm.create_model("resnet8_cifar", in_chans=1, num_classes=5, drop_rate=0.1)


def twice() -> nn.Module:
    model = awconv.convert(plain(), "layer1.*", reduction=2)
    awconv.convert(model, lambda name, layer: "layer3" in name, init="identity", activation="tanh")
    model.reset_classifier(7)
    return model


def reverted() -> nn.Module:
    return awconv.revert(awconv.convert(awconv.convert(plain(), "layer1.*"), init="identity"), drop_attention=True)


SHARED = {
    "by name": lambda: timm.create_model("aw_resnet8_cifar", in_chans=1, aw_args=dict(reduction=4)),
    "with weights": lambda: timm.create_model("aw_resnet8_cifar.digits", pretrained=True),
    "converted": lambda: awconv.convert(plain(), init="identity", input_gain=True),
    "twice": twice,
    "without norms": lambda: awconv.convert(plain(), norm_layer=None),
    "the rest of an AW network": lambda: awconv.convert(timm.create_model("aw_resnet8_cifar", in_chans=1), "conv1"),
    "odconv": lambda: awconv.convert(plain(), layer="odconv"),
    "reverted": reverted,
}


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("kind", SHARED)
def test_what_timm_saves_is_built_again(kind: str, safe: bool, tmp_path: Path) -> None:
    model, images = moved(SHARED[kind]()), torch.randn(2, 1, 8, 8)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=safe)
    assert (tmp_path / (FILE if safe else PICKLED)).is_file()
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded(images), model(images))
    ready = awconv.load(tmp_path)
    assert torch.equal(ready.network(images), model(images))
    assert len(ready.classes) == model.num_classes
    assert ready.input_size is not None
    assert ready.input_size[0] == 1
    timm.models.save_for_hf(loaded, tmp_path / "again", safe_serialization=True)
    assert torch.equal(
        timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()(images), model(images)
    )


def test_what_text_cannot_say_is_refused_before_it_is_lost(tmp_path: Path) -> None:
    model = awconv.convert(plain(), norm_layer=lambda channels: nn.GroupNorm(1, channels))
    with pytest.raises(ValueError, match="'convert' is not serializable"):
        timm.models.save_for_hf(model, tmp_path)


def test_a_part_that_was_converted_by_itself_is_noticed_at_the_latest_when_it_is_loaded(tmp_path: Path) -> None:
    model = plain()
    awconv.convert(model.layer3, "*")
    timm.models.save_for_hf(model, tmp_path)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*attention"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    lost = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2)
    assert not any("attention" in name for name in lost.state_dict())


def test_networks_that_timm_did_not_build_are_left_as_they_are() -> None:
    model = awconv.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)))
    assert "_model_args" not in vars(model)
    assert "pretrained_cfg" not in vars(model)
