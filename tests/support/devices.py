"""The device that tests run on, and comparison within its tolerances."""

import os

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any import of unpadded_kernels

DEVICE = "cuda" if HAS_CUDA else "cpu"
# The interpreter stores bfloat16 as uint16 and computes on the bit pattern.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# Absolute and relative, against the fp32 reference of the same inputs: a few units in the last place.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_matches(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), atol=tolerance, rtol=tolerance)


def packed(lengths: list[int]) -> torch.Tensor:
    """cu_seqlens of texts of these lengths."""
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
