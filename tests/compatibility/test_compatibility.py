"""This version reads files of an earlier one: checkpoints, records of runs, a pickled layer.

The commit 8b02dc4 (November 2026) wrote all of them, on the digits, with a resnet8_cifar of width 4:

    awconv fit --config=fit.yaml                       fit.ckpt, with averaged weights
    awconv fit ... --model.convert="{init: identity}"  identity.ckpt
    awconv compare recipe.yaml --seeds 1               plain-seed0.json, aw-seed0.json, aw-seed0-epoch0.ckpt

Published weights are in tests/models/test_published.py, and the records under results/ in tests/test_readme.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from awconv import AWConv2d
from awconv.cli import main
from awconv.compare import compare
from awconv.compare.record import Record
from awconv.sources import load_task
from awconv.training import TrainingCLI
from awconv.training.checkpoints import read_checkpoint

HERE = Path(__file__).parent
QUIET = ("--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu")
# Of the version that wrote the files; other processors add in another order.
TEST_LOSS = {"fit": 2.1969661712646484, "identity": 2.3582708835601807}


@pytest.mark.parametrize("name", TEST_LOSS)
def test_a_checkpoint_is_evaluated_to_the_same_loss(name: str) -> None:
    cli = TrainingCLI(["test", f"--ckpt_path={HERE / name}.ckpt", *QUIET])
    assert cli.trainer.callback_metrics["test/loss"].item() == pytest.approx(TEST_LOSS[name], rel=1e-4)
    assert load_task(HERE / f"{name}.ckpt").hparams["network_args"]["width"] == 4


def test_a_training_by_identity_goes_on_in_the_form_that_it_began_in(tmp_path: Path) -> None:
    """Its weights were divided by 1 + a0, and so are the optimiser's momenta: the map must not become relative."""
    arguments = ["--model.network_args={width: 4}", "--model.network=resnet8_cifar", "--data.batch_size=64"]
    convert = "--model.convert={init: identity, reduction: 4}"
    root = f"--trainer.default_root_dir={tmp_path}"
    resumed = [f"--ckpt_path={HERE / 'identity.ckpt'}", "--trainer.max_epochs=2"]
    cli = TrainingCLI(["fit", *arguments, convert, root, *QUIET, *resumed])
    assert cli.trainer.global_step == 2 * read_checkpoint(HERE / "identity.ckpt")["global_step"]
    layers = [module for module in cli.model.network.modules() if isinstance(module, AWConv2d)]
    assert layers
    assert all(layer.attention.relative_to is None for layer in layers)


def test_a_training_goes_on_by_the_settings_that_were_written(tmp_path: Path) -> None:
    root = f"--trainer.default_root_dir={tmp_path}"
    arguments = [f"--config={HERE / 'fit.yaml'}", root, *QUIET, f"--ckpt_path={HERE / 'fit.ckpt'}"]
    cli = TrainingCLI(["fit", *arguments, "--trainer.max_epochs=2"])
    assert cli.trainer.global_step == 2 * read_checkpoint(HERE / "fit.ckpt")["global_step"]
    with pytest.raises(ValueError, match=r"other settings: model\.lr is 0\.1 there, 0\.2 now"):
        TrainingCLI(["fit", *arguments, "--trainer.max_epochs=2", "--model.lr=0.2"])
    with pytest.raises(ValueError, match=r"other settings: model\.head_lr_factor is 1\.0 there, 2\.0 now"):
        TrainingCLI(["fit", *arguments, "--trainer.max_epochs=2", "--model.head_lr_factor=2"])
    with pytest.raises(ValueError, match=r"other settings: model\.train_only is not set there"):
        TrainingCLI(["fit", *arguments, "--trainer.max_epochs=2", "--model.train_only=[head]"])


def test_finished_runs_are_taken_and_an_interrupted_one_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(HERE / "plain-seed0.json", tmp_path)
    checkpoints = tmp_path / "aw-seed0" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copy(HERE / "aw-seed0-epoch0.ckpt", checkpoints)
    assert compare(HERE / "recipe.yaml", seeds=1, out=tmp_path) == 0
    assert "1 of 2 runs are finished already" in capsys.readouterr().out
    found, expected = Record.load(tmp_path / "aw-seed0.json"), Record.load(HERE / "aw-seed0.json")
    assert found.epochs[0] == expected.epochs[0]  # was kept in the checkpoint
    # Twenty steps of training amplify what another processor rounds.
    assert found.epochs[1].train_loss == pytest.approx(expected.epochs[1].train_loss, rel=0.02)
    settings = {name: value for name, value in expected.recipe.items() if name != "trainer"}
    settings["model"] = settings["model"] | {"head_lr_factor": 1.0}  # which there was not
    settings["processes"] = {"timeout": 600.0}  # likewise
    assert {name: value for name, value in found.recipe.items() if name != "trainer"} == settings
    assert json.loads((tmp_path / "results.json").read_text())["summary"][1]["variant"] == "aw"


def test_a_record_of_other_settings_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(HERE / "plain-seed0.json", tmp_path)
    arguments = [str(HERE / "recipe.yaml"), "--seeds=1", f"--out={tmp_path}", "--", "--model.lr=0.2"]
    assert main(["compare", *arguments]) == 1
    assert "holds a run of other settings: model.lr is 0.1 there, 0.2 now" in capsys.readouterr().err


def test_a_pickled_layer_is_loaded() -> None:
    layer = torch.load(HERE / "layer.pt", weights_only=False)
    image = torch.linspace(-1, 1, 4 * 36).reshape(1, 4, 6, 6)
    with torch.inference_mode():
        output = layer(image)
    # Sums of 36 products in single precision.
    assert output[0, 3, 2, :3].tolist() == pytest.approx(
        [0.8176760673522949, 0.561975359916687, 0.5645675659179688], abs=1e-5
    )
