"""Trainings of parts of a network, on the digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from awconv.cli import main
from awconv.compare import compare
from awconv.sources import load_task
from awconv.tasks import ClassificationTask, DetectionTask
from awconv.training import TrainingCLI
from awconv.training.checkpoints import find_last
from tests.networks import moved
from tests.tasks.test_classification import fit, pretrained_network

NETWORK = "resnet8_cifar"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file(pretrained_network().state_dict(), path)
    return path


@pytest.mark.parametrize("ema", [(), ("--model.ema_decay=0.5",)])
def test_what_is_frozen_keeps_the_pretrained_weights_over_epochs_and_evaluations(
    weights: Path, ema: tuple[str, ...]
) -> None:
    cli = fit(
        weights.parent / "run",
        f"--model.pretrained={weights}",
        "--model.convert={init: identity}",
        "--model.train_only=[branch, head]",
        "--trainer.max_steps=24",
        "--trainer.limit_val_batches=1",
        "--trainer.val_check_interval=4",
        *ema,
    )
    given = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith("fc.")}
    for network in (cli.model.network, cli.model.evaluated):
        state = network.state_dict()
        assert {name for name in given if not torch.equal(state[name], given[name])} == set()
        assert state["layer1.0.conv1.attention.norm2.weight"].any()
        assert state["fc.weight"].any()
    if ema:
        assert not any(parameter.requires_grad for parameter in cli.model.evaluated.parameters())
    assert not cli.model.network.train().bn1.training
    (optimizer,) = cli.trainer.optimizers
    there = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert there == {p for n, p in cli.model.network.named_parameters() if ".attention." in n or n.startswith("fc.")}


def test_fit_says_once_what_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--model.network=aw_resnet8_cifar",
        "--model.train_only=[head, norm]",
        "--trainer.max_steps=1",
        "--trainer.limit_val_batches=1",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    assert main(["fit", *arguments]) == 0
    told = capsys.readouterr().err
    assert told.count("awconv fit: trains 1,130 of 83,178 parameters (1.36 %): head 650 (0.78 %), norm 480") == 1
    assert "in eval mode" not in told
    assert main(["fit", *arguments, "--model.train_only=[heads]"]) == 1
    assert "no module and no parameter is called 'heads'; near it: " in capsys.readouterr().err
    last = find_last(tmp_path)
    assert last is not None
    assert main(["fit", *arguments, "--model.train_only=[head]", f"--ckpt_path={last}"]) == 1
    assert 'model.train_only is ["head", "norm"] there, ["head"] now' in capsys.readouterr().err
    task = load_task(last)
    assert {name for name, p in task.network.named_parameters() if p.requires_grad} == {
        name for name, _ in task.network.named_parameters() if ".attention." not in name and "conv" not in name
    } - {name for name, _ in task.network.named_parameters() if "downsample.0" in name}


def test_a_resumed_training_ends_as_an_uninterrupted_one(weights: Path, tmp_path: Path) -> None:
    def trained(root: str, *arguments: str) -> dict[str, Tensor]:
        common = [f"--model.network={NETWORK}", f"--model.pretrained={weights}", "--model.convert={init: identity}"]
        common += ["--model.train_only=[branch, head]", "--model.decay_epochs=[9]"]
        quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
        TrainingCLI(["fit", *common, *quiet, f"--trainer.default_root_dir={tmp_path / root}", *arguments])
        last = find_last(tmp_path / root)
        assert last is not None
        state: dict[str, Tensor] = load_task(last).network.state_dict()
        return state

    straight = trained("straight", "--trainer.max_epochs=2")
    first = trained("resumed", "--trainer.max_epochs=1")
    weights.unlink()  # the checkpoint has all weights
    resumed = trained("resumed", "--trainer.max_epochs=2", "--ckpt_path=last")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())
    moved = {name for name in first if not torch.equal(first[name], resumed[name])}
    trained_parts = {name for name in first if ".attention." in name or name.startswith("fc.")}
    assert moved == {name for name in trained_parts if not name.endswith(".relative_to")}


def test_synchronised_norms_are_held_too() -> None:
    arguments = dict(classes=["a", "b"], input_size=[1, 8, 8], mean=[0.5], std=[0.5], network=NETWORK)
    task = nn.SyncBatchNorm.convert_sync_batchnorm(ClassificationTask(**arguments, train_only=["head", "layer3.*"]))
    task.on_fit_start()  # as the trainer calls it after that
    task.train()
    norms = {name: module.training for name, module in task.network.named_modules() if "SyncBatch" in str(type(module))}
    assert norms == {name: name.startswith("layer3") for name in norms}
    assert set(norms.values()) == {True, False}


def test_a_comparison_trains_parts_of_its_variants(tmp_path: Path) -> None:
    recipe, parts = tmp_path / "tiny.yaml", tmp_path / "parts.yaml"
    recipe.write_text(f"model: {{network: {NETWORK}}}\ntrainer: {{max_epochs: 1, limit_train_batches: 2}}\n")
    parts.write_text("model: {train_only: [head, norm]}\n")
    assert compare(recipe, f"plain,{parts}", seeds=1, out=tmp_path / "out") == 0
    records = {name: json.loads((tmp_path / "out" / f"{name}-seed0.json").read_text()) for name in ("plain", "parts")}
    assert records["parts"]["recipe"]["model"]["train_only"] == ["head", "norm"]
    expected = {"plain": 75002, "parts": 650 + 480}
    assert {name: record["parameters"] for name, record in records.items()} == expected


def test_a_classifier_of_zeros_that_stays_is_refused(weights: Path) -> None:
    with pytest.raises(ValueError, match=r"train_only must have 'head', got \['norm'\]: .* of 7 classes .* data of 10"):
        fit(weights.parent, f"--model.pretrained={weights}", "--model.train_only=[norm]")


def test_the_norm_of_a_classifier_that_starts_at_zeros_stays(tmp_path: Path) -> None:
    save_file(timm.create_model("repvit_m0_9", num_classes=5).state_dict(), tmp_path / "weights.safetensors")
    task = task_of("repvit_m0_9", tmp_path / "weights.safetensors")
    logits = task.network(torch.randn(4, 3, 32, 32))
    assert not logits.any()
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    for layer in (task.network.head.head.l, task.network.head.head_dist.l):
        assert layer.weight.grad.any()


def test_a_moving_average_takes_the_form_of_the_weights(tmp_path: Path) -> None:
    trained = moved(timm.create_model("aw_resnet8_cifar", aw_args=dict(init="fresh"))).eval()
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    arguments = dict(network_args=dict(aw_args=dict(init="identity")), ema_decay=0.9)
    task = task_of("aw_resnet8_cifar", tmp_path / "weights.safetensors", **arguments)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(task.evaluated(images), trained(images))


def task_of(network: str, weights: Path, **arguments: Any) -> Any:
    """A task of ten classes with the weights."""
    data = dict(classes=list("abcdefghij"), input_size=[3, 32, 32], mean=[0.5] * 3, std=[0.5] * 3)
    task = ClassificationTask(**data, network=network, pretrained=str(weights), **arguments)
    task.load_pretrained(whole=False)
    return task


def test_a_list_of_parts_is_expected() -> None:
    arguments = dict(classes=["a"], input_size=[1, 8, 8], mean=[0.5], std=[0.5], network=NETWORK)
    with pytest.raises(ValueError, match=r"train_only must be a list of parts, such as \[branch, head\], got 'head'"):
        ClassificationTask(**arguments, train_only="head")
    with pytest.raises(ValueError, match=r"name what trains"):
        ClassificationTask(**arguments, train_only=[])


def test_a_detector_trains_parts_too() -> None:
    pytest.importorskip("faster_coco_eval")
    arguments = dict(classes=["cat"], category_ids=[1], network=NETWORK, min_size=64, max_size=96)
    task = DetectionTask(**arguments, train_only=["rpn", "backbone.fpn", "roi_heads.*"])
    trained = {name for name, parameter in task.network.named_parameters() if parameter.requires_grad}
    assert trained == {n for n, _ in task.network.named_parameters() if n.startswith(("rpn", "backbone.fpn", "roi"))}
    with pytest.raises(ValueError, match=r"has no classifier under .* \(.*'backbone', 'rpn', 'roi_heads'"):
        DetectionTask(**arguments, train_only=["head"])
    with pytest.raises(ValueError, match=r"trainable_layers must be left out with train_only"):
        DetectionTask(**arguments, train_only=["rpn"], trainable_layers=2)
