"""Training, evaluating and applying a detector, on two photographs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from awconv import AWConv2d
from awconv.cli import main
from awconv.compare import compare
from awconv.compare.record import Record
from awconv.predict import detect
from awconv.tasks import DetectionTask
from awconv.tasks.coco import Figures
from awconv.training import TrainingCLI
from awconv.training.checkpoints import find_last, read_checkpoint
from tests.photographs import CATEGORIES, annotations, boxes, photograph, write_coco
from tests.tasks.test_coco import pycocotools
from tests.training import several

# A detector that learns two photographs in seconds.
TINY = (
    "--model.norm=group",
    "--model.min_size=106",
    "--model.max_size=160",
    "--model.detector_args={out_channels: 32, box_batch_size_per_image: 32, rpn_batch_size_per_image: 64, "
    "rpn_pre_nms_top_n_train: 200, rpn_post_nms_top_n_train: 100, rpn_pre_nms_top_n_test: 200, "
    "rpn_post_nms_top_n_test: 50}",
    "--model.optimizer=adamw",
    "--model.lr=0.002",
    "--model.weight_decay=5e-4",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--data.num_workers=0",
)


def on(root: Path) -> list[str]:
    return ["--data=Coco", f"--data.root={root}", "--data.val=train2017"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def trained(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a detector that has learned the photographs."""
    root = tmp_path_factory.mktemp("trained")
    arguments = ["--model.network=aw_resnet8_cifar", "--trainer.max_epochs=80", "--trainer.limit_val_batches=0"]
    assert main(["fit", *on(photographs), *TINY, *arguments, f"--trainer.default_root_dir={root}"]) == 0
    last = find_last(root)
    assert last is not None
    return last


def figures(root: Path) -> dict[str, float]:
    """The last figures of each kind that a training or an evaluation logged."""
    found: dict[str, float] = {}
    for log in sorted(root.rglob("metrics.csv"), key=lambda path: path.stat().st_mtime):
        for row in csv.DictReader(log.open()):
            found |= {name: float(value) for name, value in row.items() if value}
    return found


def test_two_photographs_are_learned(trained: Path, photographs: Path, tmp_path: Path) -> None:
    found = tmp_path / "found" / "detections.json"
    arguments = [f"--ckpt_path={trained}", f"--detections.file={found}", f"--trainer.default_root_dir={tmp_path}"]
    arguments.append("--trainer.logger=true")
    assert main(["test", *on(photographs), *TINY, "--model.network=aw_resnet8_cifar", *arguments]) == 0
    logged = figures(tmp_path)
    assert logged["test/AP50"] > 0.75  # of four boxes, one of which is 11 pixels high
    assert logged["test/AP/temple"] > 0.5
    assert {name.removeprefix("test/AP/") for name in logged if name.startswith("test/AP/")} == set(CATEGORIES)
    detections = json.loads(found.read_text())
    best = max(detections, key=lambda one: one["score"])
    assert set(best) == {"image_id", "category_id", "bbox", "score"}
    assert {one["category_id"] for one in detections} <= set(CATEGORIES.values())
    assert {one["image_id"] for one in detections} == {40, 41}
    # The written detections are those that were evaluated.
    assert pycocotools(annotations(), detections)["AP"] == pytest.approx(logged["test/AP"], abs=1e-6)


