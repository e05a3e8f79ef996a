"""Trained networks from every source: the same network, classes and preprocessing, whichever it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision.transforms as T
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

import awconv
from awconv.cli import main
from awconv.models.published import CONFIG, FILE, WEIGHTS
from awconv.tasks import ClassificationTask
from tests.data.samples import digit
from tests.photographs import photograph

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.logger=false", "--trainer.accelerator=cpu")
SHORT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--model.lr=0.1")
NAME = "aw_resnet8_cifar.digits"
TRAINED = {
    "plain": ("--model.network=resnet8_cifar",),
    "averaged": ("--model.network=aw_resnet8_cifar", "--model.ema_decay=0.5", "--data.crop_pct=0.8"),
    "identity": ("--model.network=resnet8_cifar", "--model.convert={init: identity}", "--model.ema_decay=0.5"),
    "fresh": ("--model.network=resnet8_cifar", "--model.convert={init: fresh}"),
    "arguments": ("--model.network=aw_resnet8_cifar", "--model.network_args={aw_args: {reduction: 4}}"),
    "adapter": (f"--model.network={NAME}", "--model.pretrained=true", "--model.train_only=[branch]"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of short trainings."""
    folder = tmp_path_factory.mktemp("trained")
    for kind, arguments in TRAINED.items():
        assert main(["fit", *arguments, *SHORT, *QUIET, f"--trainer.default_root_dir={folder / kind}"]) == 0
    return {kind: next((folder / kind / "checkpoints").glob("*.ckpt")) for kind in TRAINED}


@pytest.fixture(scope="module")
def published(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders that were published of the checkpoints."""
    out = tmp_path_factory.mktemp("published")
    for kind, checkpoint in checkpoints.items():
        assert main(["publish", str(checkpoint), f"--tag={kind}", "--data=digits", f"--out={out}"]) == 0
    return {path.name.rpartition(".")[2]: path for path in out.iterdir()}


def logits(loaded: awconv.Loaded, images: list[Image.Image]) -> Tensor:
    with torch.inference_mode():
        outputs: Tensor = loaded.network(torch.stack([loaded.transform(image) for image in images]))
    return outputs


def by_hand(checkpoint: Path, images: list[Image.Image], crop_pct: float) -> Tensor:
    """What a checkpoint's task gives for digits of 8x8 pixels."""
    task = ClassificationTask.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).eval()
    fit = T.Compose([T.Resize(round(8 / crop_pct)), T.CenterCrop(8), pil_to_tensor])
    with torch.inference_mode():
        outputs: Tensor = task(torch.stack([fit(image) for image in images]))
    return outputs


