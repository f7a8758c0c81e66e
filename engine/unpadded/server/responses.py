"""Responses as bytes. Vectors are never converted to Python floats: orjson reads numpy rows, base64 their bytes."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

JSON = "application/json"
OCTET_STREAM = "application/octet-stream"
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


def binary_response(vectors: np.ndarray, accept: str) -> Response | None:
    """Return little-endian fp32 rows, with their shape in a header, if the client accepts an octet stream."""
    if OCTET_STREAM not in accept:
        return None
    headers = {"x-shape": ",".join(map(str, vectors.shape)), "x-dtype": "float32"}
    return Response(lambda: vectors.astype("<f4").tobytes(), OCTET_STREAM, headers)


def rows_response(rows: np.ndarray | list[np.ndarray], before: bytes = b"[", after: bytes = b"]") -> Response:
    """Return the JSON text `before`, the rows (vectors or matrices) as comma-separated arrays, and `after`."""
    return Response(lambda: b"".join([before, b",".join(_json_chunks(rows, lambda index, row: row)), after]))


def openai_response(vectors: np.ndarray, encoding_format: str, model: str, tokens: int) -> Response:
    """Return a list of embedding objects with usage."""

    def embedding_object(index: int, row: np.ndarray) -> dict[str, Any]:
        embedding = row if encoding_format == "float" else base64.b64encode(row.tobytes()).decode("ascii")
        return {"object": "embedding", "index": index, "embedding": embedding}

    rest = orjson.dumps({"model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}).removeprefix(b"{")
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
