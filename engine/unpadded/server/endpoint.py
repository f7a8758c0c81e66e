"""One request from its first byte to its log line.

`EndpointApp` receives it, `_handle` checks its key and the server's limits, `_decode` parses its body, the endpoint's
handler computes the response, `_encode` or `_error_reply` makes bytes of it, and `_record` counts and logs it.
"""

import asyncio
import hashlib
import hmac
import logging
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response as Reply
from starlette.types import Receive, Scope, Send

from unpadded.errors import WorkerError
from unpadded.server.api.fields import Request as ApiRequest
from unpadded.server.errors import Api, HTTPError, check_maximum, to_http_error
from unpadded.server.metrics import Usage
from unpadded.server.request_body import decode_request, decompress, read_body
from unpadded.server.responses import JSON, Response
from unpadded.server.service import ServedModel, Service

logger = logging.getLogger("unpadded.server")

# Up to these sizes, bodies are decoded and encoded on the event loop: passing them to a thread would take longer.
INLINE_REQUEST_BYTES = 16_384
INLINE_RESPONSE_TOKENS = 256
MAX_BODIES = 16  # bodies of the maximum size that all requests together may hold, before or after decompression
BODY_EXCERPT_BYTES = 4096  # of each body in the log, with --log-requests
SEND_BYTES = 1 << 20  # of a body at a time; --send-timeout is the time for so many


class RequestContext(Request):
    """A request, its model, and the usage that its handler counts."""

    def __init__(self, scope: Scope, receive: Receive, model: ServedModel) -> None:
        super().__init__(scope, receive)
        self.model = model  # set again when the body is decoded, as is the next
        self.ignored_fields: list[str] = []
        self.usage = Usage()
        self.started = time.perf_counter()
        self.body_excerpt: str | None = None  # set when the body is decoded, with --log-requests
        self.held_bytes = 0  # of its body, in all forms; `ServerState.hold` adds to it
        self.request_id = self.headers.get("x-request-id", "")[:64] or uuid.uuid4().hex

    async def wait_for_disconnect(self) -> None:
        """Wait until the client disconnects, after its body is read."""
        while (await self.receive())["type"] != "http.disconnect":
            pass


@dataclass(frozen=True)
class Endpoint:
    """A path of an API and its handler: POST if it has a request type, otherwise GET."""

    api: Api
    path: str
    summary: str
    handler: Callable[[ServedModel, Any, RequestContext], Awaitable[Response]]
    request_type: type[ApiRequest] | None = None
    head: str = "vector"  # that the model needs, as in `Service.find`
    public: bool = False  # needs no API key, and is neither limited nor logged

    @property
    def method(self) -> str:
        return "GET" if self.request_type is None else "POST"


class ServerState:
    """The state that all requests share. `draining` is set on SIGTERM."""

    def __init__(self, service: Service) -> None:
        self.service = service
        # Digests, so that the time of a comparison reveals nothing about a key.
        self.key_digests = [hashlib.sha256(key.encode()).digest() for key in service.options.api_keys]
        self.active = 0  # requests in progress, until their responses are sent
        self.heads: set[object] = set()  # connections that have sent a part of a request's head
        self.held_bytes = 0  # bodies of these requests and of their responses
        self.draining = False
        # One thread, because a body of many empty lists takes 20 times its size until it is rejected.
        self.decoder = ThreadPoolExecutor(1, "unpadded-decode")
        self._lock = threading.Lock()
        service.metrics.watch("active_requests", "requests in progress", lambda: self.active)
        service.metrics.watch("body_bytes", "bodies of the requests in progress", lambda: self.held_bytes)

    def hold(self, context: RequestContext, count: int) -> None:
        """Count bytes of a request's or response's body until that is sent; 429 if all of them get too large."""
        limit = MAX_BODIES * self.service.options.max_body
        with self._lock:
            total, own = self.held_bytes + count, context.held_bytes + count
            if own > INLINE_REQUEST_BYTES and total > own:
                what = "the bodies in progress are too large"
                check_maximum("overloaded", what, total, limit, "bytes", "try again later")
            self.held_bytes, context.held_bytes = total, own


