"""Read the header of a safetensors file.

The file is the header's length (8 bytes, little endian), the header (JSON: name -> dtype, shape, data_offsets), and the
tensors' data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unpadded.errors import WeightsError

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class StoredTensor:
    """Type, shape and place of one tensor in a safetensors file."""

    name: str
    path: Path
    dtype: str  # F32, BF16 ...
    shape: tuple[int, ...]
    start: int  # byte offsets in the file
    stop: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file by name; WeightsError if it is truncated or not safetensors."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            header = file.read(length) if length <= HEADER_LIMIT else b""
            size = file.seek(0, 2)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}; check that it exists and is readable") from error
    if start.startswith(PICKLE_STARTS):
        raise WeightsError(
            f"{path} is not safetensors: it starts with {start[:4]!r}, as pickled PyTorch files do; "
            "pickles are never loaded, convert the weights to safetensors"
        )
    data_start = 8 + length
    if len(start) < 8 or data_start > size:
        raise WeightsError(
            f"{path} is truncated or not safetensors: {size} bytes of at least {data_start}; download it again"
        )
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _stored_tensor(name, path, entry, data_start) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} has a header that is not safetensors: {error}; download it again") from error
    needed = max((tensor.stop for tensor in tensors.values()), default=data_start)
    if needed > size:
        raise WeightsError(f"{path} is truncated: {size} bytes instead of {needed}; download it again")
    return tensors


def read_headers(paths: Iterable[Path]) -> list[StoredTensor]:
    """Return the tensors of several files (shards), in the order of the files."""
    return [tensor for path in paths for tensor in read_header(path).values()]


def _stored_tensor(name: str, path: Path, entry: dict[str, Any], data_start: int) -> StoredTensor:
    dtype, shape = entry["dtype"], tuple(int(size) for size in entry["shape"])
    start, stop = (int(offset) for offset in entry["data_offsets"])
    if start < 0 or min(shape, default=0) < 0:
        raise ValueError(f"{name} has shape {shape} at byte {start}")
    if dtype in ITEM_BYTES and stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{name} is {dtype} {list(shape)} in {stop - start} bytes")
    return StoredTensor(name, path, dtype, shape, data_start + start, data_start + stop)
