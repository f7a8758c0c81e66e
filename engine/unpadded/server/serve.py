"""Run a server: listen, warm up, serve, and drain on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator

import uvicorn

from unpadded import Engine
from unpadded.errors import OptionError
from unpadded.server.app import make_app
from unpadded.server.endpoint import ServerState
from unpadded.server.http_protocol import make_protocol
from unpadded.server.logs import configure_logging
from unpadded.server.options import ServerOptions
from unpadded.server.service import Service

logger = logging.getLogger("unpadded.server")

POLL_SECONDS = 0.02
KEEP_ALIVE_SECONDS = 75
FORCED_EXIT_STATUS = 130


def serve(engine: Engine, options: ServerOptions, started: float) -> None:
    """Serve until SIGTERM or SIGINT, then drain. `started` is time.perf_counter() when the process started."""
    configure_logging()
    listener = _listen(options)
    state = ServerState(Service(engine, options))
    state.service.warm_up()
    config = uvicorn.Config(
        make_app(state),
        http=make_protocol(options.read_timeout),
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=1,
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
    )
    try:
        config.load()
    except OSError as error:  # includes ssl.SSLError
        raise OptionError(
            f"the certificate cannot be read: {options.tls_cert} with {options.tls_key}, {error}; pass PEM files"
        ) from error
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    fields = {
        "url": _url(listener, options),
        "models": list(state.service.model_names),
        "keys": len(options.api_keys),
        "seconds": round(time.perf_counter() - started, 3),
    }
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_run(_Server(config), listener, state, fields))
    state.service.batcher.close()
    logger.info("stopped")


def _listen(options: ServerOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as error:
        raise OptionError(
            f"cannot listen on {options.host} port {options.port}: {error}; choose another --host or --port"
        ) from error
    # Connections inherit it. Without it, the body of a response waits 40 ms for the client's delayed ACK of its head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _url(listener: socket.socket, options: ServerOptions) -> str:
    host, port = listener.getsockname()[:2]
    scheme = "http" if options.tls_cert is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals to `_run`: uvicorn would exit with the signal's status instead of 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _run(server: _Server, listener: socket.socket, state: ServerState, ready: dict[str, object]) -> None:
    """Serve until a signal, then drain. `ready`: the fields of the log line "ready"."""
    loop = asyncio.get_running_loop()
    stop_requested = asyncio.Event()

    def handle_signal() -> None:
        if stop_requested.is_set():
            os._exit(FORCED_EXIT_STATUS)
        stop_requested.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle_signal)
    logger.info("ready", extra={"fields": ready})  # after the handlers, so that SIGTERM drains from here on
    serving = asyncio.ensure_future(server.serve([listener]))
    stopping = asyncio.ensure_future(stop_requested.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    state.draining = True  # /health answers 503, and requests are rejected
    deadline = time.perf_counter() + state.service.options.grace
    logger.info("draining", extra={"fields": {"active": state.active}})
    while state.active and time.perf_counter() < deadline:
        await asyncio.sleep(POLL_SECONDS)
    if state.active:
        logger.warning("the grace period is over: %d requests are aborted", state.active)
    server.should_exit = True
    await serving
    stopping.cancel()
