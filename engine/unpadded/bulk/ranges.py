"""The ranges that int8 and uint8 vectors are cut to."""

from __future__ import annotations

import numpy as np

from unpadded.errors import InputError


def read_ranges(path: str) -> np.ndarray:
    """The [2, dimensions] array of an .npy file."""
    try:
        ranges = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"the ranges cannot be read: {path!r} ({error}); give an .npy of [2, dimensions]") from error
    if not isinstance(ranges, np.ndarray) or ranges.ndim != 2 or len(ranges) != 2:
        raise InputError(f"the ranges have the wrong shape: {path!r} {np.shape(ranges)}; give [2, dimensions]")
    return ranges
