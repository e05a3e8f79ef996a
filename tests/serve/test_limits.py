"""A server's limits, and requests that cannot be answered: errors in words."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import socket
import threading
import time
import tracemalloc
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="serving needs fastapi: pip install '.[serve]'")

from awconv.data.images import MAX_PIXELS, read_image
from awconv.predict import open_network
from awconv.serve import serve
from awconv.serve.interface import make_app
from awconv.serve.ports import listen, names_of
from awconv.serve.service import Limits, Service
from awconv.tasks import DetectionTask
from tests.serve.files import FILES
from tests.serve.servers import NAME, SECONDS, Running, ask, digits, encoded, form, running, wait_for


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(max_bytes=200_000) as server:
        yield server


def memory() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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

    def test_no_compression_may_be_named(self, server: Running) -> None:
        for name in ("identity", "Identity", ""):
            assert ask(server.port, FILES["a digit.png"], Content_Encoding=name).status == 200

    @pytest.mark.parametrize("charset", ["utf-7", "punycode", "undefined", "idna", "nonsense", "utf-16", "rot13"])
    def test_names_of_files_are_utf_8_whatever_alphabet_the_form_names(self, server: Running, charset: str) -> None:
        for name in ("+2AA-.png", "ä\u2603.png"):
            body, kind = form(FILES["a digit.png"], name=name)
            got = ask(server.port, body, kind=f"{kind}; charset={charset}")
            assert got.status == 200, got
            assert got.json["image"] == name

    def test_a_form_without_its_end_and_a_text_in_the_place_of_a_file(self, server: Running) -> None:
        body, kind = form(FILES["a digit.png"])
        got = ask(server.port, body.removesuffix(b"--edge--\r\n"), kind=kind)
        assert got.status == 400
        assert "one without its end" in got.error
        for spoiled in (b"filename*=UTF-8''photo.png", b"x=y"):
            got = ask(server.port, body.replace(b'filename="photo.png"', spoiled), kind=kind)
            assert got.status == 422
            assert "'file' must be a file, with a filename=, got a text" in got.error

    def test_a_body_that_stands_still(self, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("awconv.serve.body._IDLE", 0.2)
        monkeypatch.setattr("awconv.serve.door._REST", (0.2, 1000))
        with socket.create_connection(("127.0.0.1", server.port), SECONDS) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
            received = b"".join(iter(lambda: connection.recv(65536), b""))
        assert received.startswith(b"HTTP/1.1 408 ")
        assert b"bytes of it every 0.2" in received

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

    @pytest.mark.parametrize(
        ("path", "kind", "status"),
        [
            ("/predict?top_k=0", "image/png", 422),
            ("/predict", "application/json", 415),
            ("/predict", "multipart/form-data", 400),
            ("/classify", "image/png", 404),
            ("/health", "image/png", 405),
        ],
    )
    def test_a_refusal_before_the_body_is_read_reaches_a_sender_that_is_still_writing(
        self, server: Running, path: str, kind: str, status: int
    ) -> None:
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.port}{path}", data=bytes(10_000_000), headers={"Content-Type": kind}
        )
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(request, timeout=SECONDS)
        with raised.value as answer:
            assert answer.code == status
            assert json.load(answer)["error"]

    def test_who_asks_before_writing_is_refused_at_once(self, server: Running) -> None:
        head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\nExpect: 100-continue\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), 4) as connection:  # seconds, fewer than it discards
            connection.sendall(head.encode())
            assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")

    def test_a_file_of_just_so_many_bytes_is_read(self, server: Running) -> None:
        content = FILES["a digit.png"]
        padded = content + bytes(200_000 - len(content))  # which no reader of PNG looks at
        assert ask(server.port, padded).json["label"] == "3"
        assert ask(server.port, *form(padded)[:1], kind=form(b"")[1]).json["label"] == "3"
        assert ask(server.port, padded + b"\0").status == 413
        assert ask(server.port, *form(padded + b"\0")[:1], kind=form(b"")[1]).status == 413

    def test_no_more_of_a_large_body_is_kept_in_memory_than_is_allowed(self) -> None:
        left = 100  # pieces of a megabyte
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            nonlocal left
            left -= 1
            return {"type": "http.request", "body": bytes(1_000_000), "more_body": left > 0}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        application: Any = make_app(Service(open_network(NAME, False), Limits(max_bytes=2_000_000)))
        headers = [(b"content-type", b"image/png"), (b"transfer-encoding", b"chunked")]
        scope = dict(type="http", method="POST", path="/predict", query_string=b"", headers=headers)
        tracemalloc.start()
        try:
            asyncio.run(application(scope, receive, send))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert sent[0]["status"] == 413
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
            with pytest.raises(urllib.error.HTTPError, match="503"):  # and a large image's sender reads it
                urllib.request.urlopen(f"http://127.0.0.1:{server.port}/predict", bytes(10_000_000), SECONDS)
            goes_on.set()
            assert [one.result().json["label"] for one in waiting] == ["0", "1"]
            assert ask(server.port, FILES["a digit.png"]).status == 200

    def test_large_images_wait_for_a_detector_encoded(self) -> None:
        goes_on = threading.Event()
        torch.manual_seed(0)
        network = DetectionTask(["a", "b"], [1, 2], network="resnet8_cifar", min_size=64, max_size=96).eval()
        network.register_forward_pre_hook(lambda *_: goes_on.wait(60) and None)
        large = encoded(Image.new("RGB", (3000, 2000)), "PNG")
        with running(network) as server, ThreadPoolExecutor(10) as pool:
            before = memory()
            waiting = [pool.submit(ask, server.port, large) for _ in range(10)]
            wait_for(lambda: server.service.batcher.busy == 10 and server.service.batcher._coming == 0)
            grown = memory() - before
            goes_on.set()
            assert {one.result().status for one in waiting} == {200}
        assert grown < 100_000_000, grown  # one image has 18 MB, and some more while it is decoded; ten have 180 MB

    @pytest.mark.parametrize(("side", "most"), [(64, 4), (65, 1)])
    def test_there_is_one_large_image_at_a_time(self, side: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
        decoding, counts = [0], [0]

        def slowly(*arguments: Any, **options: Any) -> Any:
            decoding[0] += 1
            counts.append(decoding[0])
            time.sleep(0.05)
            decoding[0] -= 1
            return read_image(*arguments, **options)

        monkeypatch.setattr("awconv.serve.service.read_image", slowly)
        monkeypatch.setattr("awconv.serve.service._LARGE", 64 * 64)
        image = encoded(Image.new("L", (side, 64)), "PNG")
        with running() as server, ThreadPoolExecutor(8) as pool:
            assert {got.status for got in pool.map(lambda _: ask(server.port, image), range(8))} == {200}
        assert max(counts) == (1 if most == 1 else min(most, os.cpu_count() or 1))

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


class TestNames:
    @pytest.mark.parametrize("name", ["localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8000"])
    def test_of_this_machine_are_answered(self, server: Running, name: str) -> None:
        assert ask(server.port, path="/health", Host=name).status == 200

    @pytest.mark.parametrize("name", ["example.org", "example.org:80", "localhost.example.org", "10.0.0.1", "", "::1"])
    def test_of_others_are_refused_where_only_this_machine_listens(self, server: Running, name: str) -> None:
        for body in (None, FILES["a digit.png"]):
            got = ask(server.port, body, path="/health" if body is None else "/predict", Host=name)
            assert got.status == 421
            assert "127.0.0.1, [::1], localhost, got Host" in got.error
            assert got.headers["x-content-type-options"] == "nosniff"

    def test_are_any_where_others_listen_and_its_own_else(self) -> None:
        with listen("0.0.0.0", 0) as bound:
            assert names_of(bound, "0.0.0.0") is None
        with listen("127.0.0.2", 0) as bound:
            assert names_of(bound, "Here") == {"localhost", "127.0.0.1", "127.0.0.2", "[::1]", "here"}

    def test_head_is_answered_as_get_without_a_body(self, server: Running) -> None:
        got = ask(server.port, path="/health", method="HEAD")
        assert (got.status, got.text) == (200, "")
