"""``awconv serve`` as a process: in a browser, under load, and how it ends."""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="serving needs fastapi: pip install '.[serve]'")
pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[serve]'")

from awconv.cli import main
from awconv.predict import predict
from tests.serve.servers import NAME, SECONDS, Answer, Process, ask, digits, form, photographs, shown, wait_for

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",  # there is no network
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    server = Process(tmp_path_factory.mktemp("server"), "--max_bytes=1000000")
    yield server
    server.end()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[bytes, str, float]]:
    """Files, and the classes and probabilities that ``awconv predict`` gives for them."""
    folder = tmp_path_factory.mktemp("files")
    contents = [*photographs(), *digits(6)]
    for index, content in enumerate(contents):
        (folder / f"{index}.png").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        predict([folder], NAME, format="json")
    predictions = json.loads(printed[0])["predictions"]
    return [(content, one["label"], one["probability"]) for content, one in zip(contents, predictions, strict=True)]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs a browser: chromium and chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, which drives a browser")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'browser'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def found(browser: Any, selector: str, text: str = "") -> Any:
    """An element with a text, once there is one."""
    elements: list[Any] = []

    def appears() -> bool:
        elements[:] = browser.find_elements("css selector", selector)
        return any(text in one.text for one in elements)

    wait_for(appears)
    return next(one for one in elements if text in one.text)


# Drops a file that the browser makes of its bytes, as a hand would that drags it there.
DROP = """
const bytes = Uint8Array.from(atob(arguments[1]), (character) => character.charCodeAt(0));
const dragged = new DataTransfer();
dragged.items.add(new File([bytes], arguments[2], {type: "image/png"}));
for (const kind of ["dragenter", "dragover", "drop"])
  arguments[0].dispatchEvent(new DragEvent(kind, {dataTransfer: dragged, bubbles: true, cancelable: true}));
"""


def requested(browser: Any) -> tuple[set[str], list[str]]:
    """The hosts that the browser's pages asked, and the addresses that were refused."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    answers = [m["params"]["response"] for m in messages if m["method"] == "Network.responseReceived"]
    hosts = {url.split("/")[2] for url in urls if url.startswith(("http:", "https:", "ws:", "wss:"))}
    return hosts, [answer["url"] for answer in answers if answer["status"] >= 400]


class TestThePage:
    def test_shows_the_class_of_a_photograph_that_is_given_or_dropped_and_asks_nobody_else(
        self, server: Process, browser: Any, tmp_path: Path
    ) -> None:
        browser.get(f"http://127.0.0.1:{server.port}/")
        (tmp_path / "three.png").write_bytes(digits(4)[3])
        found(browser, "#photograph input[type=file]").send_keys(str(tmp_path / "three.png"))
        assert found(browser, "#aw-class").text == "3"
        assert found(browser, ".aw h3", "Attention of layer1.0.conv1")
        assert len(browser.find_elements("css selector", ".aw figure img")) == 2
        found(browser, "#photograph button[aria-label='Remove Image']").click()
        found(browser, "#result", "No photograph yet")
        self.drop(browser, digits(8)[7])
        assert found(browser, "#aw-class", "7")
        found(browser, "#photograph button[aria-label='Remove Image']").click()
        found(browser, "#result", "No photograph yet")
        self.drop(browser, b"broken")
        assert "cannot identify an image" in found(browser, ".aw .error").text
        assert requested(browser) == ({f"127.0.0.1:{server.port}"}, [])
        errors = server.errors.splitlines()
        assert len(errors) == 1, errors  # where it listens

    def drop(self, browser: Any, content: bytes) -> None:
        target = found(browser, "#photograph button[aria-dropeffect]", "Drop")
        browser.execute_script(DROP, target, base64.b64encode(content).decode(), "dropped.png")

    def test_makes_the_server_fetch_nothing(self, server: Process) -> None:
        for address in ("http://example.org/photo.png", "https://example.org/photo.png"):
            file = {"path": address, "url": address, "meta": {"_type": "gradio.FileData"}}
            assert not shown(server.port, file, [])["success"]
            assert ask(server.port, path=f"/page/gradio_api/file={address}").status == 404
        assert not [line for line in server.audit if "example.org" in line]


def test_500_requests_of_16_clients_are_all_answered_rightly_and_memory_stays_flat(
    server: Process, expected: list[tuple[bytes, str, float]]
) -> None:
    body, kind = form(b"no image")
    spoiled = [
        (dict(body=b"no image"), 400),
        (dict(body=expected[0][0][:5000]), 400),  # a truncated photograph
        (dict(body=body, kind=kind), 400),
        (dict(body=b"{}", kind="application/json"), 415),
        (dict(body=bytes(1_000_001)), 413),
    ]

    def right(index: int) -> bool:
        if index % 10 == 9:
            arguments, status = spoiled[index // 10 % len(spoiled)]
            got = ask(server.port, **arguments)  # type: ignore[arg-type]
            return got.status == status and bool(got.error)
        content, label, probability = expected[index % len(expected)]
        got = asked(index, content)
        # float32: batches change the order of sums
        return got.json["label"] == label and abs(got.json["probability"] - probability) < 1e-4

    def asked(index: int, content: bytes) -> Answer:
        if index % 2:
            return ask(server.port, content)
        inside, kind = form(content)
        return ask(server.port, inside, kind=kind)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(right, range(150)))  # until the allocator's pools are as large as they become
        before = server.memory()
        assert Counter(pool.map(right, range(500))) == {True: 500}
        grown = server.memory() - before
    # A leak of each photograph's 0.8 MB, of which 450 / 4 were sent, would be 90 MB; of its file's bytes, 25 MB.
    # The pools of 16 connections' buffers and of the threads that decode go up and down by a few MB.
    assert grown < 15_000, grown


def test_nothing_is_written_outside_the_temporary_folder_and_nobody_is_called(server: Process) -> None:
    assert ask(server.port, digits(1)[0]).status == 200
    assert list((server.folder / "home").iterdir()) == []
    assert list((server.folder / "here").iterdir()) == []
    allowed = (str(server.folder / "temporary"), str(server.cache), os.devnull, "/dev/shm")
    written = {line.removeprefix("write ") for line in server.audit if line.startswith("write ")}
    assert written  # the audit sees something: the temporary folder, at least
    assert {path for path in written if not path.startswith(allowed)} == set()
    reached = [line for line in server.audit if line.startswith("reach ")]
    assert [line for line in reached if "127.0.0.1" not in line and "localhost" not in line] == []


def test_ctrl_c_ends_it_while_a_page_listens_and_leaves_no_file(server: Process) -> None:
    listening = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    listening.request("GET", "/page/gradio_api/heartbeat/abc")
    assert listening.getresponse().status == 200
    start = time.monotonic()
    assert server.stop(signal.SIGINT) == 130
    assert time.monotonic() - start < 25  # as its documentation says
    listening.close()
    assert server.left() == []
    first, *rest = server.errors.splitlines()
    assert first.startswith(f"awconv serve: {NAME}, 10 classes, at http://127.0.0.1:")
    assert not [line for line in rest if not line.startswith("awconv serve: answered for ")], rest


# A handler that never gives the loop back.
STUCK = """
import time
from awconv.serve import interface
make_app = interface.make_app
def spoiled(*arguments):
    application = make_app(*arguments)
    @application.get("/stuck")
    async def stuck():
        time.sleep(600)
    return application
