"""What the page takes from browsers, over HTTP: its own uploads, by its own routes, within limits."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="serving needs fastapi: pip install '.[serve]'")
pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[serve]'")

from tests.data.samples import digit, png
from tests.serve.servers import SECONDS, Running, ask, digits, form, joined, running, shown, uploaded, wait_for

UPLOAD = "/page/gradio_api/upload"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page") / "uploads"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    folder.mkdir()
    with running(page=folder, max_bytes=100_000) as server:
        yield server


def described(path: Any) -> dict[str, Any]:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


def files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if not file.is_dir()]


class TestFiles:
    def test_that_were_uploaded_are_shown(self, server: Running) -> None:
        (path,) = uploaded(server.port, digits(4)[3]).json
        message = shown(server.port, described(path), ["layer1.0.conv1"])
        assert message["success"]
        assert 'id="aw-class">3<' in message["output"]["data"][0]
        assert ask(server.port, path=f"/page/gradio_api/file={path}", method="HEAD").status == 200

    def test_may_have_names_with_half_a_character(self, server: Running) -> None:
        (path,) = uploaded(server.port, digits(4)[3]).json
        photograph = described(path) | {"orig_name": "\ud83d<b>.png", "size": "x", "url": "http://example.org"}
        message = shown(server.port, photograph, [], "half")
        assert message["success"]
        assert "<b>.png" not in message["output"]["data"][0]
        photograph["path"] = "\ud83d"
        assert not shown(server.port, photograph, [], "half")["success"]

    @pytest.mark.parametrize(
        "kind", ["elsewhere", "dotfile", "relative", "device", "pipe", "link", "folder", "address", "null-byte", "long"]
    )
    def test_that_were_not_are_neither_shown_nor_copied(
        self, kind: str, server: Running, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        secret, dotted, pipe, link = tmp_path / "secret.png", tmp_path / ".secret.png", folder / "pipe", folder / "link"
        for file in (secret, dotted):
            file.write_bytes(png(digit(5)))
        monkeypatch.chdir(tmp_path)
        os.mkfifo(pipe)
        link.symlink_to(secret)
        try:
            before = files(folder)
            paths: dict[str, Any] = dict(
                elsewhere=secret, dotfile=dotted, relative="secret.png", device="/dev/zero", pipe=pipe, link=link,
                folder=folder, address=f"http://127.0.0.1:{server.port}/health", long="x" * 5000,
            )  # fmt: skip
            path = paths.get(kind, f"{secret}\0")
            message = shown(server.port, described(path), session=kind)
            assert not message["success"]
            assert "must be uploaded" in message["output"]["error"]
            assert files(folder) == before
            assert ask(server.port, path="/health").status == 200
            if kind not in ("null-byte", "long"):
                assert ask(server.port, path=f"/page/gradio_api/file={path}").status == 404
        finally:
            pipe.unlink()
            link.unlink()


class TestRoutes:
    @pytest.mark.parametrize("path", ["/", "/config", "/theme.css", "/gradio_api/info", "/gradio_api/startup-events"])
    def test_of_the_page_are_there(self, path: str, server: Running) -> None:
        assert ask(server.port, path=f"/page{path}").status == 200

    @pytest.mark.parametrize(
        "route",
        [
            "POST /gradio_api/process_recording",
            "POST /gradio_api/component_server",
            "POST /gradio_api/run/show",
            "POST /gradio_api/call/show",
            "POST /gradio_api/stream/abc",
            "POST /gradio_api/vibe-edit",
            "POST /login",
            "GET /gradio_api/deep_link",
            "GET /gradio_api/proxy=http://127.0.0.1/",
            "GET /gradio_api/custom_component/1/client/component/index.js",
            "GET /gradio_api/vibe-code",
            "GET /monitoring",
            "OPTIONS /gradio_api/upload",
            "PUT /gradio_api/upload",
        ],
    )
    def test_of_gradio_that_it_needs_not_are_not(self, route: str, server: Running) -> None:
        method, path = route.split()
        got = ask(server.port, b"{}" if method == "POST" else None, f"/page{path}", "application/json", method)
        assert got.status == 404
        assert f"there is no {method} /page{path}; there are POST /predict" in got.error

    def test_allow_no_page_of_another_server(self, server: Running) -> None:
        got = ask(server.port, path="/page/config", Origin="http://localhost:9")
        assert not [name for name in got.headers if name.startswith("access-control-")]
        for headers in (
            dict(Origin="http://example.org"),
            dict(Origin="null"),
            dict(Sec_Fetch_Site="cross-site", Origin=f"http://127.0.0.1:{server.port}"),
        ):
            got = uploaded(server.port, digits(1)[0], **headers)
            assert got.status == 403
            assert "only the page itself" in got.error
        for headers in (dict(Origin=f"http://127.0.0.1:{server.port}"), dict(Sec_Fetch_Site="same-origin")):
            assert uploaded(server.port, digits(1)[0], **headers).status == 200

    def test_are_there_behind_a_proxy_too(self, server: Running) -> None:
        named: dict[str, str] = dict(X_Forwarded_Host="example.org", X_Forwarded_Proto="https")
        assert ask(server.port, path="/page/config", **named).json["root"] == "https://example.org/page"
        sent = dict(Origin="https://example.org", Sec_Fetch_Site="same-origin")  # as browsers do over HTTPS
        assert uploaded(server.port, digits(1)[0], **named, **sent).status == 200

    def test_begin_at_the_servers_root(self, server: Running) -> None:
        got = ask(server.port, path="/", method="HEAD")
        assert (got.status, got.headers["location"], got.text) == (307, "./page/", "")


class TestUploads:
    def test_that_are_too_large_leave_nothing_and_their_sender_reads_why(self, server: Running, folder: Path) -> None:
        before = files(folder)
        got = uploaded(server.port, bytes(10_000_000))
        assert got.status == 413
        assert "may have 100,000 bytes" in got.error
        assert files(folder) == before

    def test_that_break_off_leave_nothing(self, server: Running, folder: Path) -> None:
        before = files(folder)
        body, kind = form(bytes(50_000), "files")
        head = (
            f"POST {UPLOAD} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", server.port), SECONDS) as connection:
            connection.sendall(head.encode() + body[:30_000])
            wait_for(lambda: len(server.server.server_state.tasks) == 1)
            time.sleep(0.1)
        wait_for(lambda: not server.server.server_state.tasks)
        assert files(folder) == before

    def test_hold_one_file(self, server: Running) -> None:
        body, kind = form(digits(1)[0], "files")
        two = body.replace(b"--edge--", b"--edge") + body[len(b"--edge\r\n") :]
        assert ask(server.port, two, UPLOAD, kind).status == 400

    def test_of_odd_names_stay_in_the_folder(self, server: Running, folder: Path) -> None:
        for name in ("../../escaped.png", "..", "+2AA-.png", "a'\\b.png", "ä\u2603.png"):
            got = uploaded(server.port, digits(1)[0], name)
            assert got.status in (200, 400)
            for path in got.json if got.status == 200 else []:
                assert folder in Path(path).resolve().parents

    def test_are_refused_when_the_folder_is_full(self, tmp_path: Path) -> None:
        with running(page=tmp_path, max_bytes=1000) as server:
            (tmp_path / "older").write_bytes(bytes(64_000))
            got = uploaded(server.port, digits(1)[0])
            assert got.status == 503
            assert "64,000 bytes together" in got.error
            (tmp_path / "older").unlink()
            assert uploaded(server.port, digits(1)[0]).status == 200


class TestCalls:
    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (dict(fn_index=999), "fn_index must be one of"),
            (dict(fn_index="0"), "fn_index must be one of"),
            (dict(session_hash=None), "session_hash must be letters"),
            (dict(session_hash="\ud83d"), "session_hash must be letters"),
            (dict(data=["photo.png", []]), "a photograph must be null or"),
            (dict(data=[{"path": 1}, []]), "a photograph must be null or"),
            (dict(data=[None, {"path": "/dev/zero"}]), "data must be"),
            (dict(data="x"), "data must be"),
        ],
    )
    def test_that_the_page_does_not_make_are_refused_in_words(
        self, call: dict[str, Any], words: str, server: Running, capfd: pytest.CaptureFixture[str]
    ) -> None:
        got = joined(server.port, dict(fn_index=0, session_hash="a", data=[None, []]) | call)
        assert got.status == 422
        assert words in got.error
        assert capfd.readouterr().err == ""

    @pytest.mark.parametrize(
        ("body", "kind", "status"),
        [
            (b"{", "application/json", 400),
            (b"[" * 100_000, "application/json", 400),
            (b"[]", "application/json", 422),
            (b"{}", "text/plain", 415),
            (json.dumps({"data": "x" * 2**20}).encode(), "application/json", 413),
        ],
    )
    def test_that_are_no_small_json_are_refused(self, body: bytes, kind: str, status: int, server: Running) -> None:
        got = ask(server.port, body, "/page/gradio_api/queue/join", kind)
        assert got.status == status
        assert got.error
