"""One exchange: key, limits, body, request type, work that ends when the client leaves, response, metrics, log line."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from unpadded.errors import WorkerError
from unpadded.server.errors import Interface, Problem, as_problem, body, status
from unpadded.server.request_body import Keys, decompress, read_body
from unpadded.server.responses import JSON, Response
from unpadded.server.service import Service, Usage
from unpadded.server.traces import Traces

logger = logging.getLogger("unpadded.server")

# What is decoded and encoded on the event loop, because handing it to a thread takes longer.
SMALL = 16_384  # bytes of a request
SMALL_TOKENS = 256  # of a response
QUOTED = 4096  # bytes of a request in the log, where it quotes them


@dataclass
class Exchange:
    """What a handler may need of a request besides its body, and where it writes its usage."""

    headers: Headers
    path_params: dict[str, Any]
    usage: Usage
    quoted: str | None = None  # the start of its body, set as it is decoded, where the log quotes requests

    @property
    def accept(self) -> str:
        """The media types that the client takes."""
        return self.headers.get("accept", "")


Handler = Callable[[Service, Any, Exchange], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A path of an interface and who answers it."""

    path: str
    method: str
    interface: Interface
    summary: str
    handler: Handler
    request: type[msgspec.Struct] | None = None
    open: bool = False  # answered without a key