interface.make_app = spoiled
"""


def test_a_second_signal_ends_it_at_once_though_its_loop_is_stuck(tmp_path: Path) -> None:
    server = Process(tmp_path, "--page=false", before=STUCK)
    try:
        with socket.create_connection(("127.0.0.1", server.port), SECONDS) as connection:
            connection.sendall(b"GET /stuck HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(0.5)
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert server.process.poll() is None
            start = time.monotonic()
            assert server.stop(signal.SIGTERM) == 143
        assert time.monotonic() - start < 5
        assert server.left() == []
        assert "ended at once by a second signal" in server.errors
    finally:
        server.end()


def test_sigterm_under_load_loses_no_request_and_refuses_new_ones(
    tmp_path: Path, expected: list[tuple[bytes, str, float]]
) -> None:
    server = Process(tmp_path, "--page=false")
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()

    def note(outcome: str) -> None:
        with lock:
            outcomes[outcome] += 1

    def ask_until_refused(client: int) -> None:
        while True:
            content, label, _ = expected[client % len(expected)]
            try:
                connection = socket.create_connection(("127.0.0.1", server.port), SECONDS)
            except ConnectionRefusedError:
                return note("refused")
            with connection:
                received = b""
                try:
                    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
                    connection.sendall(head.encode() + b"Connection: close\r\n\r\n" + content)
                    while piece := connection.recv(65536):
                        received += piece
                except ConnectionError:
                    note("cut" if received else "never accepted")
                    continue
            status, _, rest = received.partition(b"\r\n")
            body = rest.partition(b"\r\n\r\n")[2]
            right = b" 200 " in status and json.loads(body)["label"] == label
            note("right" if right else f"wrong: {received!r}")

    try:
        clients = [threading.Thread(target=ask_until_refused, args=(client,)) for client in range(8)]
        for client in clients:
            client.start()
        wait_for(lambda: outcomes["right"] >= 40)
        assert server.stop(signal.SIGTERM) == 143
        for client in clients:
            client.join(SECONDS)
    finally:
        server.end()
    assert outcomes["refused"] == 8
    # The kernel may have taken connections that the server had not accepted when it closed: at most one of a client.
    assert outcomes.pop("never accepted", 0) <= 8
    assert set(outcomes) == {"right", "refused"}, outcomes
    assert f"answered for {outcomes['right']} images" in server.errors
    assert "stopped by SIGTERM" in server.errors


class TestPorts:
    def test_one_in_use_is_said_in_words_before_the_network_is_loaded(self, capsys: pytest.CaptureFixture[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert main(["serve", "missing.ckpt", f"--port={port}"]) == 1
        error = capsys.readouterr().err
        assert f"port {port} of 127.0.0.1 cannot be had: Address already in use" in error
        assert f"--port={port + 1}" in error

    @pytest.mark.parametrize(
        ("arguments", "status", "words"),
        [
            (["--port=70000"], 1, "port must be from 0 to 65535, got 70000"),
            (["--port=0", "--host=no.such.host.invalid"], 1, "host must be a name or an address of this machine"),
            (["--port=0", "--batch_size=0"], 1, "batch_size must be at least 1"),
            (["--port=0", "--model=net.onnx"], 2, "either ckpt or --model names the network, got both"),
            (["--port=0", "--ckpt_path=x"], 2, "--ckpt"),
        ],
    )
    def test_and_other_arguments_out_of_their_range(
        self, arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["serve", NAME, *arguments]) == status
        assert words in capsys.readouterr().err

    def test_the_network_is_named_by_one_argument(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["serve"]) == 2
        assert "missing: ckpt: a checkpoint" in capsys.readouterr().err

    def test_all_addresses_are_warned_of(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("awconv.serve.stopping.Server.run", lambda self, sockets: None)
        for host, warned in (("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)):
            assert main(["serve", NAME, "--port=0", "--page=false", f"--host={host}"]) == 0
            assert ("asks for no password" in capsys.readouterr().err) == warned
