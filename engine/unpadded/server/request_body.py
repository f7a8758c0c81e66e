"""Request bodies: limits of their size and time, and decompression."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable

from starlette.requests import Request

from unpadded.server.errors import HTTPError

GZIP_WBITS = 16 + zlib.MAX_WBITS  # selects gzip framing in zlib
MAX_GZIP_MEMBERS = 64  # zlib copies the rest of the body at the end of each


async def read_body(request: Request, hold: Callable[[int], None], *, max_bytes: int, seconds: float) -> bytes:
    """Return the body as received; `hold` is called with the size of each part. ClientDisconnect if it is not sent."""
    # httptools has checked that it is a number below 2 ** 64; int() raises for thousands of leading zeros.
    if int(request.headers.get("content-length", "0").lstrip("0") or "0") > max_bytes:
        raise _too_large(max_bytes)
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                hold(len(part))
                parts.append(part)
    except TimeoutError as error:
        late = f"the body did not arrive: {size} bytes in {seconds:g} s; send it faster"
        raise HTTPError("slow_body", late) from error
    return b"".join(parts)


def decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Decode a body by its Content-Encoding, without ever producing more than max_bytes + 1 bytes."""
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip"):
        raise HTTPError("unsupported_encoding", f"the Content-Encoding is not supported: {encoding!r}; use gzip")
    plain = bytearray()
    for _ in range(MAX_GZIP_MEMBERS):
        stream = zlib.decompressobj(GZIP_WBITS)
        try:
            plain += stream.decompress(body, max_bytes + 1 - len(plain))
        except zlib.error as error:
            raise HTTPError("malformed", f"the body is not gzip: {error}; compress it again") from error
        if len(plain) > max_bytes:
            raise _too_large(max_bytes)
        if not stream.eof:
            raise HTTPError("malformed", "the gzip body has no end; send all of it")
        body = stream.unused_data
        if not body:
            return bytes(plain)
    raise HTTPError("malformed", f"the gzip body has more than {MAX_GZIP_MEMBERS} members; send one")


def _too_large(max_bytes: int) -> HTTPError:
    return HTTPError("too_large", f"the body is too large: more than {max_bytes} bytes; send fewer texts per request")
