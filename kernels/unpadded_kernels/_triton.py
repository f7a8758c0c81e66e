"""Triton where it is installed. Where it is not (macOS, Windows) a kernel stays a plain function that nothing calls."""

from types import SimpleNamespace

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

__all__ = ["TensorDescriptor", "fast_divide", "tl", "triton"]
