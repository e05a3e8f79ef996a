"""A server that ends without losing a request."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from awconv.serve.service import Service

_ON_THE_WAY = 0.2  # seconds: in accepted connections, requests may still be on their way
_LONGEST = 20.0  # seconds that admitted requests may take
_OPEN = 2  # seconds that other connections, such as pages' that are open, stay open then


class Server(uvicorn.Server):
    """uvicorn's server. When it ends, it refuses new connections, answers what has come, and closes.

    It takes at most 25 seconds to end. Ctrl-C or SIGTERM end it; a second one ends the process at once,
    whatever it does, with status 130 or 143.

    Args:
        app: the application.
        service: what answers its requests.
        folder: what is removed when it ends at once, if anything.
    """

    def __init__(self, app: FastAPI, service: Service, folder: str | None = None) -> None:
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
        self._service, self._folder = service, folder

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes a signal. uvicorn would leave the end to a loop that may be stuck."""
        if self.should_exit:
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
            os.write(2, b"awconv serve: ended at once by a second signal\n")  # print may be what it has interrupted
            os._exit(128 + sig)
        super().handle_exit(sig, frame)

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
