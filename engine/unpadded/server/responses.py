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
ARROW = "application/vnd.apache.arrow.stream"
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
    """Where they are accepted: rows end to end, little-endian fp32, their shape in headers; Arrow; or Parquet."""
    shape = {"x-shape": ",".join(map(str, vectors.shape)), "x-dtype": "float32"}
    if OCTETS in accept:
        return Response(lambda: vectors.astype("<f4").tobytes(), OCTETS, shape)
    media_type = next((name for name in (ARROW, PARQUET) if name in accept), None)
    if media_type is None:
        return None
    if importlib.util.find_spec("pyarrow") is None:
        raise OptionError(f"pyarrow is not installed on the server: {accept!r}; accept {OCTETS} or {JSON}")
    return Response(lambda: _table(vectors, media_type), media_type, shape)


def _table(vectors: np.ndarray, media_type: str) -> bytes:
    """One column, `vector`: fixed-size lists of float32."""
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.ravel()), vectors.shape[1])
    table = pyarrow.table({"vector": column})
    sink = pyarrow.BufferOutputStream()
    if media_type == PARQUET:
        pyarrow.parquet.write_table(table, sink)
    else:
        with pyarrow.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
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