def test_predict_finds_draws_and_writes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    for name in ("china", "flower"):
        (folder / name).mkdir(parents=True)
        photograph(name).save(folder / name / "a.png")
    Image.new("RGB", (160, 106)).save(folder / "black.png")
    (folder / "cut.png").write_bytes((folder / "china" / "a.png").read_bytes()[:200])
    arguments = ["predict", "--ckpt", str(trained), "--draw", str(tmp_path / "drawn"), str(folder)]
    assert main([*arguments, "--format", "json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert [Path(failure["image"]).name for failure in content["failures"]] == ["cut.png"]
    found = {str(Path(one["image"]).relative_to(folder)): one["detections"] for one in content["predictions"]}
    assert set(found) == {"black.png", "china/a.png", "flower/a.png"}
    temple = next(one for one in found["china/a.png"] if one["label"] == "temple")
    assert temple["box"] == pytest.approx(boxes("china")[0][1], abs=8)  # pixels, of 160
    assert all(one["score"] >= 0.5 for detections in found.values() for one in detections)
    drawn = {path.relative_to(tmp_path / "drawn"): path for path in (tmp_path / "drawn").rglob("*.png")}
    assert set(map(str, drawn)) == {"black.png", "china_a.png", "flower_a.png"}
    before, after = np.asarray(photograph("china")), np.asarray(Image.open(drawn[Path("china_a.png")]))
    assert before.shape == after.shape
    changed = (before != after).any(2)
    left, top, right, bottom = map(round, temple["box"])
    assert changed[:, max(0, left - 2) : left + 3].sum() > (bottom - top) / 2  # the box's left edge
    assert not changed[bottom + 4 :, right + 30 :].any()
    # A photograph that a camera held sideways is the same.
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by a quarter, anticlockwise
    sideways = tmp_path / "sideways.png"
    photograph("china").transpose(Image.Transpose.ROTATE_270).save(sideways, exif=exif)
    # A threshold below the detector's own of 0.05 finds more.
    line = ["predict", "--ckpt", str(trained), "--format", "json", "--threshold", "0.001", str(sideways)]
    assert main([*line, "--draw", str(tmp_path / "turned")]) == 0
    ((turned,),) = [[one["detections"] for one in json.loads(capsys.readouterr().out)["predictions"]]]
    assert turned[0]["box"] == pytest.approx(found["china/a.png"][0]["box"], abs=0.01)
    assert min(one["score"] for one in turned) < 0.05
    assert Image.open(tmp_path / "turned" / "sideways.png").size == photograph("china").size
    assert main([*arguments, "--threshold", "0.99999"]) == 1
    assert "best score" in capsys.readouterr().out
    assert main([*arguments, "--threshold", "2"]) == 1
    assert "threshold must be from 0 to 1, got 2.0" in capsys.readouterr().err


def test_labels_stay_on_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = DetectionTask(["temple"], [1], network="resnet8_cifar").eval()
    corner = {
        "boxes": torch.tensor([[150.0, 96, 159, 105]]),
        "labels": torch.tensor([1]),
        "scores": torch.tensor([0.9]),
    }
    monkeypatch.setattr(task, "forward", lambda images: [corner])
    Image.new("RGB", (160, 106)).save(tmp_path / "black.png")
    assert len(list(detect(task, [tmp_path / "black.png"], threshold=0.5, draw=tmp_path / "drawn"))) == 1
    coloured = np.asarray(Image.open(tmp_path / "drawn" / "black.png")).any(2)
    assert np.flatnonzero(coloured.any(0))[0] < 130  # the label is wider than its box, and begins left of it
    assert np.flatnonzero(coloured.any(1))[0] < 96


def test_a_checkpoint_of_other_categories_says_so(
    trained: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model.network=aw_resnet8_cifar", f"--ckpt_path={trained}", "--trainer.logger=false"]
    assert main(["test", *on(photographs), *TINY, "--data.categories=[temple, tree]", *arguments]) == 1
    error = capsys.readouterr().err
    assert "trained with classes ['temple', 'flower', 'tree'], and the data have ['temple', 'tree']" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--model.detector_args={box_scoer_thresh: 0.1}",
            "(detector_args={'box_scoer_thresh': 0.1})",
        ),
        ("--model.detector_args={min_size: 320}", "detector_args must leave min_size to --model.min_size"),
        ("--model.detector_args={num_classes: 3}", "detector_args must leave num_classes to the data"),
        ("--model.network=resnet8_cifer", "timm.create_model knows, got 'resnet8_cifer'"),
        ("--model.norm=frozen", "norm must be 'batch', 'sync' or 'group' without pretrained weights, got 'frozen'"),
        ("--model.pretrained=none.pth", "weights must be a file (safetensors, a state dict of torch, or a checkpoint)"),
        ("--model.min_size=0", "min_size must be a number from 1 to 4096, got 0"),
        ("--model.min_size=[32,-1]", "min_size must be a number from 1 to 4096, got -1"),
        ("--model.min_size=[]", "min_size must be a size in pixels, or several, got none"),
        ("--model.max_size=100000", "max_size must be a number from 1 to 8192, got 100000"),
        ("--data.root=none", "none is neither a folder nor a zip archive"),
        ("--model.detector=yolo", "yolo"),
    ],
)
def test_a_users_mistake_is_named(
    argument: str, message: str, photographs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [*on(photographs), *TINY, "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    network = [] if "network" in argument else ["--model.network=resnet8_cifar"]
    assert main(["fit", *arguments, *network, "--trainer.max_epochs=1", argument]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_the_name_of_a_category_does_nothing_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning prints the names of figures as they are."""
    task, logged = DetectionTask(["\x1b[2Jcat"], [1], network="resnet8_cifar"), dict[str, float]()
    monkeypatch.setattr(task, "_log_figures", lambda split: Figures({}, {"\x1b[2Jcat": 0.5}))
    monkeypatch.setattr(task, "log_dict", logged.update)
    task.on_test_epoch_end()
    assert logged == {"test/AP/\\x1b[2Jcat": 0.5}


def test_pretrained_backbones_get_the_images_they_know() -> None:
    for pretrained, expected in ((True, [1 / 255] * 3), ("vgg.pth", (0.229, 0.224, 0.225))):
        task = DetectionTask(["a"], [1], detector="ssd300", network="vgg16", pretrained=pretrained)
        assert task.network.transform.image_std == pytest.approx(expected)  # type: ignore[union-attr]


def test_a_hub_that_cannot_be_reached_is_said(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    arguments = [*on(photographs), *TINY, "--model.network=resnet18", "--model.norm=frozen", "--model.pretrained=true"]
    assert main(["fit", *arguments, "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert "no pretrained weights for resnet18 (True)" in error
    assert "--model.pretrained=FILE takes them from a file" in error


@pytest.mark.parametrize(
    ("network", "arguments", "reductions"),
    [
        ("vgg16", {}, []),
        ("vgg16", {"convert": {"init": "identity", "reduction": 8}}, [8] * 12),
        ("aw_vgg16", {}, [16] * 12),
        ("aw_vgg16", {"network_args": {"aw_args": {"reduction": 4}}}, [4] * 12),
    ],
)
def test_what_is_asked_of_ssd_is_done(network: str, arguments: dict[str, Any], reductions: list[int]) -> None:
    task = DetectionTask(["a"], [1], detector="ssd300", network=network, **arguments)
    assert [layer.reduction for layer in task.modules() if isinstance(layer, AWConv2d)] == reductions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "group", "min_size": 512}, "norm, min_size must be left out with ssd300"),
        ({"network_args": {"drop_rate": 0.1}}, "do not fit: vgg16 takes no drop_rate; aw_vgg16 takes aw_args"),
        ({"network_args": {"aw_args": {}}}, "do not fit: vgg16 takes no aw_args; aw_vgg16 takes aw_args"),
    ],
)
def test_what_ssd_cannot_do_is_said(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionTask(["a"], [1], detector="ssd300", network="vgg16", **arguments)


def test_an_evaluation_of_broken_images_alone_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_coco(tmp_path)
    arguments = [*on(root), *TINY, "--model.network=aw_resnet8_cifar", "--data.broken_images=skip"]
    arguments += ["--data.inspect=false", "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    (root / "train2017" / "china.png").unlink()
    # Of the first batch nothing is left, of all images something is.
    few = ["--data.batch_size=1", "--trainer.num_sanity_val_steps=1", "--trainer.max_epochs=1"]
    assert main(["fit", *arguments, *few]) == 0
    (root / "train2017" / "flower.png").unlink()
    assert main(["validate", *arguments, f"--ckpt_path={trained}"]) == 1
    assert "none of the images that were to be evaluated (val) can be decoded" in capsys.readouterr().err


def test_what_was_never_trained_is_not_evaluated(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*on(photographs), *TINY, "--model.network=resnet8_cifar", "--trainer.logger=false"]
    arguments.append(f"--trainer.default_root_dir={tmp_path}")
    assert main(["test", *arguments, "--model.norm=batch", "--model.pretrained=weights.pth"]) == 1
    assert "pretrained weights are of a detector's backbone alone: give --ckpt_path" in capsys.readouterr().err


class StopError(Exception):
    pass


def test_an_interrupted_training_ends_as_an_uninterrupted_one(photographs: Path, tmp_path: Path) -> None:
    common = ["--model.network=aw_resnet8_cifar", "--trainer.limit_val_batches=0", "--data.batch_size=1"]
    common += ["--trainer.gradient_clip_val=1", "--recent_checkpoint.every_n_steps=1", "--trainer.max_epochs=3"]

    def train(root: Path, stop: int = 0) -> dict[str, Tensor]:
        arguments = [*on(photographs), *TINY, *common, f"--trainer.default_root_dir={root}"]
        if stop:
            cli = TrainingCLI([*arguments, "--trainer.logger=false"], run=False, save_config=False)
            task, original, done = cli.model, cli.model.training_step, 0

            def step(batch: Any, batch_idx: int) -> Tensor:
                nonlocal done
                done += 1
                if done > stop:
                    raise StopError
                return original(batch, batch_idx)

            task.training_step = step
            with pytest.raises(StopError):
                cli.trainer.fit(task, datamodule=cli.datamodule)
        assert main(["fit", *arguments, "--ckpt_path=last"]) == 0
        last = find_last(root)
        assert last is not None
        return read_checkpoint(last)["state_dict"]

    whole, interrupted = train(tmp_path / "whole"), train(tmp_path / "interrupted", stop=3)
    assert all(torch.equal(interrupted[name], tensor) for name, tensor in whole.items())  # bit for bit


def test_two_processes_train_and_evaluate_every_image_once(tmp_path: Path) -> None:
    content = annotations()
    content["images"].append(content["images"][0] | {"id": 7})  # an odd number of images
    content["annotations"] += [
        one | {"image_id": 7, "id": 50 + one["id"]} for one in content["annotations"] if one["image_id"] == 40
    ]
    root = write_coco(tmp_path / "data", content)
    arguments = [*on(root), *TINY, "--model.network=aw_resnet8_cifar"]

    def run(command: str, folder: str, *more: str) -> dict[str, float]:
        several.start(tmp_path / folder, more, command=command, settings=arguments).done()
        return figures(tmp_path / folder)

    logged = run("fit", "fit", "--trainer.max_epochs=1", "--data.batch_size=1")
    last = find_last(tmp_path / "fit")
    assert last is not None
    assert read_checkpoint(last)["global_step"] == 1
    found, expected = (tmp_path / f"{name}.json" for name in ("two", "one"))
    run("validate", "two", f"--ckpt_path={last}", f"--detections.file={found}")
    one = [*arguments, f"--trainer.default_root_dir={tmp_path / 'one'}", f"--ckpt_path={last}"]
    assert main(["validate", *one, f"--detections.file={expected}"]) == 0
    alone = figures(tmp_path / "one")
    for name, value in alone.items():
        if name.startswith("val/A"):
            assert logged[name] == pytest.approx(value, abs=1e-6), name
    written = [sorted((d["image_id"], d["score"]) for d in json.loads(file.read_text())) for file in (found, expected)]
    assert [image for image, _ in written[0]] == [image for image, _ in written[1]]
    assert {image for image, _ in written[0]} == {7, 40, 41}
    scores = [[score for _, score in detections] for detections in written]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)  # images of a batch are padded alike


def test_plain_and_aw_are_compared(photographs: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "model: {network: resnet8_cifar}\n"
        "trainer: {max_epochs: 1}\n"
        f"data: {{class_path: awconv.data.Coco, init_args: {{root: {photographs}, val: train2017, batch_size: 1}}}}\n"
    )
    assert compare(recipe, "plain,aw", seeds=1, out=tmp_path / "out", overrides=TINY) == 0
    before = (tmp_path / "out" / "aw-seed0.json").stat().st_mtime_ns
    assert compare(recipe, "plain,aw", seeds=1, out=tmp_path / "out", overrides=TINY) == 0  # takes up what is finished
    assert (tmp_path / "out" / "aw-seed0.json").stat().st_mtime_ns == before
    plain, aw = (Record.load(tmp_path / "out" / f"{name}-seed0.json") for name in ("plain", "aw"))
    assert plain.metric == aw.metric == "box AP"
    assert aw.figures.keys() == {"AP50", "AP75", "AP_small", "AP_medium", "AP_large"}
    assert 0 <= aw.score <= aw.figures["AP50"] <= 1
    assert aw.parameters > plain.parameters
    assert aw.operations is not None
    assert plain.operations is not None
    assert aw.operations > plain.operations
    assert len(aw.epochs) == 1
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Score: box AP of the network after the last epoch on the validation split" in page
