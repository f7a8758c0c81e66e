"""Vectors to what the caller asked for: fewer bits, or text.

Precisions mean what they mean in sentence-transformers, bit for bit; float16, which it lacks, rounds.
"""

from __future__ import annotations

import base64
from typing import get_args

import numpy as np

from unpadded.errors import InputError, OptionError
from unpadded.options import Precision, check_choice


def quantize(vectors: np.ndarray, precision: Precision, ranges: np.ndarray | None = None) -> np.ndarray:
    """[batch, dimensions] floats in `precision`; the binary ones pack eight dimensions into a byte.

    int8 and uint8 divide each dimension's range into 255 steps. `ranges` [2, dimensions] holds the least and the
    greatest values; without them they are the given vectors' own, and a row depends on its neighbors.
    """
    check_choice("precision", precision, get_args(Precision))
    if precision in ("float32", "float16"):
        return vectors.astype(precision)
    if precision == "ubinary":
        return np.packbits(vectors > 0, axis=-1)
    if precision == "binary":
        return (np.packbits(vectors > 0, axis=-1) - 128).astype(np.int8)
    if len(vectors) == 0:
        return np.zeros(vectors.shape, precision)
    starts, ends = _ranges(vectors, precision) if ranges is None else _checked(ranges, vectors.shape[-1])
    steps = (ends - starts) / 255
    steps = np.where(steps == 0, 1, steps)
    codes = np.clip(np.floor((vectors - starts) / steps), 0, 255)
    quantized: np.ndarray = codes.astype(np.uint8) if precision == "uint8" else (codes - 128).astype(np.int8)
    return quantized


def to_base64(vectors: np.ndarray) -> list[str]:
    """Each row's little-endian fp32 bytes in base64, as OpenAI's API sends them."""
    if not np.issubdtype(vectors.dtype, np.floating):
        raise OptionError(
            f"base64 holds fp32 vectors, which these are not: {vectors.dtype}; use precision float32 or float16"
        )
    return [base64.b64encode(row.tobytes()).decode("ascii") for row in vectors.astype("<f4")]


def _ranges(vectors: np.ndarray, precision: str) -> np.ndarray:
    if len(vectors) == 1:
        raise OptionError(
            f"{precision} needs the range of each dimension, and one vector has none: {vectors.shape}; "
            "pass ranges [2, dimensions] or more texts"
        )
    return np.stack([vectors.min(axis=0), vectors.max(axis=0)]).astype(np.float32, copy=False)


def _checked(ranges: np.ndarray, dimensions: int) -> np.ndarray:
    if ranges.shape != (2, dimensions):
        raise OptionError(
            f"ranges are of the wrong shape: {ranges.shape}; pass (2, {dimensions}), the least and the greatest values"
        )
    return ranges.astype(np.float32, copy=False)


def read_ranges(path: str) -> np.ndarray:
    """The [2, dimensions] array of an .npy file."""
    try:
        ranges = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"the ranges cannot be read: {path!r} ({error}); give an .npy of [2, dimensions]") from error
    if not isinstance(ranges, np.ndarray) or ranges.ndim != 2 or len(ranges) != 2:
        raise InputError(f"the ranges have the wrong shape: {path!r} {np.shape(ranges)}; give [2, dimensions]")
    return ranges
