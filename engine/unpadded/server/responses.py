"""Responses as bytes, and how they are sent. Vectors never become Python floats: orjson and base64 read numpy rows."""

from __future__ import annotations

import asyncio
import base64
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from starlette.types import Receive, Send

from unpadded.server.metrics import Usage

JSON = "application/json"
HTML = "text/html"
PAGES = Path(__file__).parent / "pages"
OCTET_STREAM = "application/octet-stream"
SEND_BYTES = 1 << 20  # of a body at a time; --send-timeout is the time for so many
# orjson holds the interpreter's lock for about 2 ms for this many floats; other threads run between its calls.
FLOATS_PER_CALL = 1 << 17


@dataclass(frozen=True)
class Response:
    """A successful response. `encode` returns its body and may run in another thread."""

    encode: Callable[[], bytes]
    media_type: str = JSON
    headers: dict[str, str] = field(default_factory=dict)


def json_response(value: Any) -> Response:
    return Response(lambda: orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))


def negotiate(accept: str, *offers: str) -> str:
    """Return the media type that an Accept header prefers, by weight and then by order; without preference the first.

    RFC 9110, 12.5.1: of the ranges that include a type, the most specific one has its weight.
    """

    def rank(offer: str) -> tuple[float, int]:
        best = (-1, 0.0, -len(accept))  # specificity, weight, and position from the end
        for position, item in enumerate(accept.lower().split(",")):
            media_range, _, parameters = item.replace(" ", "").partition(";")
            ranges = ("*/*", offer.partition("/")[0] + "/*", offer)
            if media_range in ranges:
                weight = re.search(r"(?:^|;)q=([01](?:\.\d*)?)(?:;|$)", parameters)
                best = max(best, (ranges.index(media_range), float(weight[1]) if weight else 1.0, -position))
        return best[1:] if best[1] else (0.0, -len(accept))

    return max(offers, key=rank)


def home_page(accept: str) -> Response | None:
    """Return the page about the server, if the client is a browser."""
    return html_response("home.html") if negotiate(accept, "text/plain", HTML) == HTML else None


@functools.cache
def html_response(page: str) -> Response:
    """Return a page of the folder `pages` with its style."""
    style = (PAGES / "style.css").read_text()
    html = (PAGES / page).read_text().replace("/*style*/", style).encode()
    return Response(lambda: html, f"{HTML}; charset=utf-8")


def binary_response(vectors: np.ndarray, accept: str) -> Response | None:
    """Return little-endian fp32 rows, with their shape in a header, if the client accepts an octet stream."""
    if negotiate(accept, JSON, OCTET_STREAM) != OCTET_STREAM:
        return None
    headers = {"x-shape": ",".join(map(str, vectors.shape)), "x-dtype": "float32"}
    return Response(lambda: vectors.astype("<f4").tobytes(), OCTET_STREAM, headers)


def rows_response(rows: np.ndarray | list[np.ndarray], before: bytes = b"[", after: bytes = b"]") -> Response:
    """Return the JSON text `before`, the rows (vectors or matrices) as comma-separated arrays, and `after`."""
    return Response(lambda: b"".join([before, b",".join(_json_chunks(rows, lambda index, row: row)), after]))


def openai_response(vectors: np.ndarray, encoding_format: str, model: str, usage: Usage) -> Response:
    """Return a list of embedding objects with usage."""

    def embedding_object(index: int, row: np.ndarray) -> dict[str, Any]:
        embedding = row if encoding_format == "float" else base64.b64encode(row.tobytes()).decode("ascii")
        return {"object": "embedding", "index": index, "embedding": embedding}

    rest = orjson.dumps({"model": model, "usage": usage.as_json()}).removeprefix(b"{")
    before = b'{"object":"list","data":['
    rows = vectors.astype("<f4", copy=False)
    return Response(lambda: b"".join([before, b",".join(_json_chunks(rows, embedding_object)), b"],", rest]))


def _json_chunks(rows: np.ndarray | list[np.ndarray], to_value: Callable[[int, np.ndarray], Any]) -> Iterator[bytes]:
    """Yield the JSON of consecutive rows, without the enclosing brackets, FLOATS_PER_CALL at a time."""
    start = 0
    while start < len(rows):
        end = start + max(1, FLOATS_PER_CALL // max(1, rows[start].size))
        values = [to_value(index, rows[index]) for index in range(start, min(end, len(rows)))]
        yield orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
        start = end


async def send_body(body: bytes, receive: Receive, send: Send) -> bool:
    """Send a body in pieces, and return whether the client read all of it.

    `send` waits until the bytes of the call before have left the process: see `Protocol`.
    """
    disconnect = asyncio.ensure_future(wait_for_disconnect(receive)) if len(body) > SEND_BYTES else None
    try:
        for start in range(0, len(body) + SEND_BYTES, SEND_BYTES):  # the last piece is empty
            piece = body[start : start + SEND_BYTES]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if disconnect is not None and disconnect.done():
            return False
        await send({"type": "http.response.body", "body": b""})
        return True
    finally:
        if disconnect is not None:
            disconnect.cancel()


async def wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
