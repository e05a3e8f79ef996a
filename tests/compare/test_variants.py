"""Variants of a recipe, and the choices of an ablation."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm

from awconv.compare import ablate, compare
from awconv.compare.ablation import arms, choices
from awconv.compare.record import Record
from awconv.compare.variants import Change, find_change, read_base
from tests.compare.test_compare import tiny


@pytest.mark.parametrize(
    ("base", "given", "network"),
    [
        ("resnet20_cifar", "plain", "resnet20_cifar"),
        ("resnet20_cifar", "aw", "aw_resnet20_cifar"),
        ("resnet20_cifar", "se", "seresnet20_cifar"),
        ("resnet20_cifar", "aw_cbam", "aw_cbamresnet20_cifar"),
        ("resnet50", "se", "seresnet50"),
        ("wide_resnet28_10_cifar", "aw_aa", "aw_aa_wide_resnet28_10_cifar"),
        ("mobilenetv1_100", "aw_se", "aw_se_mobilenetv1_100"),
        ("resnet50", "ecaresnet50t", "ecaresnet50t"),
    ],
)
def test_a_variant_is_an_attention_of_the_network_or_another_network(base: str, given: str, network: str) -> None:
    assert find_change(base, given) == Change(given, network=network)


def test_a_variant_that_does_not_exist_is_named() -> None:
    message = (
        "there is no variant 'best' of resnet20_cifar; there are plain, aw, od, se, aw_se, cbam, aw_cbam, any other"
    )
    with pytest.raises(ValueError, match=message):
        find_change("resnet20_cifar", "best")
    with pytest.raises(FileNotFoundError, match=r"variant none\.yaml is not a file; expected YAML with what differs"):
        find_change("resnet20_cifar", "none.yaml")


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        (["--seed_everything=3"], "--seeds of the comparison counts them"),
        (["--seed_everything", "3"], "--seeds of the comparison counts them"),
        (["--trainer.default_root_dir=elsewhere"], "--out of the comparison names the folder"),
        (["--trainer.logger=true"], "leave it out: the report has the curves"),
    ],
)
def test_an_override_of_what_each_run_has_is_refused(override: list[str], instead: str, tmp_path: Path) -> None:
    for function in (compare, ablate):
        with pytest.raises(ValueError, match=f"{override[0].partition('=')[0]} cannot be given for .*; {instead}"):
            function(tiny(tmp_path), out=tmp_path / "out", overrides=override)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("base", ["vgg11", "test_resnet", "test_resnet.r160_in1k"])
def test_aw_of_a_network_without_an_aw_version_is_its_conversion(base: str) -> None:
    assert find_change(base, "aw") == Change("aw", network=base, arguments=("--model.convert={}",))


def test_aw_of_an_aw_network_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no variant 'aw' of aw_resnet8_cifar"):
        find_change("aw_resnet8_cifar", "aw")


def test_the_branch_of_a_network_without_an_aw_version_is_varied_by_its_conversion(tmp_path: Path) -> None:
    recipe, out = tiny(tmp_path, epochs=1), tmp_path / "out"
    overrides = ["--model.network=test_resnet", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
    assert ablate(recipe, "reduction=4,select=layer4.*", seeds=1, out=out, overrides=overrides) == 0
    runs = {run.variant: run.recipe["model"] for path in out.glob("*-seed0.json") if (run := Record.load(path))}
    assert {model["network"] for model in runs.values()} == {"test_resnet"}
    assert runs["default"]["convert"] == {}
    assert runs["reduction=4"]["convert"] == {"reduction": 4}
    assert all(name.startswith("layer4.") for name in runs["select=layer4.all"]["convert"]["select"])


def test_an_override_of_the_network_is_heeded(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {network: resnet8_cifar}")
    assert read_base(recipe, ["--trainer.max_epochs=1"]).network == "resnet8_cifar"
    assert read_base(recipe, ["--model.network=resnet20_cifar"]).network == "resnet20_cifar"


def test_ablation_compares_choices_on_the_validation_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = tiny(tmp_path, epochs=1), tmp_path / "out"
    vary = "reduction=4+norm_layer=none select=layer3.* branch_lr_factor=0.1"
    assert ablate(recipe, vary, seeds=1, out=out) == 0
    runs = {run.variant: run for path in out.glob("*-seed0.json") if (run := Record.load(path))}
    assert set(runs) == {"default", "reduction=4+norm_layer=none", "select=layer3.all", "branch_lr_factor=0.1"}
    assert {run.test_split for run in runs.values()} == {"val"}
    assert runs["reduction=4+norm_layer=none"].recipe["model"]["network_args"] == {
        "aw_args": {"reduction": 4, "norm_layer": None}
    }
    assert runs["branch_lr_factor=0.1"].recipe["model"]["branch_lr_factor"] == 0.1
    fewer = timm.create_model("aw_resnet8_cifar", in_chans=1, aw_args=dict(select="layer3.*"))
    assert runs["select=layer3.all"].parameters == sum(p.numel() for p in fewer.parameters())
    with_arguments = tmp_path / "arguments.yaml"
    with_arguments.write_text(
        recipe.read_text().replace("lr: 0.03", "lr: 0.03, network_args: {drop_rate: 0.1, aw_args: {activation: tanh}}")
    )
    assert ablate(with_arguments, "reduction=4", seeds=1, out=tmp_path / "merged") == 0
    assert Record.load(tmp_path / "merged" / "reduction=4-seed0.json").recipe["model"]["network_args"] == {
        "drop_rate": 0.1,
        "aw_args": {"activation": "tanh", "reduction": 4},
    }
    assert ablate(recipe, "reduction=4", seeds=1, out=tmp_path / "no", overrides=["--data.val_fraction=0"]) == 1
    assert "the data have no validation split; hold one out with data.val_fraction" in capsys.readouterr().err


def test_every_choice_offered_is_one() -> None:
    offered = choices("aw_resnet8_cifar")
    assert "select=layer3.*" in offered
    assert len({arm.name for arm in arms("aw_resnet8_cifar", offered)}) == len(offered) + 1
    with pytest.raises(ValueError, match=r"a change must be NAME=VALUE with a name of reduction, .*got 'reductoin=4'"):
        arms("aw_resnet8_cifar", ["reductoin=4"])
    with pytest.raises(ValueError, match="changes must differ"):
        arms("aw_resnet8_cifar", ["reduction=4", "reduction=4"])
    with pytest.raises(ValueError, match="vary must name at least one change"):
        arms("aw_resnet8_cifar", [])
    for text in ("{", "!!python/name:os.system", "[" * 10**4):
        with pytest.raises(ValueError, match=r"the value of the change 'reduction=.*' is not YAML"):
            arms("aw_resnet8_cifar", [f"reduction={text}"])


def test_variants_of_different_tasks_are_refused(tmp_path: Path) -> None:
    overlay = tmp_path / "boxes.yaml"
    overlay.write_text("model: {network: resnet18}\ndata: {class_path: awconv.data.Coco, init_args: {root: nowhere}}\n")
    with pytest.raises(
        ValueError, match=r"variants must have the same task, .*plain \(accuracy\) and boxes \(box AP\)"
    ):
        compare(tiny(tmp_path), f"plain,{overlay}", seeds=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
