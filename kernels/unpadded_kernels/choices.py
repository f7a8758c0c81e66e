"""Choices between the ways to compute an op, each with its reason.

    library    the library's matmul, and a second kernel for the step after it
    triton     one kernel in plain Triton
    hopper     one kernel in Gluon for sm_90; the next of the op's other values if that does not support the device,
               the dtype or the dimensions

A choice never depends on the number of tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from unpadded_kernels.tiles import generation


class Choice(NamedTuple):
    value: str
    reason: str  # predicted or measured, on which GPU and when


_UNKNOWN = Choice("library", "no prediction and no measurement for this generation")
_ONLY = Choice("triton", "the only kernel for this generation")
_PLAIN = Choice("triton", "tested in the interpreter; hopper is predicted to be faster, but has not run on a GPU")

CHOICES: dict[tuple[str, int], Choice] = {  # by op and generation
    **{(op, generation): _UNKNOWN for op in ("linear_activation", "linear_rotary") for generation in (80, 100)},
    **{(op, generation): _ONLY for op in ("linear_invariant", "linear_fp8", "attention") for generation in (80, 100)},
    **{(op, 90): _PLAIN for op in ("linear_invariant", "linear_fp8", "attention")},
    ("linear_activation", 90): Choice(
        "triton", "predicted for H100 (2026-11): 11 % more tokens per second at 512 per text; hopper 12 %, unproven"
    ),
    ("linear_rotary", 90): Choice(
        "library", "no such kernel in plain Triton; hopper is predicted to give 4 % more tokens per second, unproven"
    ),
}
_overridden: dict[str, str] = {}


def chosen(op: str, x: Tensor) -> str:
    """Return the value of the choice for an op on rows such as x, in fp32 that of sm_80, whose tiles fp32 uses."""
    if op in _overridden:
        return _overridden[op]
    return CHOICES[op, 80 if x.dtype == torch.float32 else generation(x.device)].value


@contextmanager
def override(**values: str) -> Iterator[None]:
    """Replace choices by op, on every generation and in all threads. A captured CUDA graph keeps its kernels."""
    if unknown := values.keys() - {op for op, _ in CHOICES}:
        raise ValueError(f"there is no choice for {', '.join(sorted(unknown))}: use an op of choices.CHOICES")
    before = dict(_overridden)
    _overridden.update(values)
    try:
        yield
    finally:
        _overridden.clear()
        _overridden.update(before)
