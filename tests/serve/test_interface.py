"""``POST /predict`` and ``GET /health``: the answers of ``awconv predict``, limits, and errors in words."""

from __future__ import annotations

import doctest
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="serving needs fastapi: pip install '.[serve]'")

from awconv.export.exported import ExportedClassifier
from awconv.export.metadata import Metadata
from awconv.predict import open_network, predict
from awconv.serve import app
from awconv.serve.service import Limits
from awconv.tasks import ClassificationTask, DetectionTask
from awconv.version import __version__
from tests.serve.files import FILES
from tests.serve.servers import NAME, Running, ask, digits, form, running

MAX_PIXELS = 5_000_000  # of which the bomb has more


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(max_pixels=MAX_PIXELS) as server:
        yield server


class TestAnswers:
    def test_are_those_of_predict_for_any_file_and_so_are_its_errors(
        self, server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name, content in FILES.items():
            (tmp_path / name).write_bytes(content)
        predict([tmp_path], NAME, format="json", top_k=3, batch_size=1, max_pixels=MAX_PIXELS)
        expected = json.loads(capsys.readouterr().out)
        good = {Path(one["image"]).name: one for one in expected["predictions"]}
        bad = {Path(one["image"]).name: one["error"] for one in expected["failures"]}
        assert (len(good), len(bad)) == (7, 5)
        for name, content in FILES.items():
            body, kind = form(content, name=name)
            got = ask(server.port, body, "/predict?top_k=3", kind)
            if name in good:
                assert got.status == 200, got
                # A single image is computed as predict's batch of one: to the last bit.
                assert got.json == good[name] | {"image": name}
            elif content:
                assert got.status == (413 if name == "bomb.png" else 400)
                assert got.error == bad[name].replace(str(tmp_path / name), name)

    def test_take_the_image_itself_as_the_body(self, server: Running) -> None:
        content = FILES["a digit.png"]
        for kind in ("image/png", "image/jpeg", "application/octet-stream", None):
            got = ask(server.port, content, kind=kind)
            assert got.status == 200
            assert got.json["label"] == "3"
            assert set(got.json) == {"image", "label", "probability"}
        in_chunks = ask(server.port, (content[start : start + 50] for start in range(0, len(content), 50)))
        assert in_chunks.json == got.json

    def test_of_a_batch_are_those_of_single_images_to_rounding(self) -> None:
        sizes: list[int] = []
        network: Any = open_network(NAME, False)
        network.evaluated.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
        images = digits(24)
        with running(network, max_wait_ms=2000, batch_size=8) as server:
            alone = [ask(server.port, image, "/predict?top_k=10").json for image in images]
            assert set(sizes) == {1}
            sizes.clear()
            with ThreadPoolExecutor(len(images)) as pool:
                together = list(pool.map(lambda image: ask(server.port, image, "/predict?top_k=10").json, images))
        assert sum(sizes) == 24
        assert 1 < max(sizes) <= 8
        for one, many in zip(alone, together, strict=True):
            assert many["label"] == one["label"]
            # float32: the sums of a batch may be taken in another order
            assert by_label(many) == pytest.approx(by_label(one), rel=1e-4, abs=1e-6)

    def test_of_an_exported_file_are_those_of_its_network(self, server: Running) -> None:
        with running(ExportedClassifier(InMemory())) as exported:
            got = ask(exported.port, FILES["a digit.png"], "/predict?top_k=10").json
            assert ask(exported.port, path="/health").json["network"] == "exported"
        wanted = ask(server.port, FILES["a digit.png"], "/predict?top_k=10").json
        # float32: the file's batches have 4 images, so sums may be taken in another order
        assert by_label(got) == pytest.approx(by_label(wanted), rel=1e-4, abs=1e-6)


class InMemory:
    """An exported file and its runtime: the network itself, for batches of four."""

    nodes = 1

    def __init__(self) -> None:
        self._task: Any = open_network(NAME, False)
        mean, std = self._task.channel_means, self._task.channel_deviations
        self.metadata = Metadata(
            awconv=__version__,
            kind="classifier",
            network="exported",
            classes=tuple(self._task.classes),
            input_size=(1, 8, 8),
            dynamic_size=False,
            batch=4,
            uint8=False,
            precision="fp32",
            mean=tuple(mean),
            std=tuple(std),
            crop_pct=self._task.crop_pct,
            interpolation=self._task.interpolation,
        )

    def __call__(self, images: Any) -> list[Any]:
        assert images.shape == (4, 1, 8, 8)
        return [self._task.evaluated(torch.from_numpy(images)).numpy()]


def by_label(answer: dict[str, Any]) -> dict[str, float]:
    return {one["label"]: one["probability"] for one in (answer, *answer.get("others", []))}


@pytest.fixture(scope="module")
def detector() -> DetectionTask:
    torch.manual_seed(0)
    return DetectionTask(["temple", "tree"], [1, 2], network="resnet8_cifar", min_size=64, max_size=96).eval()


@pytest.fixture(scope="module")
def finding(detector: DetectionTask) -> Iterator[Running]:
    with running(detector, threshold=0.1) as server:
        yield server


class TestDetectors:
    def test_give_the_boxes_of_predict(
        self,
        finding: Running,
        detector: DetectionTask,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr("awconv.predict.load_task", lambda *_: detector)
        (tmp_path / "turned.jpg").write_bytes(FILES["turned.jpg"])
        predict([tmp_path], "invented.ckpt", format="json", threshold=0.1)
        (expected,) = json.loads(capsys.readouterr().out)["predictions"]
        got = ask(finding.port, *form(FILES["turned.jpg"], name="turned.jpg")[:1], kind=form(b"")[1]).json
        assert got == expected | {"image": "turned.jpg"}
        scores = [one["score"] for one in got["detections"]]
        assert scores
        least = sorted(scores)[len(scores) // 2]
        fewer = ask(finding.port, FILES["turned.jpg"], f"/predict?threshold={least}").json["detections"]
        assert fewer == [one for one in got["detections"] if one["score"] >= least]

    def test_refuse_lower_scores_than_they_were_started_for_and_options_of_classifiers(self, finding: Running) -> None:
        for option, words in {
            "threshold=0.05": "threshold must be from 0.1 to 1, got 0.05",
            "threshold=2": "threshold must be less than or equal to 1, got '2'",
            "top_k=2": "top_k is a classifier's",
        }.items():
            got = ask(finding.port, FILES["photograph.jpg"], f"/predict?{option}")
            assert got.status == 422
            assert words in got.error

    def test_say_what_they_are(self, finding: Running) -> None:
        health = ask(finding.port, path="/health").json
        assert health == dict(ready=True, network="resnet8_cifar", kind="detector", classes=2, version=__version__)


def test_outputs_that_are_not_finite_are_an_error_in_words_and_the_server_stays_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    network: Any = open_network(NAME, False)
    bias = network.evaluated.fc.bias
    before = bias.detach().clone()
    with running(network) as server:
        bias.data.fill_(float("nan"))
        got = ask(server.port, FILES["a digit.png"])
        assert got.status == 500
        assert "the network's outputs for upload are not finite; the checkpoint is damaged" in got.error
        bias.data.copy_(before)
        assert ask(server.port, FILES["a digit.png"]).json["label"] == "3"
    assert "awconv serve: the network's outputs" in capsys.readouterr().err


def test_a_network_that_fails_is_an_error_in_words_and_the_server_stays_up() -> None:
    network: Any = open_network(NAME, False)
    fails = [True]

    def fail(*_: Any) -> None:
        if fails[0]:
            raise RuntimeError("out of order")

    network.evaluated.register_forward_pre_hook(fail)
    with running(network) as server:
        got = ask(server.port, FILES["a digit.png"])
        assert (got.status, got.error) == (500, f"the network {NAME} failed: out of order")
        fails.clear()
        fails.append(False)
        assert ask(server.port, FILES["a digit.png"]).status == 200


def test_health_says_what_answers(server: Running) -> None:
    got = ask(server.port, path="/health")
    assert got.status == 200
    assert got.json == dict(
        ready=True, network=NAME, kind="classifier", classes=10, input_size=[1, 8, 8], version=__version__
    )
    server.service.stopping = True
    try:
        got = ask(server.port, path="/health")
        assert (got.status, got.json["ready"]) == (503, False)
        assert got.headers["connection"] == "close"
    finally:
        server.service.stopping = False


def test_the_description_is_openapi_and_nothing_is_loaded_from_elsewhere(server: Running) -> None:
    content = ask(server.port, path="/openapi.json").json
    assert content["openapi"].startswith("3.")
    assert set(content["paths"]) == {"/health", "/predict"}
    operation = content["paths"]["/predict"]["post"]
    assert set(operation["requestBody"]["content"]) >= {"image/*", "multipart/form-data"}
    assert set(operation["responses"]) == {"200", "400", "408", "413", "415", "422", "500", "503"}
    assert {parameter["name"] for parameter in operation["parameters"]} == {"top_k", "threshold"}
    for path in ("/docs", "/redoc"):
        assert ask(server.port, path=path).status == 404
    policy = ask(server.port, path="/health").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy


def test_the_application_is_for_any_server(tmp_path: Path) -> None:
    task = ClassificationTask(["a", "b"], [3, 16, 16], [0.5] * 3, [0.5] * 3, network="resnet8_cifar")
    file = tmp_path / "two.ckpt"
    torch.save(
        {
            "state_dict": task.state_dict(),
            "hyper_parameters": dict(task.hparams),
            "callbacks": {},
            "pytorch-lightning_version": "2.5",
        },
        file,
    )
    made = app(file, limits=Limits(max_bytes=1000), image_size=8)
    service = made.state.service
    assert service.limits.max_bytes == 1000
    assert service.health()["input_size"] == [3, 8, 8]
    assert not service.ready  # its threads start with the server
    with pytest.raises(FileNotFoundError, match="is not there"):
        app(tmp_path / "missing.ckpt")


@pytest.mark.parametrize("documented", [app, Limits])
def test_the_examples_of_docstrings_run(documented: Any) -> None:
    (example,) = (found for found in doctest.DocTestFinder().find(documented, globs={}) if found.examples)
    report: list[str] = []
    assert not doctest.DocTestRunner().run(example, out=report.append).failed, "".join(report)
