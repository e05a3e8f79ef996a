"""Servers for tests, and requests to them."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_sample_images

from awconv.predict import Network, open_network
from awconv.serve.interface import add_page, make_app
from awconv.serve.ports import listen, names_of
from awconv.serve.service import Limits, Service
from awconv.serve.stopping import Server
from tests.data.samples import digit, png

NAME = "aw_resnet8_cifar.digits"
SECONDS = 60.0  # after which a test gives up
REMOTE_MODULE = "_remote_module_non_scriptable.py"  # in a folder that torch 2.9 makes


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> str:
        return str(self.json["error"])


def ask(
    port: int,
    body: bytes | Iterable[bytes] | None = None,
    path: str = "/predict",
    kind: str | None = "image/png",
    method: str | None = None,
    **headers: str,
) -> Answer:
    """One request on a connection of its own. A body that is no bytes goes in chunks, without its length."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if kind is not None and body is not None:
            given["Content-Type"] = kind
        connection.request(method or ("GET" if body is None else "POST"), path, body=body, headers=given)
        response = connection.getresponse()
        text = response.read().decode()
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, text)
    finally:
        connection.close()


def form(content: bytes, field: str = "file", name: str = "photo.png") -> tuple[bytes, str]:
    """A form with a file: its bytes, and its type."""
    head = f'--edge\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n--edge--\r\n", "multipart/form-data; boundary=edge"


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photographs() -> list[bytes]:
    """scikit-learn's two photographs, as JPEG."""
    return [encoded(Image.fromarray(image), "JPEG", quality=95) for image in load_sample_images().images]


def digits(count: int) -> list[bytes]:
    return [png(digit(index)) for index in range(count)]


def uploaded(port: int, content: bytes, name: str = "photo.png", **headers: str) -> Answer:
    """The page's way to give a file; its answer is the file's path."""
    body, kind = form(content, "files", name)
    return ask(port, body, "/page/gradio_api/upload", kind, **headers)


def joined(port: int, call: dict[str, Any]) -> Answer:
    return ask(port, json.dumps(call).encode(), "/page/gradio_api/queue/join", "application/json")


def shown(port: int, photograph: Any, choice: Any = (), session: str = "abc") -> dict[str, Any]:
    """What the page gets for a photograph: gradio's message at the end."""
    call = dict(data=[photograph, choice], fn_index=0, session_hash=session)
    assert joined(port, call).status == 200
    stream = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        stream.request("GET", f"/page/gradio_api/queue/data?session_hash={session}")
        response = stream.getresponse()
        while line := response.readline().decode():
            if "process_completed" in line:
                message: dict[str, Any] = json.loads(line.removeprefix("data: "))
                return message
        raise AssertionError("the stream ended")
    finally:
        stream.close()


@dataclass(frozen=True)
class Running:
    port: int
    service: Service
    server: Server


@contextmanager
def running(network: Network | None = None, page: Path | None = None, **limits: Any) -> Iterator[Running]:
    """A server in a thread of this process, with the page if there is a folder for its files."""
    service = Service(open_network(NAME, False) if network is None else network, Limits(**limits))
    with listen("127.0.0.1", 0) as bound:
        application = make_app(service, names_of(bound, "127.0.0.1"))
        if page is not None:
            add_page(application, service, page)
        server = Server(application, service)
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[bound]))
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield Running(bound.getsockname()[1], service, server)
        finally:
            server.should_exit = True
            thread.join(SECONDS)
            assert not thread.is_alive()


def wait_for(condition: Any) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Process:
    """``awconv serve`` in a process of its own, whose home and folder are empty.

    It writes down, by Python's audit events, each file that it opens to write, and each address that it looks up or
    connects to.

    Args:
        folder: of its own.
        arguments: of the command.
        before: Python that it runs first.
    """

    _CODE = """
import os, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def note(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if not isinstance(arguments[0], int):
            os.write(log, f"write {os.path.abspath(os.fsdecode(arguments[0]))}\\n".encode())
    elif event in ("os.mkdir", "os.rename", "os.symlink"):
        os.write(log, f"write {os.path.abspath(os.fsdecode(arguments[event != 'os.mkdir']))}\\n".encode())
    elif event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        os.write(log, f"reach {arguments}\\n".encode())
sys.addaudithook(note)
exec(sys.argv[2])
from awconv.cli import main
sys.exit(main(sys.argv[3:]))
"""

    def __init__(self, folder: Path, *arguments: str, before: str = "") -> None:
        self.folder = folder
        for name in ("home", "here", "temporary"):
            (folder / name).mkdir()
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")  # of built C code
        environment = os.environ | dict(
            HOME=str(folder / "home"),
            TMPDIR=str(folder / "temporary"),
            XDG_CACHE_HOME=cache,
            PYTHONPATH=os.pathsep.join(path for path in sys.path if path),
            PYTHONDONTWRITEBYTECODE="1",
            OMP_NUM_THREADS="1",
        )
        for name in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"):
            environment.pop(name, None)
        self.cache = Path(cache) / "awconv"
        self._errors = open(folder / "errors", "w")  # noqa: SIM115 - closed by end()
        self.process = subprocess.Popen(
            [sys.executable, "-c", self._CODE, str(folder / "audit"), before, "serve", NAME, "--port=0", *arguments],
            cwd=folder / "here",
            env=environment,
            stderr=self._errors,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
        )
        try:
            wait_for(lambda: "Ctrl-C ends it" in self.errors or self.process.poll() is not None)
            assert self.process.poll() is None, self.errors
            self.port = int(self.errors.partition(" at http://127.0.0.1:")[2].split()[0])
        except BaseException:
            self.end()
            raise

    @property
    def errors(self) -> str:
        return (self.folder / "errors").read_text()

    @property
    def audit(self) -> list[str]:
        return (self.folder / "audit").read_text().splitlines()

    def left(self) -> list[str]:
        """What it has left in the temporary folder; not what torch makes there as soon as torchvision is imported."""
        files = sorted((self.folder / "temporary").iterdir())
        of_torch = [file.name.startswith("torchinductor_") or (file / REMOTE_MODULE).exists() for file in files]
        return [file.name for file, its in zip(files, of_torch, strict=True) if not its]

    def memory(self) -> int:
        """What is in memory of it, in KiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])

    def stop(self, by: signal.Signals) -> int:
        """The exit status."""
        self.process.send_signal(by)
        return self.process.wait(SECONDS)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._errors.close()
