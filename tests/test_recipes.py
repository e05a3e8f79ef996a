"""Every recipe runs on photographs that scikit-learn ships, and each of its variants exists."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images

from awconv.compare.variants import find_change
from awconv.training import TrainingCLI
from tests.photographs import write_coco

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
VARIANTS = ("plain", "se", "cbam", "aw", "aw_se", "aw_cbam")


def is_detection(recipe: Path) -> bool:
    return yaml.safe_load(recipe.read_text())["data"]["class_path"] in ("awconv.data.Coco", "awconv.data.Voc")


CLASSIFICATION = [recipe for recipe in RECIPES if not is_detection(recipe)]
DETECTION = [recipe for recipe in RECIPES if is_detection(recipe)]


def trained(recipes: list[Path]) -> list[Any]:
    """Those of which another network of their kind, or their data, takes the same step are left to the campaign."""
    slow = ("resnet101", "cifar100_wrn", "voc_")
    marks = {recipe: pytest.mark.campaign if any(part in recipe.stem for part in slow) else () for recipe in recipes}
    return [pytest.param(recipe, id=recipe.stem, marks=marks[recipe]) for recipe in recipes]


QUIET = ("--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


def take_two_steps(cli: TrainingCLI) -> None:
    before = [parameter.clone() for parameter in cli.model.network.parameters()]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert cli.trainer.global_step == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, cli.model.network.parameters(), strict=True))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of two photographs, as two classes."""
    root = tmp_path_factory.mktemp("photographs")
    for name, picture in zip(("temple", "flower"), load_sample_images().images, strict=True):
        for split, count in (("train", 24), ("val", 4), ("test", 4)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                left, top = 10 * index, 5 * index
                Image.fromarray(picture[top : top + 240, left : left + 300]).save(folder / f"{index}.png")
    return root


@pytest.mark.parametrize("recipe", trained(CLASSIFICATION))
def test_a_recipe_trains_its_aw_network_for_two_steps(recipe: Path, photographs: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    network = content["model"]["network"]
    if not content["model"].get("pretrained"):
        network = find_change(network, "aw").network
    # What the machine of the tests cannot do: the recipe's data, its batches and sizes, a file of weights and a GPU's
    # precision.
    size = min(content["data"]["init_args"].get("image_size", 32) // 2, 64)
    cli = TrainingCLI(
        [
            f"--config={recipe}",
            "--data=ImageFolder",
            f"--data.root={photographs}",
            f"--data.image_size={size}",
            "--data.batch_size=4",
            "--data.num_workers=0",
            f"--model.network={network}",
            "--model.pretrained=false",
            "--trainer.precision=32-true",
            "--trainer.accelerator=cpu",
            "--trainer.limit_train_batches=2",
            "--trainer.max_epochs=1",
            "--trainer.limit_val_batches=1",
            *QUIET,
            f"--trainer.default_root_dir={tmp_path}",
        ],
        run=False,
        save_config=False,
    )
    take_two_steps(cli)
    assert math.isfinite(cli.trainer.callback_metrics["val/loss"])


@pytest.mark.parametrize("recipe", trained(DETECTION))
def test_a_recipe_trains_its_aw_detector_for_two_steps(recipe: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    network = content["model"]["network"]
    if timm.is_model(f"aw_{network}"):
        attention = [f"--model.network=aw_{network}"]
    else:
        attention = [f"--config={recipe.parent / 'variants' / 'aw_identity.yaml'}"]
    small = [] if content["model"].get("detector") == "ssd300" else ["--model.min_size=106", "--model.max_size=160"]
    cli = TrainingCLI(
        [
            f"--config={recipe}",
            *attention,
            "--data=Coco",
            f"--data.root={write_coco(tmp_path)}",
            "--data.val=train2017",
            "--data.batch_size=1",
            "--data.num_workers=0",
            f"--data.augmentation={content['data']['init_args']['augmentation']}",
            "--model.pretrained=false",
            *small,
            "--trainer.accelerator=cpu",
            "--trainer.devices=1",
            "--trainer.max_epochs=1",
            "--trainer.check_val_every_n_epoch=1",
            *QUIET,
            f"--trainer.default_root_dir={tmp_path}",
        ],
        run=False,
        save_config=False,
    )
    take_two_steps(cli)
    assert math.isfinite(cli.trainer.callback_metrics["train/loss"])
    assert 0 <= cli.trainer.callback_metrics["val/AP"] <= 1


@pytest.mark.parametrize("recipe", CLASSIFICATION, ids=lambda path: path.stem)
def test_every_variant_of_a_recipe_is_one_override(recipe: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    if content["model"].get("pretrained"):
        return  # its variants are those of recipes/variants/
    for given in VARIANTS:
        network = find_change(content["model"]["network"], given).network
        with torch.device("meta"):
            timm.create_model(network, num_classes=100)
