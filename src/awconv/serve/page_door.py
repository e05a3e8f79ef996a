"""What reaches the page: gradio's server has many routes, of which the page needs few."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request

from awconv.serve.batching import FullError
from awconv.serve.body import RequestError, Upload, read_body, read_upload
from awconv.serve.door import Message, Receive, Scope, Send
from awconv.serve.service import Service

_READ = re.compile(
    r"/|/config/?|/theme\.css|/(assets|static)/.+|"
    r"/gradio_api/(theme\.css|info/?|startup-events|upload_progress|queue/data|heartbeat/[^/]+|file=(?P<file>.+))",
    re.DOTALL,
)
_FORM, _JOIN = "/gradio_api/upload", "/gradio_api/queue/join"
_WRITTEN = (_FORM, _JOIN, "/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/reset/")
_CALL_BYTES = 2**20  # of a body that is no upload
_SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME, _LAYERS = 255, 10_000  # characters of a file's name; names of layers
_FILES = 64  # so many of the largest files may lie in the folder


def upload_at(path: Any, folder: Path) -> Path | None:
    """The file that a browser names, if it is one that was uploaded: no other, no device and no pipe.

    Args:
        path: what the browser gave.
        folder: where uploaded files are.
    """
    try:
        file = Path(str(path)).resolve()
        return file if folder in file.parents and file.is_file() else None
    except (OSError, ValueError, RuntimeError):  # names too long, with null bytes, or links in a ring
        return None


class PageDoor:
    """Lets through what the page asks for, whole and within limits.

    Args:
        app: gradio's server.
        service: its limits are the page's.
        folder: where uploaded files are.
        events: numbers of what the page can ask to run.
    """

    def __init__(self, app: Any, service: Service, folder: Path, events: Collection[int]) -> None:
        self._app, self._service, self._folder, self._events = app, service, folder, events
        self._reading = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD"):
            wanted = _READ.fullmatch(path)
            file = wanted and wanted["file"]
            if wanted is None or (file is not None and upload_at(file, self._folder) is None):
                raise HTTPException(404)
            await self._app(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "POST" and path in _WRITTEN:
            await self._written(path, scope, receive, send)
        elif scope["type"] == "http":
            raise HTTPException(404)
        else:  # the page opens no web socket
            await send({"type": "websocket.close"})

    async def _written(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads a request's body before gradio does, which leaves half a file behind when one breaks off."""
        request = Request(scope, receive)
        _check_origin(request)
        if self._reading >= self._service.limits.queue_size:
            raise FullError
        self._reading += 1
        try:
            if path == _FORM:
                kind, body = await self._upload(request)
            else:
                kind, body = "application/json", await self._call(request, path == _JOIN)
            kept = [pair for pair in scope["headers"] if pair[0] not in _REPLACED]
            headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
            await self._app({**scope, "headers": [*kept, *headers]}, _replayed(body, receive), send)
        finally:
            self._reading -= 1

    async def _upload(self, request: Request) -> tuple[str, bytes]:
        """A form with one file and nothing else, made anew."""
        limits = self._service.limits
        upload = await read_upload(request, limits.max_bytes, "files")
        used = await asyncio.to_thread(_size, self._folder)
        if used + len(upload.content) > _FILES * limits.max_bytes:
            raise RequestError(
                503,
                f"the page's photographs may have {_FILES * limits.max_bytes:,} bytes together, and have {used:,}; "
                "come back when the older ones are removed, in 40 minutes at most",
            )
        return _form_of(upload)

    async def _call(self, request: Request, is_join: bool) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(
                415, f"the page sends application/json, got Content-Type: {kind!r:.80}; drop a photograph there"
            )
        body = await read_body(request, _CALL_BYTES)
        try:
            given = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestError(
                400, f"the page sends JSON, got a broken one; drop a photograph there: {error}"
            ) from error
        if not isinstance(given, dict):
            raise RequestError(422, "the page sends an object of JSON, got something else; drop a photograph there")
        return json.dumps(self._joined(given) if is_join else given).encode()

    def _joined(self, given: dict[str, Any]) -> dict[str, Any]:
        """What the page asks to run, made anew of what it needs."""
        event, session, data = given.get("fn_index"), given.get("session_hash"), given.get("data")
        trigger = given.get("trigger_id")
        if not _is_number(event) or event not in self._events:
            raise RequestError(422, f"fn_index must be one of the page's, {sorted(self._events)}, got {event!r:.80}")
        if not isinstance(session, str) or not _SESSION.fullmatch(session):
            raise RequestError(422, f"session_hash must be letters and digits, got {session!r:.80}")
        if not isinstance(data, list) or not 1 <= len(data) <= 2 or not all(map(_is_choice, data[1:])):
            raise RequestError(422, f"data must be a photograph and what the page offers to choose, got {data!r:.80}")
        return dict(
            data=[_described(data[0], self._folder), *data[1:]],
            fn_index=event,
            session_hash=session,
            trigger_id=trigger if _is_number(trigger) else None,
            event_data=None,
        )


_REPLACED = (b"content-type", b"content-length", b"transfer-encoding", b"content-encoding", b"expect")


def _described(photograph: Any, folder: Path) -> dict[str, Any] | None:
    if photograph is None:
        return None
    if not isinstance(photograph, dict) or not isinstance(photograph.get("path"), str):
        raise RequestError(422, f"a photograph must be null or {{'path': ...}}, got {photograph!r:.80}; upload one")
    name = photograph.get("orig_name")
    return dict(
        path=str(upload_at(photograph["path"], folder) or folder / "missing"),  # of which gradio makes a message
        orig_name=name[-_NAME:].encode(errors="replace").decode() if isinstance(name, str) else None,
        meta={"_type": "gradio.FileData"},
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_choice(value: Any) -> bool:
    """Names of layers, or a detector's threshold."""
    if isinstance(value, list):
        return len(value) <= _LAYERS and all(isinstance(name, str) for name in value)
    return value is None or (isinstance(value, int | float) and 0 <= value <= 1)


def _check_origin(request: Request) -> None:
    """Refuses what pages of other servers send, which browsers tell by headers that pages cannot change.

    Raises:
        RequestError: 403.
    """
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is None:
        is_foreign = origin is not None and urlsplit(origin).netloc.lower() != request.headers.get("host", "").lower()
    else:
        is_foreign = site not in ("same-origin", "none")
    if is_foreign:
        raise RequestError(403, f"only the page itself may send this, got Origin: {origin!r:.80}; use POST /predict")


def _form_of(upload: Upload) -> tuple[str, bytes]:
    edge = f"awconv-{secrets.token_hex(16)}"  # which is in no file
    name = re.sub(r'[\x00-\x1f\x7f"\\]', "_", upload.name)
    head = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return f"multipart/form-data; boundary={edge}", head.encode() + upload.content + f"\r\n--{edge}--\r\n".encode()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives a body that has been read, and then what else comes."""
    pieces: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return pieces.pop() if pieces else await receive()

    return again


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, some of which may go meanwhile."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size
        except OSError:
            continue
    return total