class State:
    """What all exchanges of a server share; `draining` is set by the lifecycle on SIGTERM."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.keys = Keys(service.options.keys)
        self.traces = Traces(service.options.otlp_endpoint)
        self.active = 0
        self.draining = False


class Application:
    """An Endpoint as an ASGI application."""

    def __init__(self, endpoint: Endpoint, state: State) -> None:
        self.endpoint = endpoint
        self.state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.state.active += 1
        self.state.service.metrics.active.set(self.state.active)
        try:
            await self._exchange(scope, receive, send)
        finally:
            self.state.active -= 1
            self.state.service.metrics.active.set(self.state.active)

    async def _exchange(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.perf_counter()
        metrics = self.state.service.metrics
        exchange = Exchange(Headers(scope=scope), scope.get("path_params", {}), Usage())
        usage = exchange.usage
        work = asyncio.ensure_future(self._answer(exchange, receive))
        try:
            await asyncio.wait({work})
        finally:
            work.cancel()
        error = work.exception()
        serialize = 0.0
        if error is not None:
            code, payload, headers = self._explain(error)
        elif (response := work.result()) is None:
            metrics.disconnects.inc()
            return
        else:
            began = time.perf_counter()
            payload = await self._off_loop(response.encode, usage.tokens > SMALL_TOKENS)
            serialize = time.perf_counter() - began
            code = 200
            headers = {"content-type": response.media_type} | response.headers | self._usage_headers(usage, start)
        request_id = exchange.headers.get("x-request-id", "")[:64] or uuid.uuid4().hex
        await _send(send, code, payload, {"x-request-id": request_id} | headers)
        metrics.observe_request(self.endpoint.path, code, usage.timing, serialize, start)
        if not self.endpoint.open:
            fields = {
                "id": request_id,
                "path": self.endpoint.path,
                "status": code,
                "seconds": round(time.perf_counter() - start, 6),
                "texts": usage.texts,
                "tokens": usage.tokens,
                "truncated": usage.truncated,
            }
            quoted = {} if exchange.quoted is None else {"request": exchange.quoted}
            logger.info("request", extra={"fields": fields | quoted})
            timing = usage.timing
            stages = {"tokenize": timing.tokenize, "queue": timing.queue, "inference": timing.inference}
            self.state.traces.record(
                f"{self.endpoint.method} {self.endpoint.path}",
                exchange.headers,
                time.perf_counter() - start,
                fields | {f"{stage}_seconds": seconds for stage, seconds in stages.items()},
            )

    async def _answer(self, exchange: Exchange, receive: Receive) -> Response | None:
        """The response; None when the client left, whose work is then dropped."""
        endpoint, options = self.endpoint, self.state.service.options
        if self.state.draining and (not endpoint.open or endpoint.path == "/health"):
            raise Problem("draining", "the server is shutting down; send this elsewhere", retry_after=1)
        if not endpoint.open:
            self.state.keys.check(exchange.headers)
            if self.state.active > options.max_concurrent_requests:
                raise Problem(
                    "overloaded",
                    f"too many requests at once: {self.state.active}, at most {options.max_concurrent_requests} are "
                    "taken; try again later",
                )
        request = None
        if endpoint.request is not None:
            raw = await read_body(receive, exchange.headers, max_bytes=options.max_body, seconds=options.read_timeout)
            if raw is None:
                return None
            request = await self._off_loop(lambda: self._decode(raw, exchange), len(raw) > SMALL)
        work = asyncio.ensure_future(endpoint.handler(self.state.service, request, exchange))
        left = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({work, left}, timeout=options.deadline or None, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if left.done():
                return None
            raise Problem(
                "deadline", f"the deadline passed: {options.deadline:g} s; send fewer texts, or try again later"
            )
        finally:
            work.cancel()
            left.cancel()

    def _decode(self, raw: bytes, exchange: Exchange) -> msgspec.Struct:
        assert self.endpoint.request is not None, self.endpoint.path
        options, encoding = self.state.service.options, exchange.headers.get("content-encoding", "").lower()
        plain = decompress(raw, encoding, options.max_body)
        if options.log_requests:
            exchange.quoted = plain[:QUOTED].decode(errors="replace")
        try:
            return msgspec.json.decode(plain, type=self.endpoint.request)
        except msgspec.ValidationError as error:
            raise Problem("invalid", f"the request does not fit: {error}; see /openapi.json") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Problem("malformed", f"the body is not JSON: {error}; send a JSON object") from error

    async def _off_loop(self, function: Callable[[], Any], large: bool) -> Any:
        if not large:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self.state.service.batcher.readers, function)

    def _explain(self, error: BaseException) -> tuple[int, bytes, dict[str, str]]:
        problem = as_problem(error)
        if isinstance(error, WorkerError) and not self.state.service.pipeline.backend.ready_devices:
            problem.kind = "no_device"  # the fault is not these texts'
        if problem.kind == "internal":
            logger.error("a request raised", exc_info=error)
        elif problem.kind == "model_failed" and error.__cause__ is not None:
            logger.error("the model failed", exc_info=error.__cause__)
        self.state.service.metrics.errors.labels(problem.kind).inc()
        headers = {"content-type": JSON}
        if problem.kind in ("overloaded", "draining", "no_device"):
            headers["retry-after"] = str(problem.retry_after or self.state.service.retry_after())
        if problem.kind == "unauthorized":
            headers["www-authenticate"] = "Bearer"
        interface = self.endpoint.interface
        return status(problem, interface), orjson.dumps(body(problem, interface)), headers

    def _usage_headers(self, usage: Usage, start: float) -> dict[str, str]:
        """Those of text-embeddings-inference, times in milliseconds; and the count of texts that were cut."""
        if not usage.texts:
            return {}
        metrics, timing = self.state.service.metrics, usage.timing
        metrics.texts.inc(usage.texts)
        metrics.tokens.inc(usage.tokens)
        metrics.truncated.inc(usage.truncated)
        total = str(round((time.perf_counter() - start) * 1000))
        return {
            "x-compute-type": self.state.service.device,
            "x-compute-time": total,
            "x-compute-characters": str(usage.characters),
            "x-compute-tokens": str(usage.tokens),
            "x-total-time": total,
            "x-tokenization-time": str(round(timing.tokenize * 1000)),
            "x-queue-time": str(round(timing.queue * 1000)),
            "x-inference-time": str(round(timing.inference * 1000)),
            "x-truncated": str(usage.truncated),
        }


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(send: Send, code: int, payload: bytes, headers: dict[str, str]) -> None:
    headers |= {"content-length": str(len(payload))}
    raw = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": code, "headers": raw})
    await send({"type": "http.response.body", "body": payload})
