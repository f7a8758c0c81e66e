"""Triton where it is installed. Where it is not (macOS, Windows) a kernel stays a plain function that nothing calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import TypeVar

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language.extra.libdevice import fast_dividef
    from triton.tools.tensor_descriptor import TensorDescriptor

    @triton.jit
    def _divide(x, y):
        return x / y

    # x / y in two instructions, within 2 units in the last place; the interpreter runs nothing of libdevice
    fast_divide = _divide if triton.knobs.runtime.interpret else fast_dividef
except ImportError:
    triton = SimpleNamespace(jit=lambda kernel=None, **options: kernel or (lambda kernel: kernel))
    tl = SimpleNamespace(constexpr=None)
    TensorDescriptor = fast_divide = None

__all__ = ["TensorDescriptor", "device_guard", "fast_divide", "tl", "triton"]

Result = TypeVar("Result")


def device_guard(launcher: Callable[..., Result]) -> Callable[..., Result]:
    """The launcher with its first tensor's device as the current one, where Triton launches; PyTorch's ops do this."""

    @functools.wraps(launcher)
    def guarded(first: Tensor, *rest: object, **options: object) -> Result:
        if first.device.index == torch.cuda.current_device():
            return launcher(first, *rest, **options)
        with torch.cuda.device(first.device):
            return launcher(first, *rest, **options)

    return guarded
