"""HTTP/1.1 by uvicorn and httptools, with a timeout for the head of a request.

Without it, a client that sends one header per minute would hold its connection forever: uvicorn has no such timeout.
`request_body.read_body` limits the time for bodies.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


def make_protocol(head_seconds: float) -> type[asyncio.Protocol]:
    """Return a protocol that closes a connection when the head of a request takes longer than head_seconds."""

    class Protocol(HttpToolsProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._head_timer = self.loop.call_later(head_seconds, transport.close)

        def on_message_begin(self) -> None:
            self._head_timer.cancel()
            self._head_timer = self.loop.call_later(head_seconds, self.transport.close)
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._head_timer.cancel()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_timer.cancel()
            super().connection_lost(exc)

    return Protocol
