"""The image in a request's body, read in memory and within limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

FIELD = "file"
_ENVELOPE = 2**16  # bytes of a form around its file
_LONGEST, _IDLE = 60.0, 10.0  # seconds that a body may take, and that may pass without a byte of it
_RAW = ("application/octet-stream", "")  # beside image/...
_NAME = 255  # characters of a file's name
_HOW = (
    f"send an image as the body with Content-Type: image/jpeg (or image/png and so on), or a form with a file named "
    f"{FIELD!r}: curl -F {FIELD}=@photo.jpg"
)


@dataclass
class RequestError(Exception):
    """A request that cannot be answered.

    Attributes:
        status: of HTTP.
        message: what was expected, what came, how to mend it.
    """

    status: int
    message: str


@dataclass(frozen=True)
class Upload:
    """An image file.

    Attributes:
        content: its bytes.
        name: its name, if the sender gave one.
    """

    content: bytes
    name: str


class _InMemory(MultiPartParser):
    """Writes no file to the disk, however large, and notes whether the form ends."""

    spool_max_size = 2**62
    has_ended = False

    def __setattr__(self, name: str, value: Any) -> None:
        # Names are UTF-8 (else Latin-1), whatever alphabet the header names: some give halves of characters.
        super().__setattr__(name, "utf-8" if name == "_charset" else value)

    def on_end(self) -> None:
        self.has_ended = True


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Reads the body of a request that is no image.

    Raises:
        RequestError: 408 (too slow) or 413 (too large).
    """
    return (await _read(_raw(request, max_bytes), max_bytes)).content


async def read_upload(request: Request, max_bytes: int, field: str = FIELD) -> Upload:
    """Reads the image of a request, and never more than the limit.

    Args:
        request: its body is the image, or a form with one.
        max_bytes: of the image.
        field: name of the file in a form.

    Raises:
        RequestError: 400 (no or a damaged body), 408 (too slow), 413 (too large), 415 (something else) or 422 (a form
            without the file).
    """
    encoding = request.headers.get("content-encoding", "")
    if encoding.strip().lower() not in ("", "identity"):
        raise RequestError(
            415, f"the body must not be compressed, got Content-Encoding: {encoding!r:.80}; leave it out"
        )
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_form = kind == "multipart/form-data"
    if not (is_form or kind in _RAW or kind.startswith("image/")):
        raise RequestError(415, f"the body must be an image, got Content-Type: {kind!r:.80}; {_HOW}")
    limit = max_bytes + (_ENVELOPE if is_form else 0)
    upload = await _read(_form(request, limit, field) if is_form else _raw(request, limit), max_bytes)
    if len(upload.content) > max_bytes:
        raise RequestError(413, _too_large(max_bytes, f"{len(upload.content):,}"))
    if not upload.content:
        raise RequestError(400, f"the body must be an image, got none: 0 bytes; {_HOW}")
    return upload


async def _read(upload: Awaitable[Upload], max_bytes: int) -> Upload:
    """Waits for a body, but not for ever."""
    try:
        return await asyncio.wait_for(upload, _LONGEST)
    except asyncio.TimeoutError:
        raise RequestError(
            408,
            f"the body must arrive within {_LONGEST:g} seconds, and bytes of it every {_IDLE:g}, and did not; send a "
            "smaller image",
        ) from None
    except _TooLargeError as error:
        raise RequestError(413, _too_large(max_bytes, error.size)) from None


@dataclass
class _TooLargeError(Exception):
    size: str


def _too_large(max_bytes: int, size: str) -> str:
    return (
        f"the image may have {max_bytes:,} bytes, got {size}; shrink it, or start the server with a larger --max_bytes"
    )


async def _chunks(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body, refused before it is read if it says that it is too large, and as soon as it is."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise _TooLargeError(f"{int(length):,}")
    size = 0
    stream = request.stream()
    while (chunk := await asyncio.wait_for(anext(stream, None), _IDLE)) is not None:
        size += len(chunk)
        if size > limit:
            raise _TooLargeError(f"{size:,} or more")
        yield chunk


async def _raw(request: Request, limit: int) -> Upload:
    content = bytearray()
    async for chunk in _chunks(request, limit):
        content += chunk
    return Upload(bytes(content), "upload")


async def _form(request: Request, limit: int, field: str) -> Upload:
    parser = _InMemory(request.headers, _chunks(request, limit), max_files=1, max_fields=8)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise RequestError(400, f"the form must be whole and hold one file, got: {error.message}; {_HOW}") from error
    except (KeyError, UnicodeError) as error:  # of a form without a boundary, or one in no alphabet
        raise RequestError(400, f"the form's headers must name its boundary, and do not; {_HOW}") from error
    if not parser.has_ended:
        raise RequestError(400, f"the form must be whole and hold one file, got one without its end; {_HOW}")
    found = form.get(field)
    if isinstance(found, str):
        raise RequestError(422, f"the form's {field!r} must be a file, with a filename=, got a text; {_HOW}")
    if not isinstance(found, UploadFile):
        names = ", ".join(map(repr, form)) or "nothing"
        raise RequestError(422, f"the form must hold a file named {field!r}, got {names:.200}; {_HOW}")
    name = (found.filename or "").replace("\\", "/").rpartition("/")[2]
    return Upload(await found.read(), name[-_NAME:] or "upload")
