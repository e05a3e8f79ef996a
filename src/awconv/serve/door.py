"""What each request passes first: the name that it calls the server by, and headers of answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers

from awconv.serve.service import Service

# The page needs inline scripts and styles. Nothing comes from, or goes to, another server.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "form-action 'self'; base-uri 'self'; object-src 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]
_REST = (5.0, 2**27)  # seconds and bytes for which the rest of a body is read that nobody wants

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Door:
    """Adds headers that keep a browser from other servers, and ends connections when the server does.

    A page of another server whose name leads to this machine (DNS rebinding) would be of the same origin as this one.
    What gives it away is the name in the header Host.

    A sender that still writes when the connection closes does not read the answer. So the rest of a body is read, for
    a while, before the answer to a request whose body was not wanted.

    Args:
        app: the application.
        service: tells when the server ends.
        hosts: names of this server; None if it may have any.
    """

    def __init__(self, app: Any, service: Service, hosts: Collection[str] | None) -> None:
        self._app, self._service, self._hosts = app, service, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        body = _Body(receive, headers)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                await body.discard_rest()
                given = [pair for pair in message.get("headers", []) if not pair[0].startswith(b"access-control-")]
                closing = [(b"connection", b"close")] if self._service.stopping else []
                message["headers"] = [*given, *_HEADERS, *closing]
            await send(message)

        app = self._app
        host = headers.get("host")
        if self._hosts is not None and host is not None and _without_port(host) not in self._hosts:
            app = JSONResponse({"error": self._misdirected(host)}, 421, {"Connection": "close"})
        await app(scope, body.receive, sending)

    def _misdirected(self, host: str) -> str:
        names = ", ".join(sorted(self._hosts or ()))
        return (
            f"this server listens to this machine alone, by the names {names}, got Host: {host!r:.80}; ask it by one "
            "of these, or start it with the --host that others know it by"
        )


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and (port.isdecimal() or not port) else host).lower()


class _Body:
    """A request's body.

    Args:
        receive: reads it.
        headers: of the request, which tell whether there is one.
    """

    def __init__(self, receive: Receive, headers: Headers) -> None:
        self._receive = receive
        self._ended = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        self._asks_first = headers.get("expect", "").lower() == "100-continue"

    async def receive(self) -> Message:
        self._asks_first = False  # who reads, says: continue
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._ended = True
        return message

    async def discard_rest(self) -> None:
        """Reads on for a while, unless the sender waits for being told to write."""
        if self._asks_first:
            return
        seconds, left = _REST

        async def discard() -> None:
            size = 0
            while not self._ended and size < left:
                size += len((await self.receive()).get("body", b""))

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(discard(), seconds)
