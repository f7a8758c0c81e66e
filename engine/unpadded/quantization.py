"""Quantization of vectors, with the bits of sentence-transformers; float16, which it lacks, rounds."""

from typing import get_args

import numpy as np

from unpadded.errors import OptionError
from unpadded.options import Precision, check_choice


def quantize(vectors: np.ndarray, precision: Precision, ranges: np.ndarray | None = None) -> np.ndarray:
    """Convert vectors, [batch, dimensions] floats, to a precision; binary and ubinary pack eight dimensions per byte.

    int8 and uint8 divide the range of each dimension into 255 steps. ranges: [2, dimensions], the lowest and the
    highest value of each; None takes those of these vectors, so that a row depends on its neighbors.
    """
    check_choice("precision", precision, get_args(Precision))
    if precision in ("float32", "float16"):
        return vectors.astype(precision)
    if precision in ("binary", "ubinary"):
        bits = np.packbits(vectors > 0, axis=-1)
        return bits if precision == "ubinary" else (bits - 128).astype(np.int8)
    if len(vectors) == 0:
        return np.zeros(vectors.shape, precision)
    dimensions = vectors.shape[-1]
    if ranges is None:
        if len(vectors) == 1:
            raise OptionError(
                f"{precision} needs the range of each dimension, which one vector does not have: {vectors.shape}; pass "
                "ranges [2, dimensions] or more texts"
            )
        ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)])
    elif ranges.shape != (2, dimensions):
        raise OptionError(
            f"ranges have the wrong shape: {ranges.shape}; pass (2, {dimensions}), the lowest and the highest values"
        )
    starts, ends = ranges.astype(np.float32, copy=False)
    steps = (ends - starts) / 255
    steps = np.where(steps == 0, 1, steps)
    codes: np.ndarray = np.clip(np.floor((vectors - starts) / steps), 0, 255)
    return codes.astype(np.uint8) if precision == "uint8" else (codes - 128).astype(np.int8)
