"""Choices between the ways to compute an op, each with its reason.

    library    the library's matmul, and a second kernel for the activation
    triton     one kernel in plain Triton
    hopper     attention in Gluon for sm_90; plain Triton where that does not support the device, the dtype or the
               dimensions

A choice never depends on the number of tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from unpadded_kernels.tiles import generation

# By op and generation. Nothing is measured; hopper, tested in a simulation only, is nowhere the default.
CHOICES = {
    # predicted for H100 (2026-11): 11 % more tokens per second at 512 per text
    "linear_activation": {80: "library", 90: "triton", 100: "library"},
    # predicted for H100: hopper is faster
    "attention": {80: "triton", 90: "triton", 100: "triton"},
}


def chosen(op: str, x: Tensor) -> str:
    """Return the value of the choice for an op on rows such as x, in fp32 that of sm_80, whose tiles fp32 uses."""
    return CHOICES[op][80 if x.dtype == torch.float32 else generation(x.device)]


@contextmanager
def override(**values: str) -> Iterator[None]:
    """Replace choices by op, on every generation and in all threads. A captured CUDA graph keeps its kernels."""
    if unknown := values.keys() - CHOICES.keys():
        raise ValueError(f"there is no choice for {', '.join(sorted(unknown))}: use an op of choices.CHOICES")
    before = CHOICES.copy()
    CHOICES.update((op, dict.fromkeys(CHOICES[op], value)) for op, value in values.items())
    try:
        yield
    finally:
        CHOICES.update(before)
