"""benchmarks/gpu.py in small on a CPU: every stage writes its figures, and a failing or late one stops no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.data.samples import write_parquet

ROOT = Path(__file__).parent.parent.parent


def data(folder: Path) -> Path:
    for name, indices in {"train": range(400), "test": range(400, 420)}.items():
        write_parquet(folder / f"{name}.parquet", indices)
    return folder


def test_every_stage_writes_its_figures_and_the_summary_names_them(tmp_path: Path) -> None:
    only = "^(layer, 16 at 6, batch|pooling|eager|profile|1 run|bare loop, aw)"  # pytest is below
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device=cpu", "--quick"),
            *(f"--out={tmp_path / 'out'}", f"--data={data(tmp_path)}", f"--only={only}"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"command", "device", "torch", "timm", "awconv"} <= set(results["about"])
    stages = results["stages"]
    assert not [name for entries in stages.values() for name, entry in entries.items() if "error" in entry]
    layer = stages["layers"]["layer, 16 at 6, batch 2"]
    for work in ("forward", "input_gradient", "weight_gradients"):
        eager = layer["works"][work]["eager"]
        assert set(eager) == {"plain", "fused", "per_tap", "per_sample"}
        assert eager["plain"]["median"] == 1
        assert layer["works"][work]["fastest"] in eager
    assert {"forward", "backward", "bytes"} == set(stages["layers"]["pooling"]["16 at 6, batch 2"])
    network = stages["networks"]["eager"]["works"]
    assert {work: set(found) - {"first_calls_seconds"} for work, found in network.items()} == {
        work: {"plain", "aw"} for work in ("forward", "memory", "training")
    }
    profile = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert all(profile[way]["kernels"][0]["milliseconds"] > 0 for way in ("plain", "aw"))
    assert stages["networks"]["profile"]["profile"]["aw"]["host_seconds"] > 0
    assert stages["training"]["1 run"]["together"] > 0
    assert stages["training"]["bare loop, aw_resnet8_cifar"]["ratio"]["median"] > 0
    entries = [name for stage in stages.values() for name in stage]
    assert len(entries) == 6
    assert all(f"\n  {name}: " in done.stdout.partition("torch")[2] for name in entries)


@pytest.fixture
def gpu_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def settings(out: Path, **others: Any) -> Any:
    """Of a quick run on a CPU."""
    from gpu_stages.journal import Settings

    out.mkdir(exist_ok=True)
    common: dict[str, Any] = dict(device="cpu", quick=True, rounds=1, algorithm="auto", only="", out=out)
    return Settings(**common | dict(data=out / "missing", stages=(), deadline=time.time() + 100) | others)


def test_what_fails_or_has_no_time_says_why_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpu_stages: None
) -> None:
    import gpu

    only = "^(1 run|compiled training|small, eager)"
    asked = settings(tmp_path, stages=("training", "networks"), only=only, deadline=time.time() + 15)
    monkeypatch.setattr(gpu, "_watch", lambda *_: gpu._work(asked))  # in this process
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu.gc, "freeze", lambda: None)
    assert gpu._drive(asked) == 1
    printed, results = capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())
    failed = results["stages"]["training"]["1 run"]["error"]
    assert failed.startswith("Traceback")
    assert "--data must be a folder with CIFAR-10's train.parquet, got " in failed
    assert "1 run: FAILED (FileNotFoundError: --data must be" in printed
    networks = results["stages"]["networks"]
    assert "it takes some 22 s, and" in networks["compiled training"]["skipped"]
    assert "no time for: compiled training" in printed
    assert networks["small, eager"]["works"]["training"]["aw"]["seconds"] > 0


def test_a_process_that_crashes_or_hangs_costs_one_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu_stages: None
) -> None:
    import gpu
    from gpu_stages.journal import Journal
    from gpu_stages.summary import lines

    path = tmp_path / "results.json"
    journal = Journal(path)
    journal.results["stages"]["layers"] = {"one": {"began": 0, "seconds": 1}, "other": {"began": 100, "limit": 101}}
    journal.save()
    reason = gpu._watch([sys.executable, "-c", "import time; time.sleep(60)"], path, deadline=4e9)
    assert reason == "it took more than 1 s"
    journal.abandon(reason)
    assert Journal(path).results["stages"]["layers"]["other"]["error"] == reason
    assert Journal(path).running() is None
    journal.results["stages"] |= {stage: {"one": journal.results["stages"]["layers"]["other"]} for stage in gpu.STAGES}
    assert list(lines(journal.results))[2::2] == ["  one: FAILED (it took more than 1 s) "] * len(gpu.STAGES)
    crash = gpu._watch([sys.executable, "-c", "import os; os.abort()"], path, deadline=4e9)
    assert crash == "its process ended with exit status -6"
    assert (
        gpu._watch([sys.executable, "-c", "import time; time.sleep(60)"], path, 0)
        == "the time of the whole run is over"
    )
    assert gpu._watch([sys.executable, "-c", ""], path, deadline=4e9) is None


def test_the_log_of_tests_is_read_however_they_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu_stages: None
) -> None:
    from gpu_stages import suite

    monkeypatch.setattr(suite, "_ROOT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "tests" / "ops").mkdir(parents=True)
    (tmp_path / "tests" / "ops" / "test_gpu.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'as it is'\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n"
        "@pytest.fixture\ndef broken(): raise OSError('no fixture')\n"
        "def test_without_a_fixture(broken): pass\n"
    )
    (entry,) = suite.entries(settings(tmp_path / "out"))
    found: dict[str, Any] = {}
    entry.work(found, lambda: None)
    assert found["status"] == 1
    assert found["outcomes"] == {"PASSED": 1, "FAILED": 1, "SKIPPED": 1, "ERROR": 1}
    assert [line.split(" - ")[0].rpartition("::")[2] for line in found["failed"]] == [
        "test_wrong",
        "test_without_a_fixture",
    ]
    assert found["failures"]["test_wrong"].endswith("AssertionError: as it is\nE   assert 1 == 2")
    assert "OSError: no fixture" in found["failures"]["ERROR at setup of test_without_a_fixture"]
    log = (tmp_path / "out" / "tests.log").read_text()
    assert suite.read_log(log[:200])["failed"] == []


def test_a_file_of_tests_that_cannot_be_imported_stops_no_other(tmp_path: Path, gpu_stages: None) -> None:
    from gpu_stages.suite import OPTIONS, read_log

    (tmp_path / "test_broken.py").write_text("import a_module_that_is_not_there")
    (tmp_path / "test_other.py").write_text("def test_right(): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", *OPTIONS, "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    found = read_log(done.stdout)
    assert [Path(name).name for name in found["not_collected"]] == ["test_broken.py"]
    assert found["outcomes"] == {"PASSED": 1}
