"""HTTP/1.1 by uvicorn and httptools, with limits for every client.

uvicorn parses heads of any size, keeps what a client does not read, waits without limit for the rest of a head or of a
discarded body, and drops the bodies of requests that offer an upgrade.
`request_body.read_body` limits the size and the time of bodies.
"""

import asyncio
import logging
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from unpadded.server.endpoint import ServerState
from unpadded.server.errors import HTTPError, api_of_path

logger = logging.getLogger("unpadded.server")

PIECE_BYTES = 4096  # parsed at a time, which bounds the number of pipelined requests that are parsed ahead
MAX_HEAD_BYTES = 65_536  # plus a piece; also between two parts of a body: sizes of chunks, extensions, trailers
MAX_HELD_BYTES = 65_536  # received before the previous response is sent; then reading pauses
LINGER_SECONDS = 2  # for the client to read an error before the connection is closed


class Protocol(HttpToolsProtocol):
    """One connection. `timeout_keep_alive_task` is the timer of whatever the client has to send next."""

    def __init__(self, state: ServerState, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._state = state
        self._options = state.service.options
        self._running: RequestResponseCycle | None = None  # set when a request starts
        self._held = bytearray()  # received and not parsed
        self._unparsed_bytes = 0  # parsed since the last head or part of a body; -1 after one
        self._ignores_input = False
        self._send_timer: asyncio.TimerHandle | None = None
        self.url = b""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` is called whenever a byte waits
        self._arm(self._options.read_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        # Of pipelined requests, uvicorn tells only the last one.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self._state.heads.discard(self)
        self._unset_keepalive_if_required()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what is received, also before, unless it has to wait; b"" when this may have changed."""
        self._held += data
        while self._held and not self._must_hold() and not self._ignores_input and not self.transport.is_closing():
            piece = bytes(self._held[:PIECE_BYTES])
            del self._held[:PIECE_BYTES]
            self._parse(piece)
        if self._ignores_input:
            self._held.clear()
        if len(self._held) > MAX_HELD_BYTES:
            self.flow.pause_reading()
        elif self.pipeline:
            self.flow.resume_reading()  # uvicorn pauses at a pipelined request and would not notice a disconnect

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timer = self.loop.call_later(self._options.send_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
        super().resume_writing()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._state.heads.add(self)
        self.scope["state"]["accepted"] = not self._state.draining
        if not self._must_hold():  # the timer would cut off the response to a request before
            self._arm(self._options.read_timeout)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self in self._state.heads:  # otherwise a trailer, which must not become a header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unparsed_bytes = -1
        self._state.heads.discard(self)
        hosts = sum(name == b"host" for name, _ in self.headers)
        if self.parser.get_method() == b"CONNECT":
            raise HTTPError("not_implemented", "the method is not supported: CONNECT; use GET or POST")
        if hosts > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            raise HTTPError("malformed", f"the request has {hosts} Host headers; send one")
        if not self.parser.should_upgrade():  # otherwise `_decline_upgrade` parses the head again
            self._unset_keepalive_if_required()
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = -1
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            self.cycle.more_body = False
            super().on_message_complete()
            if self.cycle.response_complete:
                self._arm(self.timeout_keep_alive)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body and not self.transport.is_closing():
            self._arm(self._options.read_timeout)  # for the rest of the body, which is discarded
        self.data_received(b"")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _must_hold(self) -> bool:
        """Return whether requests wait for their responses, so that what follows them is not parsed."""
        waits = self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body
        return waits or bool(self.pipeline)

    def _parse(self, piece: bytes) -> None:
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            self._held[:0] = piece[upgrade.args[0] :]
            self._decline_upgrade()
        except httptools.HttpParserError as error:
            cause = error.__context__
            if not isinstance(cause, HTTPError):
                cause = HTTPError("malformed", f"the request is not HTTP/1.1: {cause or error}; use an HTTP client")
            self._fail(cause)
        self._unparsed_bytes = 0 if self._unparsed_bytes < 0 else self._unparsed_bytes + len(piece)
        if self._unparsed_bytes > MAX_HEAD_BYTES and not self._ignores_input:
            message = f"the head of the request is too large: more than {MAX_HEAD_BYTES} bytes; send fewer headers"
            self._fail(HTTPError("head_too_large", message))

    def _decline_upgrade(self) -> None:
        """Parse the head again without Upgrade, with a new parser: httptools skips the body of an upgrade."""
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        lines += [b"%s: %s" % (name, value) for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self._parse(b"\r\n".join([*lines, b"", b""]))

    def _fail(self, error: HTTPError) -> None:
        """Respond to bytes that are not a request, after the responses to those before, and ignore what follows."""
        self._ignores_input = True
        self._state.heads.discard(self)
        if self._must_hold():
            self.cycle.keep_alive = False
            return
        if self.cycle is not None and self.cycle.more_body:  # the fault is in its body
            if self.cycle.response_started:
                return self.transport.close()
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        status, body = error.encode(api_of_path(self.url.decode("latin-1")))
        self._state.service.metrics.errors.labels(error.kind).inc()
        fields = {"client": self.client and self.client[0], "status": status, "error": str(error)}
        logger.info("invalid request", extra={"fields": fields})
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._arm(LINGER_SECONDS)  # a close with unread input is a reset, which discards the response at the client

    def _arm(self, seconds: float) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)
