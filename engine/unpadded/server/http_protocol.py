"""HTTP/1.1 by uvicorn and httptools, with a limit on how long a request's head may take to arrive.

uvicorn has none: a client that sends a header a minute would hold its connection for ever. Bodies have their own limit,
see `limits.read_body`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


def protocol(head_seconds: float) -> type[asyncio.Protocol]:
    """A protocol that closes connections whose first or next request head takes longer."""

    class Protocol(HttpToolsProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._head = self.loop.call_later(head_seconds, transport.close)

        def on_message_begin(self) -> None:
            self._head.cancel()
            self._head = self.loop.call_later(head_seconds, self.transport.close)
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._head.cancel()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head.cancel()
            super().connection_lost(exc)

    return Protocol
