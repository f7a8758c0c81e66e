"""Responses as bytes. Vectors never become Python floats: orjson and base64 read numpy rows."""

import base64
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from starlette.datastructures import Headers

from unpadded.quantization import quantize

JSON = "application/json"
PAGES = Path(__file__).parent / "pages"
OCTET_STREAM = "application/octet-stream"
# orjson holds the interpreter's lock for about 2 ms for this many floats; other threads run between its calls.
FLOATS_PER_CALL = 1 << 17
# For any dimension of a unit vector: with these, int8 is 127 x, rounded, and uint8 is 128 more.
RANGE = np.array([[-128.5], [126.5]], np.float32) / 127


@dataclass(frozen=True)
class Response:
    """A successful response. `encode` returns its body and may run in another thread."""

    encode: Callable[[], bytes]
    media_type: str = JSON
    headers: dict[str, str] = field(default_factory=dict)


def json_response(value: Any) -> Response:
    """Return a value as JSON, in which arrays are lists of numbers. A function is called for it when it is encoded."""
    return Response(lambda: orjson.dumps(value() if callable(value) else value, default=_array_json))


def _array_json(array: np.ndarray) -> Any:
    if array.size > FLOATS_PER_CALL and array.ndim > 1:
        return list(array)  # orjson calls this function for each of them
    return orjson.Fragment(orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY))


def vectors_as(kind: Any, vectors: np.ndarray) -> Any:
    """Return one JSON value per vector, [n, dimensions] fp32: float, base64 (of float's bytes), or quantized.

    int8 and uint8 have the same range for every text, which suits unit vectors only.
    """
    if kind == "float":
        return vectors
    if kind == "base64":
        return [base64.b64encode(row).decode() for row in vectors.astype("<f4", copy=False)]
    return quantize(vectors, kind, RANGE.repeat(vectors.shape[1], axis=1))


def vectors_response(vectors: np.ndarray, headers: Headers, to_json: Callable[[], Any]) -> Response:
    """Return JSON, or little-endian fp32 rows with their shape in a header if the client prefers an octet stream."""
    if negotiate(headers, JSON, OCTET_STREAM) == JSON:
        return json_response(to_json)
    shape = {"x-shape": ",".join(map(str, vectors.shape)), "x-dtype": "float32"}
    return Response(lambda: vectors.astype("<f4").tobytes(), OCTET_STREAM, shape)


def negotiate(headers: Headers, *offers: str) -> str:
    """Return the media type that the Accept headers prefer, by weight and then by order; without preference the first.

    RFC 9110, 12.5.1: of the ranges that include a type, the most specific one has its weight.
    """

    accept = ",".join(headers.getlist("accept")).lower().replace(" ", "")
    ranges: dict[str, tuple[float, int]] = {}  # weight, and position from the end
    for position, item in enumerate(accept.split(",")):
        media_range, _, parameters = item.partition(";")
        weight = re.search(r"(?:^|;)q=([01](?:\.\d*)?)(?:;|$)", parameters)
        ranges[media_range] = (float(weight[1]) if weight else 1.0, -position)

    def rank(offer: str) -> tuple[float, int]:
        names = [name for name in (offer, offer.partition("/")[0] + "/*", "*/*") if name in ranges]
        return ranges[names[0]] if names and ranges[names[0]][0] else (0.0, -len(accept))

    return max(offers, key=rank)


@functools.cache
def html_page(name: str) -> bytes:
    """Return a page of the folder `pages` with its style."""
    style = (PAGES / "style.css").read_bytes()
    return (PAGES / name).read_bytes().replace(b"/*style*/", style)
