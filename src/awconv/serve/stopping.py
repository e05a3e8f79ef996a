"""A server that ends without losing a request."""

from __future__ import annotations

import asyncio
import socket

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
