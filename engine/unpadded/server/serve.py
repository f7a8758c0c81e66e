"""From a loaded engine to exit: warm up, listen, serve, and on SIGTERM drain."""

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
from unpadded.server import logs
from unpadded.server.app import make_app
from unpadded.server.endpoint import State
from unpadded.server.http_protocol import protocol
from unpadded.server.options import ServerOptions
from unpadded.server.service import Service

logger = logging.getLogger("unpadded.server")

POLL_SECONDS = 0.02
KEEP_ALIVE = 75  # seconds an idle connection is kept
EXIT_AT_ONCE = 130


def serve(engine: Engine, options: ServerOptions, started: float) -> None:
    """Serve until SIGTERM or SIGINT, then drain. `started`: time.perf_counter() when the process began its work."""
    logs.set_up()
    listening = _listen(options)
    state = State(Service(engine, options))
    state.service.warm_up()
    config = uvicorn.Config(
        make_app(state),
        http=protocol(options.read_timeout),
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=1,
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise OptionError(
            f"the certificate cannot be read: {options.tls_cert} with {options.tls_key}, {error}; give PEM files"
        ) from error
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    host, port = listening.getsockname()[:2]
    scheme = "http" if options.tls_cert is None else "https"
    fields = {
        "url": f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}",
        "models": list(state.service.names),
        "keys": len(options.keys),
        "seconds": round(time.perf_counter() - started, 3),
    }
    logger.info("ready", extra={"fields": fields})
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_run(_Server(config), listening, state))
    state.service.batcher.close()
    state.traces.close()
    logger.info("stopped")


def _listen(options: ServerOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listening = socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as error:
        raise OptionError(
            f"cannot listen on {options.host} port {options.port}: {error}; choose another --host or --port"
        ) from error
    # Connections inherit it. Without it the body of an answer waits for the client's delayed ACK of its head: 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


class _Server(uvicorn.Server):
    """Signals are ours: uvicorn's handling ends the process with the signal instead of 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _run(server: _Server, listening: socket.socket, state: State) -> None:
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()

    def stop() -> None:
        if asked.is_set():
            os._exit(EXIT_AT_ONCE)
        asked.set()

    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop)
    serving = asyncio.ensure_future(server.serve([listening]))
    stopping = asyncio.ensure_future(asked.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    state.draining = True  # /health says 503, and new work is refused
    deadline = time.perf_counter() + state.service.options.grace
    logger.info("draining", extra={"fields": {"active": state.active}})
    while state.active and time.perf_counter() < deadline:
        await asyncio.sleep(POLL_SECONDS)
    if state.active:
        logger.warning("the grace period is over: %d requests are cut off", state.active)
    server.should_exit = True
    await serving
    stopping.cancel()
