"""Read the header of a safetensors file.

The file is the header's length (8 bytes, little endian), the header (JSON: name -> dtype, shape, data_offsets), and the
tensors' data without gaps. What the safetensors library rejects is rejected, and so is a name that occurs twice.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unpadded.checkpoint.json_config import open_file
from unpadded.errors import WeightsError

DTYPES = "F64 I64 U64 C64 F32 I32 U32 F16 BF16 I16 U16 I8 U8 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ"
DTYPES += " F6_E2M3 F6_E3M2 F4"
ITEM_BITS = {"BOOL": 8} | {dtype: int(dtype.partition("_")[0].lstrip("BCFIU")) for dtype in DTYPES.split()}
# In bytes: 54,000 tensors with short names, read in 0.7 s (Xeon, 2026-11). The library's own limit is 100 MB.
HEADER_LIMIT = 4_000_000
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
    with open_file(path) as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        header = file.read(length) if length <= HEADER_LIMIT else b""
        size = file.seek(0, 2)
    if start.startswith(PICKLE_STARTS):
        raise WeightsError(
            f"{path} is not safetensors: it starts with {start[:4]!r}, as pickled PyTorch files do; "
            "pickles are never loaded, convert the weights to safetensors"
        )
    end = 8 + length
    if len(start) < 8 or end > size:
        raise WeightsError(f"{path} is truncated or not safetensors: {size} bytes of at least {end}; download it again")
    if length > HEADER_LIMIT:
        raise WeightsError(f"{path} has a header of {length} bytes, more than {HEADER_LIMIT}; store fewer tensors")
    try:
        entries = json.loads(
            header.decode(),  # of bytes, json would read UTF-16, too
            object_pairs_hook=_unique,
            parse_int=lambda digits: -1 if digits[0] == "-" else int(digits),  # -0 is no unsigned integer
        )
        metadata = entries.pop("__metadata__", None)
        strings = [*entries] if metadata is None else [*entries, *metadata, *metadata.values()]
        "".join(strings).encode()  # raises for other types and lone surrogates
        tensors = {name: _stored_tensor(name, path, entry, end) for name, entry in entries.items()}
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.stop)):
            if tensor.start != end:
                raise ValueError(f"{tensor.name!r} starts at byte {tensor.start}, the data before it ends at {end}")
            end = tensor.stop
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} has a header that is not safetensors: {error}; download it again") from error
    if end != size:
        problem = "is truncated" if end > size else "has more data than its header states"
        raise WeightsError(f"{path} {problem}: {size} bytes instead of {end}; download it again")
    return tensors


def read_headers(paths: Iterable[Path]) -> list[StoredTensor]:
    """Return the tensors of several files (shards), in the order of the files."""
    return [tensor for path in paths for tensor in read_header(path).values()]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a name occurs twice among {', '.join(name for name, _ in pairs):.200}")
    return found


def _stored_tensor(name: str, path: Path, entry: Any, data_start: int) -> StoredTensor:
    if entry.keys() != {"dtype", "shape", "data_offsets"} or entry["dtype"] not in ITEM_BITS:
        raise ValueError(f"{name!r} is not a type, a shape and offsets but {entry!r:.200}")
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, start, stop, ITEM_BITS[dtype] * math.prod(size or 1 for size in shape)]
    if not isinstance(shape, list) or any(type(number) is not int or not 0 <= number < 2**64 for number in numbers):
        raise ValueError(f"{name!r} has shape {shape!r} at bytes {start!r} to {stop!r}")
    if ITEM_BITS[dtype] * math.prod(shape) != 8 * (stop - start):
        raise ValueError(f"{name} is {dtype} {shape} in {stop - start} bytes")
    return StoredTensor(name, path, dtype, tuple(shape), data_start + start, data_start + stop)
