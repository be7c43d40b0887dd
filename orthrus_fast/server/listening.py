"""uvicorn, set up for clients that nobody vouches for."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from orthrus_fast.server.access import Guard

HEAD_SECONDS = 30  # that a new connection may take until the head of its request is there


class ImpatientProtocol(HttpToolsProtocol):
    """Closes a connection that asks for nothing: each takes one of the process's open files."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._waiting = self.loop.call_later(HEAD_SECONDS, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._waiting.cancel()
        super().connection_lost(exc)

    def _close_if_idle(self) -> None:
        if self.cycle is None:  # there was no request
            self.transport.close()


def make_server(app: Guard, drain_seconds: int) -> uvicorn.Server:
    """A server that logs what fails, and at its end waits so long for what runs."""
    settings: dict[str, Any] = {"http": ImpatientProtocol, "ws": "none", "server_header": False}
    settings |= {"log_level": "warning", "access_log": False}
    config = uvicorn.Config(app, timeout_graceful_shutdown=drain_seconds, **settings)
    return uvicorn.Server(config)
