"""Triton, which is optional: CUDA kernels need it, the CPU bodies do not.

A build of PyTorch without CUDA does not import it (72 MB, 2026-11), unless its interpreter is requested or it is there
already. Then a kernel is defined as a plain Python function, and an op raises ImportError for a CUDA tensor. Triton
skips a launch whose grid is empty, so that launchers need no case for a batch without tokens.
"""

import functools
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import_error: ImportError | None = None
try:
    if not (torch.backends.cuda.is_built() or "triton" in sys.modules or "TRITON_INTERPRET" in os.environ):
        raise ImportError("this build of PyTorch has no CUDA")
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

__all__ = ["TensorDescriptor", "check_rows", "device_guard", "fast_divide", "tl", "triton"]


def check_rows(name: str, tensor: Tensor | None, *shape: int) -> None:
    """Raise ValueError unless a tensor, if there is one, has this shape and contiguous rows."""
    if tensor is not None and (tensor.shape != shape or tensor.stride(-1) != 1):
        raise ValueError(
            f"{name} must be {shape} with contiguous rows, got {tuple(tensor.shape)}, strides {tensor.stride()}: "
            "pass a contiguous tensor of that shape"
        )


def device_guard(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Make the device of the first tensor current during a launch, since Triton launches on the current device."""

    @functools.wraps(launcher)
    def guarded(first: Tensor, *rest: object, **options: object) -> Any:
        if import_error is not None:
            raise ImportError(
                f"the kernels for CUDA need triton 3.6 or later, which cannot be imported ({import_error}), and got a "
                f"tensor on {first.device}: run pip install 'triton>=3.6', or keep the tensors on the CPU"
            ) from import_error
        if first.device.index == torch.cuda.current_device():
            return launcher(first, *rest, **options)
        with torch.cuda.device(first.device):
            return launcher(first, *rest, **options)

    return guarded
