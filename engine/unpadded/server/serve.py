"""Run a server: bind the port, warm up, listen, serve, and drain on SIGTERM."""

import asyncio
import contextlib
import logging
import math
import os
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn

from unpadded import Engine
from unpadded.errors import OptionError
from unpadded.server.app import make_app
from unpadded.server.endpoint import ServerState
from unpadded.server.http_protocol import Protocol
from unpadded.server.options import ServerOptions
from unpadded.server.service import Service

logger = logging.getLogger("unpadded.server")

POLL_SECONDS = 0.02
KEEP_ALIVE_SECONDS = 75
FORCED_EXIT_STATUS = 130


def reserve(options: ServerOptions) -> socket.socket:
    """Return a socket bound to the port. OptionError for a port, host or certificate that cannot be used.

    It listens when the model is ready: until then, connections fail at once instead of waiting.
    """
    if options.tls_cert is not None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(options.tls_cert, options.tls_key, password="")
        except OSError as error:  # includes ssl.SSLError
            files = f"{options.tls_cert} with {options.tls_key}, {error}"
            raise OptionError(
                f"the certificate cannot be read: {files}; pass PEM files without a passphrase"
            ) from error
    listener = socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET)
    if os.name == "posix":  # on Windows, this option lets another process take the port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with _naming_the_port(options):
        listener.bind((options.host, options.port))
    # Connections inherit it. Without it, the body of a response waits 40 ms for the client's delayed ACK of its head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def serve(engines: Sequence[Engine], options: ServerOptions, listener: socket.socket, started: float) -> None:
    """Serve until SIGTERM or SIGINT, then drain. `started` is time.perf_counter() when the process started."""
    state = ServerState(Service(engines, options))
    logger.info("warming up", extra={"fields": {"device": state.service.device_type}})
    state.service.warm_up()
    config = uvicorn.Config(
        make_app(state),
        http=cast(Any, partial(Protocol, state)),
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
    )
    _Server(config, state, started).run([listener])
    state.service.batcher.close()
    logger.info("stopped")


@contextlib.contextmanager
def _naming_the_port(options: ServerOptions) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"cannot listen on {options.host} port {options.port}: {error}; choose another --host or --port"
        raise OptionError(message) from error


class _Server(uvicorn.Server):
    """A uvicorn server that answers while it drains, and then exits with 0 instead of the signal's status."""

    def __init__(self, config: uvicorn.Config, state: ServerState, started: float) -> None:
        super().__init__(config)
        self._state = state
        self._started = started

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(FORCED_EXIT_STATUS)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert sockets is not None, "uvicorn would bind the port again"
        service, options = self._state.service, self._state.service.options
        with _naming_the_port(options):  # another process may listen since `reserve`, which uvloop ignores
            sockets[0].listen(self.config.backlog)
        await super().startup(sockets)
        host, port = sockets[0].getsockname()[:2]
        scheme = "http" if options.tls_cert is None else "https"
        url, seconds = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}", time.perf_counter() - self._started
        fields = {
            "models": list(service.names),
            "keys": len(options.api_keys),
            "seconds": round(seconds, 3),
            "url": url,
        }
        logger.info("ready", extra={"fields": fields})  # from here on, SIGTERM drains

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        state = self._state
        state.draining = True  # /health answers 503, and requests are rejected
        deadline = time.perf_counter() + state.service.options.grace
        logger.info("draining", extra={"fields": {"active": state.active}})
        while (state.active or state.heads) and time.perf_counter() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        if state.active:
            logger.warning("the grace period is over: %d requests are aborted", state.active)
        # Closed connections may have unsent bytes.
        self.config.timeout_graceful_shutdown = max(1, math.ceil(deadline - time.perf_counter()))
        await super().shutdown(sockets)
