"""Triton, which is optional: CUDA kernels need it, the CPU bodies do not.

Without it a kernel is defined as a plain Python function, and an op raises ImportError when it receives a CUDA tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import TypeVar

import torch
from torch import Tensor

import_error: ImportError | None = None
try:
    import triton
    import triton.language as tl
    from triton.language.extra.libdevice import fast_dividef
    from triton.tools.tensor_descriptor import TensorDescriptor

    @triton.jit
    def _divide(x, y):
        return x / y

    # x / y in two instructions, within 2 units in the last place; the interpreter has no libdevice
    fast_divide = _divide if triton.knobs.runtime.interpret else fast_dividef
except ImportError as error:
    import_error = error
    triton = SimpleNamespace(jit=lambda kernel=None, **options: kernel or (lambda kernel: kernel))
    tl = SimpleNamespace(constexpr=None)
    TensorDescriptor = fast_divide = None

__all__ = ["TensorDescriptor", "device_guard", "fast_divide", "tl", "triton"]

Result = TypeVar("Result")


def device_guard(launcher: Callable[..., Result]) -> Callable[..., Result]:
    """Make the device of the first tensor current during a launch, since Triton launches on the current device."""

    @functools.wraps(launcher)
    def guarded(first: Tensor, *rest: object, **options: object) -> Result:
        if import_error is not None:
            raise ImportError(
                f"the kernels for CUDA need triton 3.6 or later, which cannot be imported ({import_error}), and got a "
                f"tensor on {first.device}: run pip install 'unpadded[cuda]', or keep the tensors on the CPU"
            ) from import_error
        if first.device.index == torch.cuda.current_device():
            return launcher(first, *rest, **options)
        with torch.cuda.device(first.device):
            return launcher(first, *rest, **options)

    return guarded
