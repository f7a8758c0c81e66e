"""Triton where it is installed. Where it is not (macOS, Windows) a kernel stays a plain function that nothing calls."""

from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = SimpleNamespace(jit=lambda kernel=None, **options: kernel or (lambda kernel: kernel))
    tl = SimpleNamespace(constexpr=None)
    TensorDescriptor = None

__all__ = ["TensorDescriptor", "tl", "triton"]
