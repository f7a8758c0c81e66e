"""Headers of safetensors files: what the safetensors library rejects is rejected, what it opens is read the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors

from unpadded.checkpoint.safetensors_header import HEADER_LIMIT, read_header
from unpadded.errors import CheckpointError, WeightsError

W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
V = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


def entry(dtype: object, shape: object, *offsets: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def header(**changes: object) -> bytes:
    """Return the header of a file with two tensors of 8 bytes, w and v, with changes; `...` removes a name."""
    return json.dumps(
        {name: value for name, value in ({"w": W, "v": V} | changes).items() if value is not ...}
    ).encode()


GOOD = header()
CASES = {
    "whole": GOOD,
    "other order": header(w=V, v=W),
    "spaces around": b" \n" + GOOD + b"  ",
    "metadata": header(__metadata__={"format": "pt"}),
    "metadata is null": header(__metadata__=None),
    "metadata is a number": header(__metadata__={"format": 1}),
    "metadata is a list": header(__metadata__=["format"]),
    "metadata is an empty list": header(__metadata__=[]),
    "metadata is a tensor": header(__metadata__=W),
    "metadata twice": b'{"__metadata__": {},"__metadata__": {},' + GOOD[1:],
    "scalar": header(w=entry("F64", [], 0, 8)),
    "no elements": header(z=entry("F32", [0, 3], 8, 8)),
    "no elements inside another tensor": header(z=entry("F32", [0], 4, 4)),
    "odd offsets": header(w=entry("U8", [1], 0, 1), v=entry("F32", [3], 1, 13), u=entry("U8", [3], 13, 16)),
    "overlap": header(v=W),
    "overlap in part": header(v=entry("U8", [9], 7, 16)),
    "name twice": GOOD[:-1] + b', "w": ' + json.dumps(V).encode() + b"}",
    "gap": header(w=entry("U8", [7], 0, 7)),
    "gap at the start": header(w=...),
    "gap at the end": header(v=...),
    "no tensors": b"{}",
    "beyond the end": header(v=entry("F32", [4], 8, 24)),
    "reversed offsets": header(w=entry("F32", [2], 8, 0)),
    "field twice": GOOD.replace(b'"dtype"', b'"dtype": "F32", "dtype"', 1),
    "no dtype": header(w={"shape": [2], "data_offsets": [0, 8]}),
    "no shape": header(w={"dtype": "F32", "data_offsets": [0, 8]}),
    "shape is null": header(w=entry("F32", None, 0, 8)),
    "shape is an object": header(w=entry("F64", {}, 0, 8)),
    "shape is a string": header(w=entry("F32", "2", 0, 8)),
    "wrong shape": header(w=entry("F32", [3], 0, 8)),
    "unknown dtype": header(w=entry("F31", [2], 0, 8)),
    "dtype in lower case": header(w=entry("f32", [2], 0, 8)),
    "dtype is a list": header(w=entry(["F32"], [2], 0, 8)),
    "half a byte": header(w=entry("F4", [15], 0, 8)),
    "three offsets": header(w=entry("F32", [2], 0, 8, 8)),
    "strings as offsets": header(w=entry("F32", [2], "0", "8")),
    "floats as offsets": header(w=entry("F32", [2], 0.0, 8.0)),
    "fractions as offsets": header(w=entry("F32", [2], 0.9, 8.9)),
    "exponent as offset": GOOD.replace(b"[0, 8]", b"[0, 8e0]"),
    "negative zero as offset": GOOD.replace(b"[0, 8]", b"[-0, 8]"),
    "booleans as offsets": header(w=entry("U8", [1], False, True), v=entry("U8", [15], 1, 16)),
    "boolean as size": header(w=entry("F32", [2, True], 0, 8)),
    "negative offsets": header(w=entry("F32", [2], -8, 0)),
    "negative sizes": header(w=entry("F32", [-2, -1], 0, 8)),
    "size beyond 64 bits": header(z=entry("F32", [2**64, 0], 8, 8)),
    "product beyond 64 bits": header(z=entry("F32", [2**63, 2**63, 0], 8, 8)),
    "size of 5000 digits": GOOD.replace(b"[2]", b"[" + b"9" * 5000 + b"]", 1),
    "NaN": GOOD[:-1] + b', "z": NaN}',
    "entry is a string": header(w="F32"),
    "deeply nested": header(w="?").replace(b'"?"', b"[" * 10**5 + b"]" * 10**5),
    "array": b"[]",
    "null": b"null",
    "empty": b"",
    "trailing comma": GOOD[:-1] + b",}",
    "bytes after the object": GOOD + b"\0",
    "two objects": GOOD + GOOD,
    "byte order mark": b"\xef\xbb\xbf" + GOOD,
    "UTF-16": GOOD.decode().encode("utf-16"),
    "UTF-16 without mark": GOOD.decode().encode("utf-16-le"),
    "UTF-32": GOOD.decode().encode("utf-32-be"),
    "Latin-1": GOOD.replace(b'"v"', b'"\xe9"'),
    "lone surrogate": GOOD.replace(b'"v"', b'"\\ud800"'),
    "lone surrogate in metadata": header(__metadata__={"a": "?"}).replace(b"?", b"\\udfff"),
    "surrogate pair": GOOD.replace(b'"v"', b'"\\ud83d\\ude00"'),
    "control character": GOOD.replace(b'"v"', b'"\x01"'),
    "metadata name twice": b'{"__metadata__": {"a": "b", "a": "c"},' + GOOD[1:],
    "equal name twice": GOOD[:-1] + b', "w": ' + json.dumps(W).encode() + b"}",
    "unknown field": header(w=W | {"strides": [1]}),
    "product beyond 64 bits after a zero": header(z=entry("F32", [0, 2**63, 2**63], 8, 8)),
}
# The library opens this; no program writes it.
STRICTER = {"entry is an array": header(w=["F32", [2], [0, 8]])}


def write(path: Path, content: bytes, data: int = 16) -> Path:
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(data))
    return path


@pytest.mark.parametrize("case", [*CASES, *STRICTER])
def test_files_are_read_or_rejected_as_by_the_library(case: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", (CASES | STRICTER)[case])
    try:
        with safetensors.safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in list(file.keys())}
            expected = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except safetensors.SafetensorError:
        expected = None
    if expected is None or case in STRICTER:
        assert (expected is None) is (case in CASES)
        with pytest.raises(WeightsError, match=r"model\.safetensors .*download it again") as error:
            read_header(path)
        assert len(str(error.value)) < 500 and str(error.value).isprintable()
    else:
        assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in read_header(path).values()} == expected


def test_data_that_no_tensor_describes_is_rejected(tmp_path: Path) -> None:
    for data in (17, 15):
        with pytest.raises(WeightsError, match=r"is truncated or not safetensors: .*; download it again"):
            read_header(write(tmp_path / "model.safetensors", GOOD, data=data))


def test_a_header_of_many_megabytes_is_rejected_before_it_is_parsed(tmp_path: Path) -> None:
    content = b"{" + b" " * HEADER_LIMIT + GOOD[1:]
    with pytest.raises(WeightsError, match=rf"has a header of {len(content)} bytes, more than {HEADER_LIMIT}"):
        read_header(write(tmp_path / "model.safetensors", content))


def test_a_directory_is_not_read_as_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"with mode d.* are not a regular file"):
        read_header(tmp_path)
