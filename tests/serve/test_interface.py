"""``POST /predict`` and ``GET /health``: the answers of ``awconv predict``, limits, and errors in words."""

from __future__ import annotations

import asyncio
import doctest
import inspect
import json
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from starlette.requests import Request

from awconv.data.images import MAX_PIXELS as MAX_PIXELS_OF_PREDICT
from awconv.export.exported import ExportedClassifier
from awconv.export.metadata import Metadata
from awconv.predict import open_network, predict
from awconv.serve import app, serve
from awconv.serve.body import RequestError, read_upload
from awconv.serve.service import Limits
from awconv.tasks import ClassificationTask, DetectionTask
from awconv.version import __version__
from tests.data.samples import digit
from tests.photographs import photograph
from tests.serve.servers import NAME, Running, ask, digits, encoded, form, running, wait_for

GREY = Image.fromarray(np.linspace(0, 255, 256, dtype=np.uint8).reshape(16, 16))
COLOURS = photograph("china")


def turned() -> bytes:
    notes = Image.Exif()
    notes[ExifTags.Base.Orientation] = 6
    return encoded(COLOURS, "JPEG", exif=notes)


FILES = {
    "a digit.png": encoded(digit(3), "PNG"),
    "photograph.jpg": encoded(COLOURS, "JPEG"),
    "turned.jpg": turned(),
    "cmyk.jpg": encoded(COLOURS.convert("CMYK"), "JPEG"),
    "16 bits.png": encoded(Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257), "PNG"),
    "animated.png": encoded(digit(3, 32), "PNG", save_all=True, append_images=[digit(4, 32)]),
    "transparent.webp": encoded(COLOURS.convert("RGBA"), "WEBP"),
    "floats.tiff": encoded(GREY.convert("F"), "TIFF"),
    "truncated.jpg": encoded(COLOURS, "JPEG")[:2000],
    "empty.png": b"",
    "text.png": b"<svg>no picture</svg>",
    "bomb.png": encoded(Image.new("1", (3000, 2000)), "PNG"),
}
MAX_PIXELS = 5_000_000  # of which the bomb has more


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(max_pixels=MAX_PIXELS, max_bytes=200_000) as server:
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


class TestMistakes:
    @pytest.mark.parametrize(
        ("body", "kind", "path", "status", "words"),
        [
            (b"{}", "application/json", "/predict", 415, "must be an image, got Content-Type: 'application/json'"),
            (b"abc", "application/x-www-form-urlencoded", "/predict", 415, "curl -F file=@photo.jpg"),
            (b"", "image/png", "/predict", 400, "got none: 0 bytes"),
            (b"abc", "image/png", "/predict", 400, "cannot identify an image"),
            (b"abc", "multipart/form-data; boundary=edge", "/predict", 400, "the form must be whole"),
            (b"abc", "multipart/form-data", "/predict", 400, "boundary"),
            (*form(b"abc", field="photo"), "/predict", 422, "must hold a file named 'file', got 'photo'"),
            (FILES["a digit.png"], "image/png", "/predict?top_k=x", 422, "top_k must be a valid integer"),
            (FILES["a digit.png"], "image/png", "/predict?top_k=0", 422, "top_k must be greater than or equal to 1"),
            (FILES["a digit.png"], "image/png", "/predict?threshold=0.5", 422, "threshold is a detector's"),
            (
                FILES["a digit.png"],
                "image/png",
                "/classify",
                404,
                "there is no POST /classify; there are",
            ),
            (None, None, "/predict", 405, "there is no GET /predict; there are POST /predict"),
        ],
    )
    def test_are_answered_in_words(
        self, server: Running, body: bytes | None, kind: str | None, path: str, status: int, words: str
    ) -> None:
        got = ask(server.port, body, path, kind)
        assert got.status == status, got
        assert words in got.error
        assert got.headers["content-type"] == "application/json"

    def test_two_files_at_once(self, server: Running) -> None:
        one, kind = form(FILES["a digit.png"])
        got = ask(server.port, one.replace(b"--edge--", b"--edge") + one[len(b"--edge\r\n") :], kind=kind)
        assert got.status == 400
        assert "hold one file" in got.error

    def test_a_compressed_body(self, server: Running) -> None:
        got = ask(server.port, FILES["a digit.png"], Content_Encoding="gzip")
        assert got.status == 415
        assert "must not be compressed" in got.error


