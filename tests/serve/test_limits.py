"""A server's limits, and requests that cannot be answered: errors in words."""

from __future__ import annotations

import asyncio
import inspect
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import pytest
from starlette.requests import Request

from awconv.data.images import MAX_PIXELS
from awconv.predict import open_network
from awconv.serve import serve
from awconv.serve.body import RequestError, read_upload
from awconv.serve.service import Limits
from tests.serve.files import FILES
from tests.serve.servers import NAME, Running, ask, digits, form, running, wait_for


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(max_bytes=200_000) as server:
        yield server


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
        assert defaults["max_pixels"] == MAX_PIXELS
