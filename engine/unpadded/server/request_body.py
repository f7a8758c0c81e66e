"""Authentication and request-body limits."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import zlib
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import Receive

from unpadded.server.errors import HTTPError

GZIP_WBITS = 16 + zlib.MAX_WBITS  # selects gzip framing in zlib


class ApiKeys:
    """API keys, stored and compared as digests, so that the time of a comparison reveals nothing about a key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, headers: Headers) -> None:
        """Raise HTTPError unless the request carries one of the keys, or there are none."""
        if not self._digests:
            return
        received = hashlib.sha256(headers.get("authorization", "").removeprefix("Bearer ").encode()).digest()
        matches = [hmac.compare_digest(received, digest) for digest in self._digests]  # all, for constant time
        if not any(matches):
            raise HTTPError("unauthorized", "the API key is missing or wrong; send 'Authorization: Bearer KEY'")


async def read_body(receive: Receive, headers: Headers, *, max_bytes: int, seconds: float) -> bytes | None:
    """Return the body as received, or None if the client disconnected."""
    content_length = headers.get("content-length", "0")
    if content_length.isdecimal() and int(content_length) > max_bytes:
        raise _too_large(max_bytes)
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > max_bytes:
                    raise _too_large(max_bytes)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as error:
        raise HTTPError(
            "slow_body",
            f"the body did not arrive: {size} bytes in {seconds:g} s; send it faster",
        ) from error


def decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Decode a body by its Content-Encoding, without ever producing more than max_bytes + 1 bytes."""
    if encoding in ("", "identity"):
        return body
    if encoding != "gzip":
        raise HTTPError("unsupported_encoding", f"the Content-Encoding is not supported: {encoding!r}; use gzip")
    stream = zlib.decompressobj(GZIP_WBITS)
    try:
        plain = stream.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise HTTPError("malformed", f"the body is not gzip: {error}; compress it again") from error
    if len(plain) > max_bytes:
        raise _too_large(max_bytes)
    if not stream.eof:
        raise HTTPError("malformed", f"the gzip body is incomplete after {len(body)} bytes; send all of it")
    return plain


def _too_large(max_bytes: int) -> HTTPError:
    return HTTPError("too_large", f"the body is too large: more than {max_bytes} bytes; send fewer texts per request")
