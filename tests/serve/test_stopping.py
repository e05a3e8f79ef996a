"""How a server ends, and what it needs to start."""

from __future__ import annotations

import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="serving needs fastapi: pip install '.[serve]'")

from awconv.cli import main
from awconv.predict import open_network
from tests.serve.servers import NAME, SECONDS, ask, digits, running, wait_for


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), SECONDS).close()
    except ConnectionRefusedError:
        return True
    return False


def test_what_is_computed_and_what_comes_on_accepted_connections_is_answered_and_no_other_is_accepted() -> None:
    goes_on = threading.Event()
    network: Any = open_network(NAME, False)
    network.evaluated.register_forward_pre_hook(lambda *_: goes_on.wait(SECONDS) and None)
    computed, late = digits(2)
    with running(network, batch_size=1) as running_server, ThreadPoolExecutor(1) as pool:
        port, server = running_server.port, running_server.server
        first = pool.submit(ask, port, computed)
        wait_for(lambda: running_server.service.batcher.busy == 1)
        with socket.create_connection(("127.0.0.1", port), SECONDS) as accepted:
            wait_for(lambda: len(server.server_state.connections) == 2)
            server.should_exit = True
            wait_for(lambda: is_refused(port))
            head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(late)}\r\n\r\n"
            accepted.sendall(head.encode() + late)
            wait_for(lambda: running_server.service.batcher.busy == 2)
            goes_on.set()
            received = b"".join(iter(lambda: accepted.recv(65536), b""))  # until the server closes
        assert received.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in received
        assert b'"label":"1"' in received
        assert first.result(SECONDS).json["label"] == "0"
    assert running_server.service.answered == 2


@pytest.mark.parametrize("module", ["fastapi", "uvicorn", "python_multipart", "gradio"])
def test_what_is_missing_is_named_with_its_extra(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["serve", NAME, "--port=0"]) == 1
    error = capsys.readouterr().err
    assert f"needs '{module}'" in error
    assert "pip install 'awconv[serve]'" in error
