"""Triton where it is installed. Where it is not (macOS, Windows) a kernel stays a plain function that nothing calls."""

from types import SimpleNamespace
from typing import Any

triton: Any
tl: Any
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = SimpleNamespace(jit=lambda kernel: kernel)
    tl = SimpleNamespace(constexpr=None)
