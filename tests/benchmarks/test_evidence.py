"""benchmarks/evidence.py: its experiments can be run, and lose nothing that is finished."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from awconv.compare.ablation import find_variant
from awconv.compare.tuning import Tuning
from awconv.compare.variants import read_base
from awconv.data import ImageDataModule

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def evidence() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "benchmarks" / "evidence.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["evidence"] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name", ["cifar10_jpeg_resnet20", "tiny_imagenet100_resnet18", "cifar10_jpeg_resnet56", "cifar10_jpeg_resnet8"]
)
def test_every_variant_of_an_experiment_can_be_trained_and_tuned(
    evidence: ModuleType, name: str, tmp_path: Path
) -> None:
    experiment = evidence.EXPERIMENTS[name]
    assert not experiment.is_there(tmp_path)
    for path in experiment.files.values():
        file = tmp_path / path.replace("*", "x")
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert experiment.is_there(tmp_path)
    arguments = argparse.Namespace(data=tmp_path, out=tmp_path, jobs=3, quick=False)
    command = experiment.command(name, arguments, 90.4)
    assert command[command.index("--time_limit") + 1] == "90s"
    overrides = command[command.index("--") + 1 :]
    base = read_base(Path(command[4]), overrides)
    tuning = Tuning.parse(experiment.tune, 5)
    changes = [find_variant(base, variant) for variant in experiment.variants.split(",")]
    assert changes[0].name == "plain"
    assert tuning is not None
    tuning.check(changes, Path(command[4]), overrides)
    for change in changes:
        settings = change.apply(Path(command[4]), overrides).recipe.settings
        assert issubclass(settings.data, ImageDataModule)
        assert settings.content["data"]["init_args"]["val_fraction"] == 0.1


def test_records_are_packed_when_there_are_new_ones_and_brought_back(evidence: ModuleType, tmp_path: Path) -> None:
    out, archive, later = tmp_path / "out", tmp_path / "records.tgz", tmp_path / "later"
    (out / "one" / "tune").mkdir(parents=True)
    packed = evidence._pack(out, archive, set())
    assert not archive.exists()
    for path in ("one/aw-seed0.json", "one/tune/aw-lr=0.1-seed0.json"):
        (out / path).write_text(path)
        packed = evidence._pack(out, archive, packed)
    (out / "one" / "results.json").write_text("the report's")
    time = archive.stat().st_mtime_ns
    assert evidence._pack(out, archive, packed) == packed
    assert archive.stat().st_mtime_ns == time
    with tarfile.open(archive) as file:
        file.extractall(later, filter="data")
    (out / "one" / "aw-seed0.json").write_text("newer")
    evidence._bring(later / "one", out / "one")
    evidence._bring(later / "one", tmp_path / "third")
    assert (out / "one" / "aw-seed0.json").read_text() == "newer"  # what is there stays
    assert sorted(path.name for path in (tmp_path / "third").rglob("*.json")) == [
        "aw-lr=0.1-seed0.json",
        "aw-seed0.json",
    ]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([], ["cifar10_jpeg_resnet20", "tiny_imagenet100_resnet18", "cifar10_jpeg_resnet56"]),
        (["cifar10_jpeg_resnet8"], ["cifar10_jpeg_resnet8"]),
    ],
    ids=["all", "by-name"],
)
def test_the_schedule_for_a_cpu_is_run_by_name_only(
    evidence: ModuleType,
    given: list[str],
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A GPU's seconds are for the others. Without data, the command only says what it would run."""
    monkeypatch.setattr(sys, "argv", ["evidence.py", *given, "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert evidence.main() == 0
    assert capsys.readouterr().out.splitlines() == [f"{name}: its data are not in {tmp_path}" for name in named]
