"""Networks of one's own, registered by a file or a module that ``--import`` names."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch

import awconv
from awconv import own_code
from awconv.cli import main
from awconv.compare.record import Record
from awconv.own_code import as_names, import_own, taken_out
from awconv.training import TrainingCLI
from tests.data.samples import digit
from tests.test_load import QUIET

NETWORK = """
import timm
from torch import nn

@timm.models.register_model
def {name}(pretrained=False, num_classes=10, in_chans=1, width=6, **kwargs):
    return nn.Sequential(
        nn.Conv2d(in_chans, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, num_classes),
    )
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with networks, in which commands run."""
    modules, path = set(sys.modules), list(sys.path)
    (tmp_path / "own_net.py").write_text(NETWORK.format(name="own_net"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own_code, "_imported", {})
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    sys.path[:] = path


class TestImports:
    def test_of_a_file_run_once_and_tell_its_digest(self, here: Path) -> None:
        with open("own_net.py", "a") as file:
            file.write("\nimport sys\nsys.counted_runs = getattr(sys, 'counted_runs', 0) + 1\n")
        expected = hashlib.sha256((here / "own_net.py").read_bytes()).hexdigest()
        spellings = ["own_net.py", "./own_net.py", str(here / "own_net.py"), "own_net"]
        assert import_own(spellings) == dict.fromkeys(spellings, expected)
        assert sys.counted_runs == 1  # type: ignore[attr-defined]
        del sys.counted_runs  # type: ignore[attr-defined]
        assert timm.is_model("own_net")

    def test_of_packages_and_their_modules(self, here: Path) -> None:
        (here / "own_package" / "deep").mkdir(parents=True)
        (here / "own_package" / "__init__.py").write_text("")
        (here / "own_package" / "deep" / "nets.py").write_text(
            "from ..sizes import WIDTH" + NETWORK.format(name="own_deep").replace("width=6", "width=WIDTH")
        )
        (here / "own_package" / "sizes.py").write_text("WIDTH = 3\n")
        import_own(["own_package.deep.nets"])
        assert timm.create_model("own_deep")[0].out_channels == 3

    def test_find_the_modules_beside_a_file_now_and_when_a_network_is_built(self, here: Path) -> None:
        (here / "elsewhere").mkdir()
        (here / "elsewhere" / "beside_now.py").write_text("")
        (here / "elsewhere" / "beside_later.py").write_text("")
        network = NETWORK.format(name="own_beside").replace("    return", "    import beside_later\n    return")
        (here / "elsewhere" / "own_beside.py").write_text("import beside_now\n" + network)
        import_own(["elsewhere/own_beside.py"])
        assert timm.create_model("own_beside")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)

    @pytest.mark.parametrize("name", ["json", "wave", "timm", "torch"])  # wave is not imported yet
    def test_leave_a_module_of_the_same_name_alone(self, name: str, here: Path) -> None:
        (here / f"{name}.py").write_text(NETWORK.format(name=f"own_{name}"))
        loaded = sys.modules.get(name)
        import_own([f"{name}.py"])
        assert timm.is_model(f"own_{name}")
        assert sys.modules.get(name) is loaded
        sys.path.remove("") if "" in sys.path else None
        found = importlib.util.find_spec(name)
        assert found is not None
        assert Path(str(found.origin)).parent != here

    def test_of_two_files_of_one_name_are_both_made(self, here: Path) -> None:
        for folder in ("one", "two"):
            (here / folder).mkdir()
            (here / folder / "own_twice.py").write_text(NETWORK.format(name=f"own_{folder}"))
        digests = import_own(["one/own_twice.py", "two/own_twice.py"])
        assert len(set(digests.values())) == 2
        assert timm.is_model("own_one")
        assert timm.is_model("own_two")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("1 / 0", "broken.py failed: ZeroDivisionError: division by zero"),
            ("def (:", "broken.py failed: SyntaxError"),
            ("import none_such", "broken.py failed: ModuleNotFoundError: No module named 'none_such'"),
            ("from . import own_net", "broken.py failed: ImportError: attempted relative import"),
            ("import sys\nsys.exit(0)", "broken.py would end awconv by sys.exit; put what it runs as a program under"),
            ("import sys\nsys.path.clear()\n1 / 0", "broken.py failed: ZeroDivisionError"),
        ],
    )
    def test_that_fail_are_said_in_a_line(
        self, content: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (here / "broken.py").write_text(content)
        path = list(sys.path)
        for name in ("broken.py", "broken"):
            assert main(["models", f"--import={name}"]) == 1
            error = capsys.readouterr().err
            assert message.replace("broken.py", name) in error
            assert len(error.strip().splitlines()) == 1
            assert "broken" not in sys.modules
            sys.path[:] = path

    @pytest.mark.parametrize(
        ("name", "message"),
        [("none.py", "import none.py is not a file"), ("none", "import none: there is no such module in")],
    )
    def test_of_nothing_are_refused(self, name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["models", f"--import={name}"]) == 1
        assert message in capsys.readouterr().err

    def test_do_not_keep_a_signal(self, here: Path) -> None:
        (here / "stopped.py").write_text("raise KeyboardInterrupt")
        assert main(["models", "--import=stopped.py"]) == 130


def test_the_option_is_taken_out_wherever_it_stands() -> None:
    given = ["a", "--import", "x.py", "--b=1", "--import=y.py, z", "--", "--import=kept.py"]
    assert taken_out(given) == (["x.py", "y.py", "z"], ["a", "--b=1", "--", "--import=kept.py"])
    assert as_names(None) == []
    assert as_names(["a.py", " "]) == ["a.py"]


def fit(*arguments: str) -> int:
    return main(["fit", *arguments, "--trainer.limit_train_batches=2", "--model.lr=0.1", *QUIET])


def test_a_network_goes_through_every_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--import=own_net.py", "--model.network=own_net", "--trainer.max_epochs=1") == 0
    (checkpoint,) = (here / "checkpoints").glob("*.ckpt")
    assert fit("--config=awconv_fit.yaml", "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}") == 0
    checkpoint = max((here / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert main(["test", "--config=awconv_fit.yaml", f"--ckpt_path={checkpoint}"]) == 0
    digit(3).save("three.png")
    predicting = ["--import=own_net.py", "--format=json", "three.png"]
    assert main(["publish", "--import=own_net.py", str(checkpoint), "--tag=t", "--data=digits", "--out=."]) == 0
    found = []
    capsys.readouterr()
    for source in (checkpoint, "own_net.t"):
        assert main(["predict", f"--ckpt={source}", *predicting]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    loaded = awconv.load(here / "own_net.t")
    assert loaded.network(loaded.transform(digit(3))[None]).shape == (1, 10)
    card = Path("own_net.t/README.md").read_text()
    command = shlex.split(re.search(r"^    awconv (.*)$", card, re.MULTILINE)[1])  # type: ignore[index]
    figure = re.search(r"\| validation accuracy \| ([\d.]+) %", card)
    assert "--import=own_net.py" in command
    assert figure is not None
    cli = TrainingCLI([*command, *QUIET], save_config=False)
    assert f"{100 * cli.trainer.callback_metrics['val/accuracy'].item():.2f}" == figure[1]


def test_a_checkpoint_without_the_import_says_what_is_missing(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "own_gone.py").write_text(NETWORK.format(name="own_gone"))
    assert fit("--import=own_gone.py", "--model.network=own_gone", "--trainer.max_epochs=1") == 0
    (checkpoint,) = (here / "checkpoints").glob("*.ckpt")
    monkeypatch.delitem(timm.models._registry._model_entrypoints, "own_gone")
    digit(3).save("three.png")
    assert main(["predict", f"--ckpt={checkpoint}", "three.png"]) == 1
    error = capsys.readouterr().err
    assert "got 'own_gone'" in error
    assert "; --import=FILE.py registers networks of your own" in error


@pytest.mark.parametrize("where", [pytest.param("recipe", marks=pytest.mark.campaign), "argument"])
def test_a_comparison_records_the_file_and_tells_that_it_has_changed(
    where: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = "import: own_net.py\n" if where == "recipe" else ""
    trainer = "trainer: {max_epochs: 1, limit_train_batches: 2, accelerator: cpu}\n"
    Path("tiny.yaml").write_text(f"{named}model: {{network: own_net}}\n{trainer}")
    option = [] if where == "recipe" else ["--import=own_net.py"]
    arguments = ["compare", "tiny.yaml", "--variants=plain,aw", "--seeds=1", "--out=out", *option]
    jobs = "--jobs=2" if where == "recipe" else "--jobs=1"
    assert main([*arguments, jobs]) == 0
    digest = hashlib.sha256(Path("own_net.py").read_bytes()).hexdigest()
    records = [Record.load(Path("out") / f"{variant}-seed0.json") for variant in ("plain", "aw")]
    assert [record.versions["own_net.py"] for record in records] == [digest, digest]
    assert records[1].parameters > records[0].parameters
    capsys.readouterr()
    assert main(arguments) == 0
    assert "has changed" not in capsys.readouterr().err
    with open("own_net.py", "a") as file:
        file.write("# changed\n")
    own_code._imported.clear()
    assert main(arguments) == 0
    error = " ".join(capsys.readouterr().err.split())
    assert "own_net.py has changed since this run was trained; remove the file to train anew" in error