class EndpointApp:
    """The ASGI application of one endpoint."""

    def __init__(self, endpoint: Endpoint, state: ServerState) -> None:
        self.endpoint = endpoint
        self.state = state
        self.service = state.service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = RequestContext(scope, receive, self.service.find(None))
        self.state.active += 1
        try:
            [result] = await asyncio.gather(self._handle(context), return_exceptions=True)
            if isinstance(result, BaseException) and not isinstance(result, ClientDisconnect):
                result = self._error_reply(result)
            if isinstance(result, Reply) and await self._send(context, result, send):
                self._record(context, result)
            else:
                self.service.metrics.disconnects.inc()
        finally:
            self.state.active -= 1
            self.state.hold(context, -context.held_bytes)

    async def _handle(self, context: RequestContext) -> Reply:
        self._check_access(context)
        request, type_ = None, self.endpoint.request_type
        if type_ is not None:
            options, hold = self.service.options, partial(self.state.hold, context)
            body = await read_body(context, hold, max_bytes=options.max_body, seconds=options.read_timeout)
            if len(body) <= INLINE_REQUEST_BYTES and "content-encoding" not in context.headers:
                request = self._decode(body, type_, context)
            else:
                loop = asyncio.get_running_loop()
                request = await loop.run_in_executor(self.state.decoder, self._decode, body, type_, context)
        return await self._encode(await self._run_handler(request, context), context)

    def _check_access(self, context: RequestContext) -> None:
        accepted = context.scope.get("state", {}).get("accepted")  # set by `Protocol` if it began before SIGTERM
        if self.state.draining and not accepted and self.endpoint.path != "/metrics":
            raise HTTPError("draining", "the server is shutting down; use another")
        if self.endpoint.public:
            return
        scheme, _, key = context.headers.get("authorization", "").partition(" ")
        received = hashlib.sha256(key.strip().encode("latin-1")).digest()  # the bytes as sent, in UTF-8
        matches = [hmac.compare_digest(received, digest) for digest in self.state.key_digests]  # all, for constant time
        if matches and (scheme.lower() != "bearer" or not any(matches)):
            raise HTTPError("unauthorized", "the API key is missing or wrong; send 'Authorization: Bearer KEY'")
        active, limit = self.state.active, self.service.options.max_concurrent_requests
        check_maximum("overloaded", "the server is busy", active, limit, "requests", "try again later")

    def _decode(self, body: bytes, type_: type[ApiRequest], context: RequestContext) -> ApiRequest:
        options, encoding = self.service.options, context.headers.get("content-encoding", "").strip().lower()
        plain = decompress(body, encoding, options.max_body)
        if plain is not body:
            self.state.hold(context, len(plain))
        if options.log_requests:
            context.body_excerpt = plain[:BODY_EXCERPT_BYTES].decode(errors="replace")
        request, context.model, context.ignored_fields = decode_request(plain, type_, self.service, self.endpoint.head)
        return request

    async def _run_handler(self, request: ApiRequest | None, context: RequestContext) -> Response:
        """Run the handler, and cancel it at the deadline or when the client disconnects."""
        deadline = self.service.options.deadline
        work = asyncio.ensure_future(self.endpoint.handler(context.model, request, context))
        disconnect = asyncio.ensure_future(context.wait_for_disconnect())
        try:
            await asyncio.wait({work, disconnect}, timeout=deadline or None, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if disconnect.done():
                raise ClientDisconnect
            raise HTTPError("deadline", f"the deadline passed: {deadline:g} s; send fewer texts, or try again later")
        finally:
            work.cancel()
            disconnect.cancel()

    async def _encode(self, response: Response, context: RequestContext) -> Reply:
        start = time.perf_counter()
        large = context.usage.tokens > INLINE_RESPONSE_TOKENS
        body = await asyncio.to_thread(response.encode) if large else response.encode()
        context.usage.encode = time.perf_counter() - start
        self.state.hold(context, len(body))
        headers = response.headers | self._usage_headers(context)
        if context.ignored_fields:
            headers["x-ignored-fields"] = ", ".join(context.ignored_fields)
        return Reply(body, 200, headers, response.media_type)

    def _usage_headers(self, context: RequestContext) -> dict[str, str]:
        """Return the headers of text-embeddings-inference, times in milliseconds, and the number of truncated texts."""
        if not (usage := context.usage).texts:
            return {}
        total = time.perf_counter() - context.started
        times = {"compute": total, "total": total, "queue": usage.queue, "inference": usage.inference}
        times["tokenization"] = usage.tokenize
        counts = {"compute-characters": usage.characters, "compute-tokens": usage.tokens, "truncated": usage.truncated}
        headers = {f"x-{name}-time": str(round(seconds * 1000)) for name, seconds in times.items()}
        headers |= {f"x-{name}": str(count) for name, count in counts.items()}
        return headers | {"x-compute-type": self.service.device_type}

    def _error_reply(self, exception: BaseException) -> Reply:
        error = to_http_error(exception)
        if isinstance(exception, WorkerError) and not self.service.ready_devices:
            error.kind = "no_device"  # the worker processes failed, not these texts
        if error.kind == "internal" or (error.kind == "model_failed" and exception.__cause__ is not None):
            logger.error("a request failed", exc_info=exception)
        self.service.metrics.errors.labels(error.kind).inc()
        headers = {"www-authenticate": "Bearer"} if error.kind == "unauthorized" else {}
        if error.kind in ("overloaded", "draining", "no_device"):
            seconds = 1 if error.kind == "draining" else self.service.estimate_queue_seconds()
            headers["retry-after"] = str(seconds)
        status, body = error.encode(self.endpoint.api)
        return Reply(body, status, headers, JSON)

    def _record(self, context: RequestContext, reply: Reply) -> None:
        """Update the metrics and write the log line."""
        path, usage, seconds = self.endpoint.path, context.usage, time.perf_counter() - context.started
        self.service.metrics.observe_request(path, reply.status_code, context.model.name, usage, seconds)
        if self.endpoint.public:
            return
        fields: dict[str, Any] = {"id": context.request_id, "client": context.client and context.client.host}
        fields |= {"method": context.method, "path": path, "model": context.model.name, "status": reply.status_code}
        fields |= {"seconds": round(seconds, 6), "texts": usage.texts, "tokens": usage.tokens}
        fields |= {"truncated": usage.truncated}
        if context.body_excerpt is not None:
            fields["request"] = context.body_excerpt
        logger.info("request", extra={"fields": fields})

    async def _send(self, context: RequestContext, reply: Reply, send: Send) -> bool:
        """Send a reply, and return whether the client read all of it."""
        reply.headers["x-request-id"] = context.request_id
        # A client that still waits for "100 Continue" may or may not send its body after an error.
        if self.state.draining or (reply.status_code >= 400 and "expect" in context.headers):
            reply.headers["connection"] = "close"
        await send({"type": "http.response.start", "status": reply.status_code, "headers": reply.raw_headers})
        # `send` waits until the piece before has left the process, see `Protocol`; the last piece is empty.
        for start in range(0, len(reply.body) + SEND_BYTES, SEND_BYTES):
            piece = reply.body[start : start + SEND_BYTES]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if len(reply.body) > SEND_BYTES and await context.is_disconnected():
            return False
        await send({"type": "http.response.body"})
        return True