class TestSources:
    @pytest.mark.parametrize("kind", TRAINED)
    def test_a_checkpoint_its_folder_and_what_was_published_of_it_are_one_network(
        self, kind: str, checkpoints: dict[str, Path], published: dict[str, Path]
    ) -> None:
        images = [digit(index, 20) for index in range(4)]
        expected = by_hand(checkpoints[kind], images, 0.8 if kind == "averaged" else 1.0)
        assert expected.std() > 1e-4
        sources = [checkpoints[kind], checkpoints[kind].parent.parent, published[kind]]
        weights = published[kind] / ("adapter.safetensors" if kind == "adapter" else FILE)
        for source in (*sources, str(weights)):
            loaded = awconv.load(source)
            assert torch.equal(logits(loaded, images), expected), source
            assert loaded.classes == [str(number) for number in range(10)]
            assert loaded.input_size == (1, 8, 8)
            assert not any(module.training for module in loaded.network.modules())

    @pytest.mark.parametrize("kind", [kind for kind in TRAINED if kind != "adapter"])
    def test_timm_and_predict_take_what_was_published(
        self, kind: str, published: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        loaded = awconv.load(published[kind])
        model = timm.create_model(f"local-dir:{published[kind]}", pretrained=True).eval()
        image = digit(3, 20)
        with torch.inference_mode():
            assert torch.equal(model(loaded.transform(image)[None]), logits(loaded, [image]))
        assert model.pretrained_cfg["label_names"] == loaded.classes
        image.save(tmp_path / "three.png")
        arguments = [f"--ckpt={published[kind]}", "--format=json", "--top_k=10", str(tmp_path / "three.png")]
        assert main(["predict", *arguments]) == 0
        (one,) = json.loads(capsys.readouterr().out)["predictions"]
        found = {each["label"]: each["probability"] for each in (one, *one["others"])}
        assert [found[label] for label in loaded.classes] == logits(loaded, [image]).softmax(1)[0].tolist()

    def test_a_name_gives_the_weights_that_the_package_ships(self) -> None:
        image = digit(3)
        loaded = awconv.load(NAME)
        assert torch.equal(logits(loaded, [image]), logits(awconv.load(WEIGHTS / NAME), [image]))
        assert loaded.classes[logits(loaded, [image]).argmax()] == "3"

    def test_a_file_takes_the_place_of_a_names_weights(self, tmp_path: Path) -> None:
        torch.manual_seed(1)
        model = timm.create_model("test_resnet").eval()
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        loaded = awconv.load("test_resnet.r160_in1k", pretrained=tmp_path / "weights.pth")
        images = torch.randn(2, 3, 160, 160)
        with torch.inference_mode():
            assert torch.equal(loaded.network(images), model(images))
        assert loaded.classes[0] == "tench, Tinca tinca"
        assert len(loaded.classes) == 1000

    def test_the_newest_checkpoint_of_a_folder_is_taken(
        self, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for age, kind in enumerate(("plain", "fresh")):
            shutil.copy(checkpoints[kind], tmp_path / f"{kind}.ckpt")
            os.utime(tmp_path / f"{kind}.ckpt", (10**9 - age,) * 2)
        images = [digit(1)]
        assert torch.equal(logits(awconv.load(tmp_path), images), logits(awconv.load(checkpoints["plain"]), images))
        (tmp_path / "newer.ckpt").write_bytes(checkpoints["plain"].read_bytes()[:-100])
        assert torch.equal(logits(awconv.load(tmp_path), images), logits(awconv.load(checkpoints["plain"]), images))
        assert "newer.ckpt is broken, or not a checkpoint" in capsys.readouterr().err

    def test_what_is_not_there_is_said(self, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
        with pytest.raises(FileNotFoundError, match=r"resnet8_cifr is not there: .*; near it: .*resnet8_cifar"):
            awconv.load("resnet8_cifr")
        with pytest.raises(FileNotFoundError, match="holds neither a checkpoint"):
            awconv.load(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
            awconv.load(tmp_path / "none.safetensors")
        with pytest.raises(ValueError, match=r"resnet8_cifar has no weights; give a file"):
            awconv.load("resnet8_cifar")
        with pytest.raises(ValueError, match=r"has no weights; there are .*aw_resnet8_cifar\.digits"):
            awconv.load("aw_resnet8_cifar")
        with pytest.raises(ValueError, match=r"and .* has its own"):
            awconv.load(checkpoints["plain"], pretrained=checkpoints["plain"])


def grey_of_16_bits() -> Image.Image:
    return Image.fromarray((np.arange(40 * 30, dtype=np.uint16) * 50).reshape(40, 30))


def turned() -> Image.Image:
    image = photograph("flower").resize((50, 30))
    image.getexif()[0x0112] = 6
    return image


PICTURES: dict[str, tuple[Callable[[], Image.Image], Callable[[Image.Image], Image.Image]]] = {
    "colour": (lambda: photograph("china").resize((67, 41)), lambda image: image),
    "tall": (lambda: photograph("china").resize((19, 83)), lambda image: image),
    "grey": (lambda: photograph("china").convert("L").resize((33, 57)), lambda image: image),
    "palette": (lambda: photograph("flower").convert("P"), lambda image: image),
    "transparent": (lambda: photograph("flower").convert("RGBA"), lambda image: image),
    "two tones": (lambda: photograph("flower").convert("1"), lambda image: image.convert("L")),
    "16 bits": (
        grey_of_16_bits,
        lambda image: Image.fromarray(np.rint(np.asarray(image) / 257.0).astype(np.uint8)),
    ),
    "turned": (turned, lambda image: image.transpose(Image.Transpose.ROTATE_270)),
}


class TestTransform:
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("picture", PICTURES)
    def test_is_torchvisions_for_any_picture(self, picture: str, channels: int) -> None:
        task = ClassificationTask(
            ["a", "b"], [channels, 32, 32], mean=[0.4] * channels, std=[0.2] * channels, crop_pct=0.875,
            network="resnet8_cifar",
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("awconv.sources.load_task", lambda *_: task)
            loaded = awconv.load("anything")
        make, decoded = PICTURES[picture]
        fit = T.Compose(
            [
                T.Resize(37),
                T.CenterCrop(32),
                T.ToTensor(),
                T.Normalize([0.4] * channels, [0.2] * channels),
            ]
        )
        expected = fit(decoded(make()).convert("L" if channels == 1 else "RGB"))
        found = loaded.transform(make())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "test_vit.r160_in1k"])  # bilinear, bicubic
    def test_of_a_name_is_timms(self, name: str, tmp_path: Path) -> None:
        torch.save(timm.create_model(name.partition(".")[0]).state_dict(), tmp_path / "weights.pth")
        loaded = awconv.load(name, pretrained=tmp_path / "weights.pth")
        cfg: Any = timm.get_pretrained_cfg(name)
        theirs: Any = create_transform(
            cfg.input_size, interpolation=cfg.interpolation, mean=cfg.mean, std=cfg.std, crop_pct=cfg.crop_pct
        )
        for size in ((160, 107), (211, 333), (400, 168), (168, 169)):
            image = photograph("china").resize(size)
            torch.testing.assert_close(loaded.transform(image), theirs(image), rtol=0, atol=1e-6)


class TestImageSize:
    def test_another_one_is_taken_where_the_network_does(self, checkpoints: dict[str, Path]) -> None:
        loaded = awconv.load(checkpoints["averaged"], image_size=12)
        assert loaded.input_size == (1, 12, 12)
        expected = T.Compose([T.Resize(15), T.CenterCrop(12), pil_to_tensor])(digit(2, 20))
        scaled = loaded.transform(digit(2, 20)) * 0.376 + 0.305
        torch.testing.assert_close(255 * scaled, expected.float(), rtol=0, atol=1e-3)
        assert logits(loaded, [digit(2, 20)]).shape == (1, 10)

    def test_a_network_that_does_not_refuses_it(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "weights.pth")
        digit(0).save(tmp_path / "a.png")
        arguments = [f"--pretrained={tmp_path / 'weights.pth'}", "--image_size=97", str(tmp_path / "a.png")]
        assert main(["predict", "--ckpt=test_vit.r160_in1k", *arguments]) == 1
        assert "test_vit.r160_in1k takes no images of 97x97 pixels" in capsys.readouterr().err
        with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
            awconv.load(NAME, image_size=0)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda _: [1], "not a configuration"),
    "nothing": (lambda _: {}, "not a configuration"),
    "a number for the network": (lambda config: config | {"architecture": 3}, "not a configuration"),
    "an unknown network": (lambda config: config | {"architecture": "nonet"}, "network must be a name"),
    "a path for the network": (lambda config: config | {"architecture": "local-dir:/etc"}, "network must be a name"),
    "code for an argument": (
        lambda config: config | {"model_args": {"pretrained_cfg": {"file": "/etc/passwd"}}},
        "network_args must be the network's own",
    ),
    "arguments as a list": (lambda config: config | {"model_args": [1]}, "cannot be"),
    "no network to convert": (lambda config: config | {"architecture": "awconv_converted"}, "cannot be built"),
    "an unknown conversion": (
        lambda config: (
            config
            | {
                "architecture": "awconv_converted",
                "model_args": {"network": "resnet8_cifar", "convert": {"select": {"a": 1}}},
            }
        ),
        "cannot be",
    ),
    "names as a number": (lambda config: with_cfg(config, label_names=3), "label_names"),
    "names as text": (lambda config: with_cfg(config, label_names="0123456789"), "label_names"),
    "a name too few": (lambda config: with_cfg(config, label_names=["a", "b"]), "they are of 10 classes"),
    "no classes": (lambda config: with_cfg(config, label_names=None, num_classes=0), "classifies nothing"),
    "no size": (lambda config: with_cfg(config, input_size=None), "input_size"),
    "half a pixel": (lambda config: with_cfg(config, input_size=[1, 8.5, 8.5]), "input_size"),
    "a size of text": (lambda config: with_cfg(config, input_size=["1", "8", "8"]), "input_size"),
    "a size that is no square": (lambda config: with_cfg(config, input_size=[1, 8, 12]), "square"),
    "no size at all": (lambda config: with_cfg(config, input_size=[1, 0, 0]), "input_size"),
    "a crop of more": (lambda config: with_cfg(config, crop_pct=float("nan")), "crop_pct must be a number"),
    "two means": (lambda config: with_cfg(config, mean=[0.1, 0.2]), "mean"),
    "no deviation": (lambda config: with_cfg(config, std=[0.0]), "std"),
    "means as text": (lambda config: with_cfg(config, mean=["x"]), "mean"),
    "an interpolation": (lambda config: with_cfg(config, interpolation="best"), "interpolation"),
}


def with_cfg(config: dict[str, Any], **values: Any) -> dict[str, Any]:
    return config | {"pretrained_cfg": config["pretrained_cfg"] | values}


class TestConfigurationOfSomebodyElse:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        shutil.copytree(WEIGHTS / NAME, tmp_path / "theirs")
        digit(0).save(tmp_path / "a.png")
        return tmp_path / "theirs"

    def refused(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
        assert main(["predict", f"--ckpt={folder}", str(folder.parent / "a.png")]) == 1
        error = capsys.readouterr().err
        assert str(folder) in error
        assert len(error.strip().splitlines()) == 1
        return error

    @pytest.mark.parametrize("kind", CONFIGS)
    def test_is_refused_in_a_line(self, kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        change, message = CONFIGS[kind]
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(change(config)))
        assert message in self.refused(folder, capsys)

    @pytest.mark.parametrize("text", ["", "{", "\0" * 9, "[" * 10**5, " " * (2**24 + 1), '{"architecture": 1e999}'])
    def test_that_is_no_json_is_refused_too(self, text: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (folder / CONFIG).write_text(text)
        assert "not a configuration" in self.refused(folder, capsys)

    def test_whose_weights_are_missing_or_changed(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        content = bytearray((folder / FILE).read_bytes())
        content[-1] ^= 1
        (folder / FILE).write_bytes(content)
        assert "is not the published file" in self.refused(folder, capsys)
        (folder / FILE).unlink()
        assert f"has no {FILE}" in self.refused(folder, capsys)


@pytest.mark.parametrize("init", ["fresh", "identity"])
def test_a_network_whose_attention_was_folded_away_is_no_converted_one(init: str, tmp_path: Path) -> None:
    """What timm saved of it says that it has branches, and the file holds none."""
    model = awconv.convert(timm.create_model("resnet8_cifar", num_classes=3), init=init)
    for part in (model.layer1, model.layer2, model.layer3):
        awconv.revert(part, drop_attention=True)
    timm.models.save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    images = torch.randn(2, 3, 32, 32)
    if init == "identity":  # branches that change nothing
        loaded = awconv.load(tmp_path / "saved")
        torch.testing.assert_close(loaded.network(images), model.eval()(images), rtol=1e-4, atol=1e-5)  # float32
    else:
        with pytest.raises(ValueError, match="does not hold the weights of resnet8_cifar"):
            awconv.load(tmp_path / "saved")


def test_a_network_that_was_folded_is_saved_as_what_it_is_or_not_at_all(tmp_path: Path) -> None:
    images = torch.randn(4, 3, 32, 32)
    model = awconv.convert(timm.create_model("resnet8_cifar", num_classes=3)).eval()
    with torch.no_grad():
        labels = model(images).argmax(1)
    assert not awconv.fold(model, [(images, labels)], max_drop=100).kept
    timm.models.save_for_hf(model, tmp_path / "whole", safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'whole'}", pretrained=True).eval()
    assert not awconv.is_converted(loaded)
    assert torch.equal(loaded(images), model(images))

    model = timm.create_model("aw_resnet8_cifar", num_classes=3).eval()
    awconv.fold(model, [(images, labels)], max_drop=100)
    with pytest.raises(ValueError, match="not serializable"):
        timm.models.save_for_hf(model, tmp_path / "part", safe_serialization=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pretrained_cfg": {"num_classes": 10**12}},
            "num_classes must be a number from 1 to 1,000,000, got 1000000000000",
        ),
        ({"model_args": {"network_args": [1]}}, r"network_args must be names and values, got \[1\]"),
    ],
)
def test_a_configuration_of_a_stranger_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = awconv.convert(timm.create_model("resnet8_cifar", num_classes=3), init="identity")
    timm.models.save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    config = json.loads((tmp_path / "saved" / CONFIG).read_text())
    for part, values in change.items():
        config[part] |= values
    (tmp_path / "saved" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        awconv.load(tmp_path / "saved")
