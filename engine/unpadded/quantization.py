"""Quantization of vectors.

The precisions are those of sentence-transformers, with the same bits; float16, which it lacks, rounds.
"""

from __future__ import annotations

from typing import get_args

import numpy as np

from unpadded.errors import InputError, OptionError
from unpadded.options import Precision, check_choice


def quantize(vectors: np.ndarray, precision: Precision, ranges: np.ndarray | None = None) -> np.ndarray:
    """Convert vectors, [batch, dimensions] floats, to a precision; binary and ubinary pack eight dimensions per byte.

    int8 and uint8 divide the range of each dimension into 255 steps. ranges: [2, dimensions], the lowest and the
    highest value of each; None takes those of these vectors, so that a row depends on its neighbors.
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
    starts, ends = _own_ranges(vectors, precision) if ranges is None else _check_ranges(ranges, vectors.shape[-1])
    steps = (ends - starts) / 255
    steps = np.where(steps == 0, 1, steps)
    codes = np.clip(np.floor((vectors - starts) / steps), 0, 255)
    quantized: np.ndarray = codes.astype(np.uint8) if precision == "uint8" else (codes - 128).astype(np.int8)
    return quantized


def _own_ranges(vectors: np.ndarray, precision: str) -> np.ndarray:
    if len(vectors) == 1:
        raise OptionError(
            f"{precision} needs the range of each dimension, which one vector does not have: {vectors.shape}; pass "
            "ranges [2, dimensions] or more texts"
        )
    return np.stack([vectors.min(axis=0), vectors.max(axis=0)]).astype(np.float32, copy=False)


def _check_ranges(ranges: np.ndarray, dimensions: int) -> np.ndarray:
    if ranges.shape != (2, dimensions):
        raise OptionError(
            f"ranges have the wrong shape: {ranges.shape}; pass (2, {dimensions}), the lowest and the highest values"
        )
    return ranges.astype(np.float32, copy=False)


def read_ranges(path: str) -> np.ndarray:
    """Read the ranges [2, dimensions] of an .npy file."""
    try:
        ranges = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"the ranges cannot be read: {path!r} ({error}); pass an .npy of [2, dimensions]") from error
    if not isinstance(ranges, np.ndarray) or ranges.ndim != 2 or len(ranges) != 2:
        raise InputError(f"the ranges have the wrong shape: {path!r} {np.shape(ranges)}; pass [2, dimensions]")
    return ranges
