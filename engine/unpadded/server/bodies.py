"""Responses as bytes. Vectors never pass through Python floats: orjson reads numpy's rows, base64 their bytes."""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from unpadded.errors import OptionError

JSON = "application/json"
OCTETS = "application/octet-stream"
PARQUET = "application/vnd.apache.parquet"
# Floats per call of orjson, which holds the interpreter's lock: some 2 ms of it, after which other threads get a turn.
FLOATS = 1 << 17


@dataclass(frozen=True)
class Response:
    """What goes back, encoded off the event loop by `encode`."""

    encode: Callable[[], bytes]
    media_type: str = JSON
    headers: dict[str, str] = field(default_factory=dict)


def json_response(value: Any) -> Response:
    return Response(lambda: orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))


def binary_response(vectors: np.ndarray, accept: str) -> Response | None:
    """Where they are accepted: rows end to end, little-endian fp32, their shape in headers; or a Parquet file."""
    shape = {"x-shape": ",".join(map(str, vectors.shape)), "x-dtype": "float32"}
    if OCTETS in accept:
        return Response(lambda: vectors.astype("<f4").tobytes(), OCTETS, shape)
    if PARQUET not in accept:
        return None
    if importlib.util.find_spec("pyarrow") is None:
        raise OptionError(f"Parquet is not installed on the server: {accept!r}; accept {OCTETS} or {JSON}")
    return Response(lambda: _parquet(vectors), PARQUET, shape)


def _parquet(vectors: np.ndarray) -> bytes:
    """One column, `vector`: fixed-size lists of float32."""
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.ravel()), vectors.shape[1])
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"vector": column}), sink)
    return bytes(sink.getvalue())


def rows_response(rows: np.ndarray | list[np.ndarray], before: bytes = b"[", after: bytes = b"]") -> Response:
    """before, each row as a JSON array (of arrays where it is a matrix), after."""
    return Response(lambda: b"".join([before, b",".join(_pieces(rows, lambda index, row: row)), after]))


def openai_response(vectors: np.ndarray, encoding_format: str, model: str, tokens: int) -> Response:
    """A list of embedding objects with usage."""

    def item(index: int, row: np.ndarray) -> dict[str, Any]:
        embedding = row if encoding_format == "float" else base64.b64encode(row.tobytes()).decode("ascii")
        return {"object": "embedding", "index": index, "embedding": embedding}

    rest = orjson.dumps({"model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}).removeprefix(b"{")
    before = b'{"object":"list","data":['
    rows = vectors.astype("<f4", copy=False)
    return Response(lambda: b"".join([before, b",".join(_pieces(rows, item)), b"],", rest]))


def _pieces(rows: np.ndarray | list[np.ndarray], item: Callable[[int, np.ndarray], Any]) -> Iterator[bytes]:
    """JSON of consecutive items without the brackets around them."""
    start = 0
    while start < len(rows):
        end = start + max(1, FLOATS // max(1, rows[start].size))
        items = [item(index, rows[index]) for index in range(start, min(end, len(rows)))]
        yield orjson.dumps(items, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
        start = end
