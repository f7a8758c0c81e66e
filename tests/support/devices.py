"""The device that tests run on, tolerances by dtype, and combinations of parameters."""

import importlib.util
import itertools
import os
from collections.abc import Sequence
from typing import Any

import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any import of unpadded_kernels
    if importlib.util.find_spec("triton"):
        from support.interpreter import make_faster

        make_faster()

DEVICE = "cuda" if HAS_CUDA else "cpu"
# The interpreter stores bfloat16 as uint16 and computes on the bit pattern.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_CUDA else [])]
# Absolute and relative, against the fp32 reference of the same inputs: a few units in the last place.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_matches(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), atol=tolerance, rtol=tolerance)


def packed(lengths: list[int]) -> torch.Tensor:
    """Return cu_seqlens of texts of these lengths."""
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return combinations of one value per axis that hold every pair of values of two axes.

    On a GPU, where a case takes milliseconds and not the interpreter's seconds, return all combinations.
    """
    rows = list(itertools.product(*(range(len(axis)) for axis in axes)))

    def pairs(row: tuple[int, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(row), 2))

    missing, chosen = set().union(*map(pairs, rows)), []
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(chosen[-1])
    return [tuple(axis[at] for axis, at in zip(axes, row, strict=True)) for row in (rows if HAS_CUDA else chosen)]


def with_dtypes(values: Sequence[Any]) -> list[tuple[Any, torch.dtype]]:
    """Return (value, dtype) for kernels that have no branch on the dtype: all values in fp32, the first in every dtype.

    On a GPU return all combinations.
    """
    others = values if HAS_CUDA else values[:1]
    return [*itertools.product(values, DTYPES[:1]), *itertools.product(others, DTYPES[1:])]
