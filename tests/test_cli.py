"""The command line, from training to prediction, on scikit-learn's digits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from awconv.cli import main
from awconv.data import Cifar10, Digits, ImageDataModule, ImageFolder, Parquet
from awconv.predict import classify
from awconv.sources import load_task
from awconv.training import TrainingCLI
from awconv.training.checkpoints import find_last

EPOCHS = 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an AW network after a few epochs on the digits."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = folder / "recipe.yaml"
    recipe.write_text("model: {network: resnet8_cifar, lr: 0.1, warmup_epochs: 1}\ntrainer: {max_epochs: 99}\n")
    arguments = f"--model.network=aw_resnet8_cifar --trainer.max_epochs={EPOCHS} --trainer.default_root_dir={folder}"
    quiet = "--trainer.enable_progress_bar=false --trainer.enable_model_summary=false --trainer.logger=false"
    assert main(["fit", f"--config={recipe}", *arguments.split(), *quiet.split()]) == 0
    last = find_last(folder)
    assert last is not None
    return last


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits of the test split as files, in folders."""
    folder = tmp_path_factory.mktemp("pictures")
    images, targets = next(iter(Digits(batch_size=40).test_dataloader()))
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        path = folder / f"{target}" / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    return folder


def test_fit_learns_and_test_evaluates(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = f"--trainer.default_root_dir={trained.parent}"
    for command in ("test", "validate"):
        assert main([command, f"--ckpt_path={trained}", "--trainer.logger=false", root]) == 0
        printed = capsys.readouterr().out
        split = "test" if command == "test" else "val"
        (line,) = [
            line for line in printed.splitlines() if f"{split}/accuracy" in line and any(c.isdigit() for c in line)
        ]
        # Chance is 0.1. In 8 epochs the network gets about 0.98; 0.9 leaves room for other versions and machines.
        assert float("".join(c for c in line if c.isdigit() or c == ".")) > 0.9


def test_the_checkpoint_knows_all_that_a_prediction_needs(trained: Path) -> None:
    content = torch.load(trained, weights_only=True)["hyper_parameters"]
    assert content["network"] == "aw_resnet8_cifar"
    assert content["classes"] == [str(digit) for digit in range(10)]
    assert content["input_size"] == [1, 8, 8]
    assert (content["mean"], content["std"]) == (Digits().mean, Digits().std)


def test_predict_prints_classes_and_probabilities(
    trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "--ckpt", str(trained), "--format", "json", str(pictures)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["failures"] == []
    predictions = content["predictions"]
    assert len(predictions) == 40
    assert all(0.1 <= prediction["probability"] <= 1 for prediction in predictions)
    right = [Path(prediction["image"]).parent.name == prediction["label"] for prediction in predictions]
    assert np.mean(right) > 0.85


def test_predictions_do_not_depend_on_the_batch(trained: Path, pictures: Path) -> None:
    task = load_task(trained)
    files = sorted(pictures.rglob("*.png"))
    together, alone = (list(classify(task, files, batch_size)) for batch_size in (64, 1))
    assert [p.image for p in together] == [p.image for p in alone] == [str(file) for file in files]
    assert [p.top[0][0] for p in together] == [p.top[0][0] for p in alone]
    probabilities = [[p.top[0][1] for p in results] for results in (together, alone)]
    assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-5)


def test_a_broken_image_is_named_and_the_rest_goes_on(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = next(pictures.rglob("*.png")).read_bytes()
    (tmp_path / "good.png").write_bytes(whole)
    (tmp_path / "cut.png").write_bytes(whole[:60])
    Image.new("LAB", (8, 8)).save(tmp_path / "lab.tif")
    (tmp_path / "a[red]b.png").write_bytes(whole)
    (tmp_path / "notes.txt").write_text("not an image, and not taken for one")
    arguments = ["predict", "--ckpt", str(trained), str(tmp_path)]
    assert main([*arguments, "--format", "json"]) == 1
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert [Path(prediction["image"]).name for prediction in content["predictions"]] == [
        "a[red]b.png",
        "good.png",
        "lab.tif",
    ]
    assert [Path(failure["image"]).name for failure in content["failures"]] == ["cut.png"]
    assert "broken image" in printed.err
    assert "cut.png" in printed.err
    assert main(arguments) == 1
    table = capsys.readouterr().out
    assert f"{tmp_path}/good.png" in table
    assert f"{tmp_path}/a[red]b.png" in table
    assert "cut.png" not in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["predict", "--ckpt", "none.ckpt", "{here}/broken.ckpt"],
            "none.ckpt is not there: expected a checkpoint",
        ),
        (
            ["predict", "--ckpt", "{here}/broken.ckpt", "{here}/none.png"],
            "none.png is neither an image file nor a folder",
        ),
        (["predict", "--ckpt", "{here}/broken.ckpt", "{here}"], "holds no image file"),
        (["predict", "--ckpt", "{here}/broken.ckpt", "{here}/broken.ckpt"], "is broken, or not a checkpoint"),
        (["compare", "{here}/none.yaml"], "none.yaml is not a file"),
        (
            ["fit", "--model.network=resnet8_cifer"],
            "timm.create_model knows, got 'resnet8_cifer'; near it: resnet8_cifar, seresnet8_cifar, ",
        ),
        (
            ["fit", "--model.network=resnet8_cifar", "--data=ImageFolder", "--data.root={here}"],
            "train is not a folder",
        ),
        (
            ["fit", "--model.network=resnet8_cifar", "--model.convert={{reductoin: 4}}"],
            "convert must hold arguments of awconv.convert, got {'reductoin': 4}",
        ),
        (
            ["fit", "--model.network=resnet8_cifar", "--model.pretrained=none.pth", "--trainer.logger=false"],
            "weights must be a file (safetensors, a state dict of torch, or a checkpoint), got 'none.pth'",
        ),
        (
            ["fit", "--model.network=resnet8_cifar", "--model.pretrained=true", "--trainer.logger=false"],
            "no pretrained weights for resnet8_cifar (True): No pretrained weights exist",
        ),
        (["models", "--filter=vit*"], "no model matches 'vit*'; there are aw_resnet18, od_resnet18"),
        (
            ["validate", "--model.network=aw_resnet8_cifar.digits", "--model.pretrained=true", "--data.val_fraction=0"],
            "the data have no val split to evaluate on; name one, or give data.val_fraction",
        ),
        (["test"], "there is nothing to evaluate: give --ckpt_path"),
        (
            ["fit", "--trainer.max_epochs=-1", "--trainer.logger=false", "--trainer.default_root_dir={here}"],
            "give trainer.max_epochs or trainer.max_steps",
        ),
    ],
)
def test_a_users_mistake_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.ckpt").write_bytes(b"broken")
    assert main([argument.format(here=tmp_path) for argument in arguments]) == 1
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith(f"awconv {arguments[0]}: ")
    assert message in error
    assert "Traceback" not in error


