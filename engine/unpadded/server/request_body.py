"""What is asked of a request before it is understood: a key, a body that arrives in time and is not too large."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import zlib
from collections.abc import Iterable

import zstandard
from starlette.datastructures import Headers
from starlette.types import Receive

from unpadded.server.errors import Problem

GZIP = 16 + zlib.MAX_WBITS  # zlib's name for gzip framing


class Keys:
    """API keys, kept and compared as digests: the time of a comparison tells nothing about a key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, headers: Headers) -> None:
        """Raise unless there are no keys or the request bears one."""
        if not self._digests:
            return
        given = hashlib.sha256(headers.get("authorization", "").removeprefix("Bearer ").encode()).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]  # all of them, whichever matches
        if not any(matches):
            raise Problem("unauthorized", "the API key is missing or wrong; send 'Authorization: Bearer KEY'")


async def read_body(receive: Receive, headers: Headers, *, max_bytes: int, seconds: float) -> bytes | None:
    """The body as it came, or None from a client that left."""
    announced = headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
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
        raise Problem(
            "slow_body",
            f"the body did not arrive: {size} bytes in {seconds:g} s; send it faster or in pieces",
        ) from error


def decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Undo a request's Content-Encoding; never produces more than max_bytes."""
    if encoding in ("", "identity"):
        return body
    try:
        if encoding == "gzip":
            stream = zlib.decompressobj(GZIP)
            plain = stream.decompress(body, max_bytes + 1)
            complete = stream.eof
        elif encoding == "zstd":
            zstd = zstandard.ZstdDecompressor(max_window_size=max_bytes).decompressobj()
            plain, complete = _bounded(zstd, body, max_bytes), zstd.eof
        else:
            raise Problem("unsupported_encoding", f"Content-Encoding is unknown: {encoding!r}; use gzip or zstd")
    except (zlib.error, zstandard.ZstdError) as error:
        raise Problem("malformed", f"the body is not {encoding}: {error}; compress it again") from error
    if len(plain) > max_bytes:
        raise _too_large(max_bytes)
    if not complete:
        raise Problem("malformed", f"the {encoding} body ends early: after {len(body)} bytes; send all of it")
    return plain


def _bounded(zstd: zstandard.ZstdDecompressionObj, body: bytes, max_bytes: int) -> bytes:
    """A slice of the body at a time: a slice of 1 KiB gives at most some 16 MiB, zstd's largest ratio."""
    plain = bytearray()
    for start in range(0, len(body), 1024):
        plain += zstd.decompress(body[start : start + 1024])
        if len(plain) > max_bytes or zstd.eof:
            break
    return bytes(plain)


def _too_large(max_bytes: int) -> Problem:
    return Problem("too_large", f"the body is too large: more than {max_bytes} bytes; send fewer texts at once")
