"""Which settings decide what, and how often they are parsed."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from awconv.compare import compare
from awconv.data import Digits
from awconv.roles import Role
from awconv.tasks import ClassificationTask, DetectionTask, Task
from awconv.training import TrainingCLI
from awconv.training.find_task import find_task
from awconv.training.recipe import Recipe
from awconv.training.settings import Settings, parameters


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("seed_everything", Role.STEPS),
        ("model.lr", Role.STEPS),
        ("model.network", Role.NETWORK),
        ("model.network_args.aw_args.reduction", Role.NETWORK),
        ("model.classes", Role.DATA),
        ("data.class_path", Role.STEPS),
        ("data.init_args.batch_size", Role.STEPS),
        ("data.init_args.num_workers", Role.NOTHING),
        ("trainer.max_epochs", Role.RESULT),
        ("trainer.precision", Role.STEPS),
        ("trainer.logger", Role.NOTHING),
        ("recent_checkpoint.every_n_steps", Role.NOTHING),
    ],
)
def test_a_setting_has_the_role_that_its_class_declares(name: str, role: Role) -> None:
    assert Settings(ClassificationTask, Digits, {}).role(name) is role


@pytest.mark.parametrize("task", [ClassificationTask, DetectionTask])
def test_declared_roles_are_of_arguments_that_exist(task: type[Task]) -> None:
    """A renamed argument would silently lose its role."""
    for owner in (task, task.data_module, *task.data_module.__subclasses__()):
        shared = {"max_pixels", "num_workers"}  # declared for all data, also for those in memory
        assert set(owner.roles) - shared <= set(parameters(owner)), owner


@pytest.mark.parametrize(
    ("arguments", "task"),
    [
        ([], ClassificationTask),
        (["--data=Coco", "--data.root=x"], DetectionTask),
        (["--data", "awconv.data.Voc"], DetectionTask),
        (["--data=Coco", "--data=Digits"], ClassificationTask),
        (["--data.class_path=Coco"], DetectionTask),
        (['--data={"class_path": "Coco"}'], DetectionTask),
        (['--config={"data": "Coco"}', "--model.lr=1"], DetectionTask),
        (["-c", '{"data": {"class_path": "awconv.data.Coco"}}'], DetectionTask),
        (['--config={"data": "Coco"}', '--config={"model": {"lr": 1}}'], DetectionTask),
        (["--data=Nothing"], ClassificationTask),
        (["--config"], ClassificationTask),
    ],
)
def test_the_data_that_are_named_last_choose_the_task(arguments: list[str], task: type[Task]) -> None:
    assert find_task(["fit", *arguments]) is task


def test_a_recipe_is_a_value(tmp_path: Path) -> None:
    recipe = Recipe.parse(["--model.network=aw_resnet8_cifar", "--model.lr=0.25"])
    run = recipe.for_run(3, tmp_path)
    assert (recipe.settings.content["seed_everything"], run.settings.content["seed_everything"]) == (0, 3)
    assert "default_root_dir" not in recipe.settings.content["trainer"]
    assert recipe.differences(run.settings.content) == ["seed_everything is 3 there, 0 now"]
    built = pickle.loads(pickle.dumps(run)).build()  # as a process of a comparison gets it
    assert (built.model.network_name, built.model.optimization.lr) == ("aw_resnet8_cifar", 0.25)
    assert built.trainer.default_root_dir == str(tmp_path)
    assert run.build().model is not built.model


def test_a_comparison_parses_the_recipe_and_each_variant_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none of the runs."""
    counts: Counter[str] = Counter()
    parse, build = TrainingCLI.parse_arguments, TrainingCLI.instantiate_classes

    def counted_parse(self: TrainingCLI, *args: Any) -> None:
        counts["parsed"] += 1
        parse(self, *args)

    def counted_build(self: TrainingCLI) -> None:
        counts["built"] += 1
        build(self)

    monkeypatch.setattr(TrainingCLI, "parse_arguments", counted_parse)
    monkeypatch.setattr(TrainingCLI, "instantiate_classes", counted_build)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {network: resnet8_cifar}\ntrainer: {max_epochs: 1, limit_train_batches: 1, accelerator: cpu}\n"
    )
    assert compare(recipe, "plain,aw", seeds=2, out=tmp_path / "out") == 0
    assert counts == {"parsed": 1 + 2, "built": 2 * 2}
