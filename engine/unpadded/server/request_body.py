"""Authentication and request-body limits."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import zlib
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers
from starlette.types import Receive

from unpadded.server.errors import HTTPError

GZIP_WBITS = 16 + zlib.MAX_WBITS  # selects gzip framing in zlib
GZIP_PIECE_BYTES = 65_536  # zlib copies the rest of a piece at the end of each member
MAX_GZIP_MEMBERS = 1024  # a member without contents takes 20 bytes and as much time as a small request


class ApiKeys:
    """API keys, stored and compared as digests, so that the time of a comparison reveals nothing about a key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, headers: Headers) -> None:
        """Raise HTTPError unless the request carries one of the keys, or there are none."""
        if not self._digests:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        received = hashlib.sha256(key.strip().encode("latin-1")).digest()  # the bytes as sent, in UTF-8
        matches = [hmac.compare_digest(received, digest) for digest in self._digests]  # all, for constant time
        if scheme.lower() != "bearer" or not any(matches):
            raise HTTPError("unauthorized", "the API key is missing or wrong; send 'Authorization: Bearer KEY'")


async def read_body(
    receive: Receive, headers: Headers, hold: Callable[[int], None], *, max_bytes: int, seconds: float
) -> bytes | None:
    """Return the body as received, or None if the client disconnected; `hold` is called with the size of each part."""
    # httptools has checked that it is a number below 2 ** 64; int() raises for thousands of leading zeros.
    if int(headers.get("content-length", "0").lstrip("0") or "0") > max_bytes:
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
                hold(len(parts[-1]))
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as error:
        late = f"the body did not arrive: {size} bytes in {seconds:g} s; send it faster"
        raise HTTPError("slow_body", late) from error


def decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Decode a body by its Content-Encoding, without ever producing more than max_bytes + 1 bytes."""
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip"):
        raise HTTPError("unsupported_encoding", f"the Content-Encoding is not supported: {encoding!r}; use gzip")
    plain, start, members = bytearray(), 0, 0
    while start < len(body) or not members:
        stream = zlib.decompressobj(GZIP_WBITS)
        members += 1
        while not stream.eof and start < len(body) and members <= MAX_GZIP_MEMBERS:
            piece = body[start : start + GZIP_PIECE_BYTES]
            try:
                plain += stream.decompress(piece, max_bytes + 1 - len(plain))
            except zlib.error as error:
                raise HTTPError("malformed", f"the body is not gzip: {error}; compress it again") from error
            if len(plain) > max_bytes:
                raise _too_large(max_bytes)
            start += len(piece) - len(stream.unused_data)
        if not stream.eof:
            message = f"the gzip body ends after {start} bytes or has over {MAX_GZIP_MEMBERS} members; send all, as one"
            raise HTTPError("malformed", message)
    return bytes(plain)


def _too_large(max_bytes: int) -> HTTPError:
    return HTTPError("too_large", f"the body is too large: more than {max_bytes} bytes; send fewer texts per request")
