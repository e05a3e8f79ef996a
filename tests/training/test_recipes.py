"""Settings that would train nothing, and files that are no recipes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from awconv.cli import main
from awconv.compare.variants import read_base
from awconv.training.recipe import Recipe
from tests.training.test_checkpoints import SHORT


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--trainer.limit_train_batches=0", "trainer.limit_train_batches must be more than 0"),
        ("--trainer.max_epochs=0", "trainer.max_epochs must be more than 0"),
        ("--trainer.max_steps=0", "trainer.max_steps must be more than 0"),
        ("--trainer.max_time=00:00:00:00", "trainer.max_time must be more than 0 to train anything"),
        ("--trainer.max_time=text", "trainer.max_time must be days, hours, minutes and seconds, DD:HH:MM:SS"),
        (
            "--trainer.accumulate_grad_batches=0",
            "trainer.accumulate_grad_batches must be from 1 to 2,147,483,647",
        ),
        (
            "--trainer.accumulate_grad_batches=-2",
            "trainer.accumulate_grad_batches must be from 1 to 2,147,483,647",
        ),
        (
            "--trainer.check_val_every_n_epoch=0",
            "trainer.check_val_every_n_epoch must be from 1 to 2,147,483,647",
        ),
        ("--trainer.val_check_interval=0", "trainer.val_check_interval must be more than 0, got 0"),
        ("--trainer.log_every_n_steps=-1", "trainer.log_every_n_steps must be from 0 to 2,147,483,647"),
        ("--trainer.overfit_batches=1e308", "trainer.overfit_batches must be a number of batches, or a share from 0"),
        ("--trainer.val_check_interval={a: 1}", "there is no such trainer: 'a' is an invalid keyword argument"),
        ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val must be a number of at least 0, got -1"),
        ("--seed_everything=-1", "seed_everything must be from 0 to 4,294,967,295, got -1"),
        ("--model.mixup={prob: .nan, mixup_alpha: 0.2}", "mixup.prob must be a number from 0 to 1, got nan"),
        ("--model.mixup={mixup_alpha: -1}", "mixup.mixup_alpha must be a number from 0 to 1e+06, got -1"),
        ("--model.ema_decay=1e400", "ema_decay must be a number from 0 to 1, got inf"),
        ("--model.ema_decay=1.5", "ema_decay must be a number from 0 to 1, got 1.5"),
        ("--model.lr=.nan", "lr must be a number from 0 to 1e+18, got nan"),
        ("--model.lr=-1", "lr must be a number from 0 to 1e+18, got -1"),
        ("--model.lr=1e308", "lr must be a number from 0 to 1e+18, got 1e+308"),
        ("--model.lr=1e18", "the loss became infinite or not a number"),
        ("--model.momentum=2", "momentum must be a number from 0 to 1, got 2"),
        ("--model.label_smoothing=1.2", "label_smoothing must be a number from 0 to 1, got 1.2"),
        ("--model.erasing=-0.1", "erasing must be a number from 0 to 1"),
        ("--model.warmup_epochs=.inf", "warmup_epochs must be a number from 0 to 1e+18"),
        ("--model.decay_epochs=[1, .nan]", "decay_epochs[1] must be a number from 0 to 1e+18"),
        ("--model.optimizer=sdg", "optimizer must be a name of timm.optim.list_optimizers()"),
        ("--model.optimizer_args={nestrov: true}", "optimizer_args its arguments, got 'sgd' and {'nestrov': True}"),
        ("--model.network_args={drop_rte: 0.1}", "cannot be built with network_args {'drop_rte': 0.1}"),
        ("--model.mixup={mixup_alfa: 0.1}", "mixup must hold arguments of timm.data.Mixup"),
        ("--data.split_seed=null", "awconv fit: data.split_seed must not be null"),
        ("--data.batch_size=null", "awconv fit: data.batch_size must not be null"),
        ("--data.num_workers=5000", "awconv fit: num_workers must be at most"),
    ],
)
def test_options_out_of_range_are_refused(
    argument: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SHORT, "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}", argument]
    assert main(["fit", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_processes_of_a_training_are_counted() -> None:
    with pytest.raises(ValueError, match=r"trainer\.devices must be at most .*, got 5000"):
        Recipe.parse(["--trainer.devices=5000", "--model.network=resnet8_cifar"])


def recipe(folder: Path, text: str) -> str:
    (folder / "recipe.yaml").write_text(text)
    return str(folder / "recipe.yaml")


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1]", "model must be a mapping of settings, got '[1]'"),
        ("model: resnet8_cifar", "model must be a mapping of settings, got 'resnet8_cifar'"),
        ("- model", "must be a mapping such as"),
        ("model: {network: [", "cannot be read as YAML"),
        ("\x00", "cannot be read as YAML"),
        (LAUGHS, "its aliases make more than 100,000 values of it"),
        ("model: &model {network: *model}", "an alias stands within what it names"),
        ("x: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("x: " + "y" * 2**20, "must have at most 1,048,576 bytes"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "compare"])
def test_recipes_that_are_none_are_refused(
    command: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, text)
    assert (
        main(["fit", f"--config={path}"] if command == "fit" else ["compare", path, f"--out={tmp_path / 'out'}"]) == 1
    )
    error = capsys.readouterr().err
    assert f"recipe {path}" in error
    assert message in error
    assert "Traceback" not in error
    assert {file.name for file in tmp_path.iterdir()} == {"recipe.yaml"}


_LEVELS = (f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))
LISTS = f"[&a0 [x, x, x, x, x, x, x, x, x], {', '.join(_LEVELS)}]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--config={here}/recipe.yaml"],
        ["fit", "--data={here}/data.yaml"],
        ["fit", "--data={{class_path: awconv.data.Digits, init_args: {{image_size: {lists}}}}}"],
        ["fit", "--model={here}/model.yaml"],
        ["fit", "--trainer={lists}"],
        ["fit", "--model.network_args={{k: {lists}}}"],
        ["fit", "--data.transform={lists}"],
        ["compare", "recipe.yaml", "--config={here}/lists.yaml"],
        ["models", "--config={here}/lists.yaml"],
    ],
)
def test_no_argument_and_no_file_grows_by_its_aliases(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lists.yaml").write_text(f"variants: {LISTS}\n")
    (tmp_path / "model.yaml").write_text(f"network_args: {{k: {LISTS}}}\n")
    (tmp_path / "data.yaml").write_text(f"class_path: awconv.data.Digits\ninit_args: {{image_size: {LISTS}}}\n")
    (tmp_path / "recipe.yaml").write_text("data: data.yaml\n")
    assert main([argument.format(here=tmp_path, lists=LISTS) for argument in arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert "its aliases make more than 100,000 values of it" in error
    assert "Traceback" not in error


def test_a_section_may_be_a_file_and_a_recipe_may_be_given_as_text(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("network: resnet8_cifar")
    path = recipe(tmp_path, "model: model.yaml")
    for given in (path, '{"model": {"network": "resnet8_cifar"}}'):
        assert Recipe.parse([f"--config={given}"]).network == "resnet8_cifar"
    assert read_base(Path(path), []).network == "resnet8_cifar"


def test_a_network_of_null_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, "model: {network: null}")
    assert main(["compare", path, f"--out={tmp_path / 'out'}"]) == 1
    assert f"recipe {path} must name a network under model.network" in capsys.readouterr().err


def test_settings_of_somebody_elses_run_are_not_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a file of a run names is compared as text."""
    path = recipe(tmp_path, "model: {network: resnet8_cifar}\ntrainer: {max_epochs: 1, limit_train_batches: 2}\n")
    command = ["compare", path, "--variants=plain", "--seeds=1", f"--out={tmp_path / 'out'}"]
    assert main(command) == 0
    file = tmp_path / "out" / "plain-seed0.json"
    run = json.loads(file.read_text())
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        for section, name in (
            ("trainer", "callbacks"),
            ("trainer", "strategy"),
            ("data", "class_path"),
            ("model", "optimizer"),
        ):
            planted = json.loads(json.dumps(run))
            planted["recipe"][section][name] = (
                "planted.Thing" if name != "callbacks" else [{"class_path": "planted.Thing"}]
            )
            file.write_text(json.dumps(planted))
            assert main(command) == 1
            error = capsys.readouterr().err
            assert "holds a run of other settings" in error
            assert "planted.Thing" in error
            assert "planted" not in sys.modules
    finally:
        sys.path.remove(str(tmp_path))