def test_unknown_commands_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    usage = capsys.readouterr().out
    assert all(command in usage for command in ("demo", "fit", "validate", "test", "compare", "predict", "models"))
    assert main(["trian"]) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err
    assert main(["--version"]) == 0
    for command in ("demo", "compare", "models", "predict"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
    assert "--ckpt" in capsys.readouterr().out


def test_what_needs_training_names_the_extra() -> None:
    commands = ["demo", "fit", "compare", "ablate", "publish", "export", "explain", "predict"]
    code = (
        "import sys; sys.modules['lightning'] = None; from awconv.cli import main; "
        f"print(*[main([command]) for command in {commands}])"
    )
    called = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    needs = "this part of awconv needs 'lightning', which is not installed: pip install 'awconv[train]'"
    assert called.stderr == "".join(f"awconv {command}: {needs}\n" for command in commands)
    assert called.stdout.split() == ["1"] * len(commands)


def test_models_prints_what_they_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--filter=aw_resnet8*"]) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split()[0] == "name"
    assert row.split() == ["aw_resnet8_cifar", "resnet8_cifar", "32", "83,466", "10.86", "%", "12.38", "1.16", "%"]
    assert main(["models", "--filter=aw_resnet8*", "--format=json"]) == 0
    (pair,) = json.loads(capsys.readouterr().out)
    assert (pair["parameters"], pair["baseline"]["parameters"]) == (83466, 75290)


def test_compare_trains_twins_and_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("model: {network: resnet8_cifar}\ntrainer: {max_epochs: 99}\n")
    out = tmp_path / "report"
    command = ["compare", str(recipe), "--out", str(out), "--seeds", "2", "--variants", "plain,aw"]
    assert main([*command, "--", "--trainer.max_epochs=1", "--trainer.limit_train_batches=3"]) == 0
    assert "aw_resnet8_cifar" in (out / "table.md").read_text()
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [(run["variant"], run["seed"]) for run in runs] == [("plain", 0), ("aw", 0), ("plain", 1), ("aw", 1)]
    assert {run["recipe"]["trainer"]["max_epochs"] for run in runs} == {1}
    assert runs[0]["score"] != runs[2]["score"]
    checkpoint = next((out / "aw-seed1").rglob("*.ckpt"))
    assert load_task(checkpoint).hparams["network"] == "aw_resnet8_cifar"
    capsys.readouterr()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([], Digits),
        (["--data=Cifar10"], Cifar10),
        (["--data=ImageFolder", "--data.root=x"], ImageFolder),
        (["--data=Parquet", "--data.train=x"], Parquet),
    ],
)
def test_each_data_set_has_its_own_defaults(
    data: list[str], expected: type[ImageDataModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expected, "classes", ["a", "b"])  # there are no files to read them from
    module = TrainingCLI(data, run=False).datamodule
    assert type(module) is expected
    assert module.image_size == expected.default_image_size
    assert module.crop_padding == expected.default_crop_padding
    assert module.horizontal_flip == expected.default_horizontal_flip
    assert module.mean == pytest.approx(expected.default_mean)


def test_a_number_of_steps_ends_the_training(tmp_path: Path) -> None:
    arguments = "--trainer.max_steps=3 --trainer.logger=false --trainer.enable_progress_bar=false"
    network = "--model.network=resnet8_cifar --model.warmup_epochs=0.1"
    assert main(["fit", *arguments.split(), *network.split(), f"--trainer.default_root_dir={tmp_path}"]) == 0
    (checkpoint,) = tmp_path.glob("checkpoints/*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    assert content["global_step"] == 3
    # One step of warm-up, a tenth of the ten that an epoch has, then a cosine over the other two, which ends at zero.
    assert content["lr_schedulers"][0]["_last_lr"] == pytest.approx([0.0, 0.0], abs=1e-9)


def test_other_data_than_the_checkpoints_are_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    assert main(["test", f"--ckpt_path={trained}", "--data.mean=[0.5]", *quiet]) == 1
    error = capsys.readouterr().err
    assert "the checkpoint was trained with mean [0.305], and the data have [0.5]" in error


def test_evaluation_writes_no_configuration_and_training_its_own(trained: Path) -> None:
    assert {path.name for path in trained.parent.parent.glob("*.yaml")} == {"awconv_fit.yaml", "recipe.yaml"}
    assert not list(trained.parent.glob("*.yaml"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9.0 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB"),
    ],
)
def test_too_little_memory_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise error

    monkeypatch.setattr("awconv.cli._train", fail)
    assert main(["fit"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("awconv fit: there is not enough memory; take smaller images or batches: ")
    assert "allocate 9" in printed
    assert printed.count("\n") == 1


def test_other_errors_of_the_runtime_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> int:
        raise RuntimeError("a fault of our own")

    monkeypatch.setattr("awconv.cli._train", fail)
    with pytest.raises(RuntimeError, match="a fault of our own"):
        main(["fit"])


def test_the_models_are_listed_without_the_training_libraries() -> None:
    code = (
        "import sys; sys.modules['lightning'] = None; from awconv.cli import main; "
        "sys.exit(main(['models', '--filter', 'aw_resnet8_cifar', '--format', 'json']) or main(['fit']) - 1)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)[0]["name"] == "aw_resnet8_cifar"
    assert (
        "this part of awconv needs 'lightning', which is not installed: pip install 'awconv[train]'" in process.stderr
    )


def test_a_reader_that_has_read_enough_ends_a_command_quietly() -> None:
    command = (
        f"{sys.executable} -m awconv models --filter 'aw_resnet*_cifar' --format json | true; echo ${{PIPESTATUS[0]}}"
    )
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (process.stdout.strip(), process.stderr) == ("141", "")