class TestLimits:
    @pytest.mark.parametrize("in_chunks", [False, True])
    @pytest.mark.parametrize("in_form", [False, True])
    def test_more_bytes_than_are_allowed_are_refused_and_the_sender_reads_why(
        self, server: Running, in_chunks: bool, in_form: bool
    ) -> None:
        content, kind = form(bytes(3_000_000)) if in_form else (bytes(3_000_000), "image/png")
        body: Any = content
        if in_chunks:
            body = (content[start : start + 100_000] for start in range(0, len(content), 100_000))
        got = ask(server.port, body, kind=kind)
        assert got.status == 413
        assert "may have 200,000 bytes, got " in got.error
        assert "--max_bytes" in got.error

    def test_a_file_of_just_so_many_bytes_is_read(self, server: Running) -> None:
        content = FILES["a digit.png"]
        padded = content + bytes(200_000 - len(content))  # which no reader of PNG looks at
        assert ask(server.port, padded).json["label"] == "3"
        assert ask(server.port, *form(padded)[:1], kind=form(b"")[1]).json["label"] == "3"
        assert ask(server.port, padded + b"\0").status == 413
        assert ask(server.port, *form(padded + b"\0")[:1], kind=form(b"")[1]).status == 413

    def test_no_more_of_a_large_body_is_kept_in_memory_than_is_allowed(self) -> None:
        left = 100  # pieces of a megabyte

        async def receive() -> dict[str, Any]:
            nonlocal left
            left -= 1
            return {"type": "http.request", "body": bytes(1_000_000), "more_body": left > 0}

        request = Request({"type": "http", "headers": [(b"content-type", b"image/png")]}, receive)
        tracemalloc.start()
        try:
            with pytest.raises(RequestError, match="may have 2,000,000 bytes"):
                asyncio.run(read_upload(request, 2_000_000))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert left == 0  # the rest was read, for the sender's sake, and forgotten
        assert peak < 8_000_000  # what is allowed, a piece, and twice that while a buffer grows

    def test_a_full_queue_answers_503_and_when_to_come_again(self) -> None:
        goes_on = threading.Event()
        network: Any = open_network(NAME, False)
        network.evaluated.register_forward_pre_hook(lambda *_: goes_on.wait(60) and None)
        with running(network, queue_size=2, batch_size=1) as server, ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(ask, server.port, image) for image in digits(2)]
            wait_for(lambda: server.service.batcher.busy == 2)
            got = ask(server.port, FILES["a digit.png"])
            assert got.status == 503
            assert int(got.headers["retry-after"]) >= 1
            assert "at most 2 requests" in got.error
            assert ask(server.port, path="/health").json["ready"] is True
            goes_on.set()
            assert [one.result().json["label"] for one in waiting] == ["0", "1"]
            assert ask(server.port, FILES["a digit.png"]).status == 200

    @pytest.mark.parametrize(
        ("limits", "words"),
        [
            (dict(batch_size=0), "batch_size must be at least 1, got 0"),
            (dict(queue_size=0), "queue_size must be at least 1"),
            (dict(max_wait_ms=-1.0), "max_wait_ms must be from 0 to 60000"),
            (dict(threshold=1.5), "threshold must be from 0 to 1"),
        ],
    )
    def test_out_of_their_range_are_refused(self, limits: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            Limits(**limits)

    def test_are_those_of_the_command_and_pixels_those_of_predict(self) -> None:
        defaults = {name: one.default for name, one in inspect.signature(serve).parameters.items()}
        for one in fields(Limits):
            assert defaults[one.name] == one.default
        assert defaults["max_pixels"] == MAX_PIXELS_OF_PREDICT


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