def test_the_users_folder_is_meant_by_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No shell puts it there after an equals sign, and none reads recipes."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    text = "model: {network: resnet8_cifar, pretrained: ~/w.pth}\ntrainer: {default_root_dir: ~/fit, max_epochs: 1}\n"
    (home / "recipe.yaml").write_text(text)
    assert main(["fit", "--config=~/recipe.yaml", "--trainer.limit_train_batches=1", "--trainer.accelerator=cpu"]) == 1
    assert f"got '{home / 'w.pth'}'" in capsys.readouterr().err
    short = ["--trainer.limit_train_batches=1", "--trainer.accelerator=cpu", "--model.pretrained=false"]
    assert main(["fit", "--config=~/recipe.yaml", *short]) == 0
    assert list(home.glob("fit/**/*.ckpt"))
    (home / "last.yaml").write_text("ckpt_path: ~/none.ckpt")
    assert main(["fit", "--config=~/recipe.yaml", "--config=~/last.yaml"]) == 1
    assert f"checkpoint {home / 'none.ckpt'} is not a file" in capsys.readouterr().err
    assert main(["compare", "recipe.yaml", "--out=~/compared"]) == 1  # no such recipe
    (here / "recipe.yaml").write_text(text)
    assert main(["compare", "recipe.yaml", "--out=~/compared", "--variants=plain", "--seeds=1", "--", *short]) == 0
    assert (home / "compared" / "index.html").is_file()
    assert not list(here.glob("~*"))
