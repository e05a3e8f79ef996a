"""A server that ends without losing a request."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI

from awconv.serve.service import Service

_ON_THE_WAY = 0.2  # seconds: in accepted connections, requests may still be on their way
_LONGEST = 20.0  # seconds that admitted requests may take
_OPEN = 2  # seconds that other connections, such as pages' that are open, stay open then


class Server(uvicorn.Server):
    """uvicorn's server. When it ends, it refuses new connections, answers what has come, and closes.

    It takes at most 25 seconds to end. Ctrl-C or SIGTERM end it; a second Ctrl-C ends it at once.

    Args:
        app: the application.
        service: what answers its requests.
    """

    def __init__(self, app: FastAPI, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_OPEN,
            )
        )
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the server."""
        self._service.stopping = True
        for server in self.servers:
            server.close()
        await asyncio.sleep(_ON_THE_WAY)
        latest = asyncio.get_running_loop().time() + _LONGEST
        while self._service.batcher.busy and not self.force_exit and asyncio.get_running_loop().time() < latest:
            await asyncio.sleep(0.02)
        for end_streams in self._service.at_end:
            end_streams()
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A socket at a host's port. Who connects before the server has started waits for it.

    Args:
        host: a name or an address of this machine.
        port: 0 takes a free one.

    Raises:
        ValueError: there is no such host, or the port cannot be had.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be from 0 to 65535, got {port}; 0 takes a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host must be a name or an address of this machine, got {host!r}: {error}") from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after a server that has just ended
    try:
        bound.bind(address)
        bound.listen()
    except OSError as error:
        bound.close()
        raise ValueError(
            f"port {port} of {host} cannot be had: {error.strerror}; stop what uses it, or give another one, such as "
            f"--port={port + 1 if port < 65535 else 0} (0 takes a free one)"
        ) from error
    return bound


def address_of(bound: Any) -> str:
    """How a browser names a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
