"""Activations between the two matmuls of an MLP.

    swiglu: silu(gate) * up      geglu: gelu(gate) * up      gelu, gelu_tanh: gelu(x)

A gated input row is gate, then up. Bound by memory: 6 * intermediate bytes per token in 16 bits if gated, else 4.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._operation import operation
from unpadded_kernels._triton import check_rows, fast_divide, tl, triton
from unpadded_kernels.tiles import row_launch

GATED = ("swiglu", "geglu")
KINDS = (*GATED, "gelu", "gelu_tanh")


def activation_reference(x: Tensor, kind: str) -> Tensor:
    """Apply the activation in fp32.

    x: [total_tokens, 2 * intermediate] if kind is gated, else [total_tokens, intermediate]; kind: swiglu, geglu, gelu
    (erf) or gelu_tanh. Returns [total_tokens, intermediate] in x's dtype.
    """
    check_kind(kind)
    h = x.float()
    if kind in GATED:
        # contiguous: torch picks its gelu by layout, which differs between one row's halves and those of two rows
        gate, up = (half.contiguous() for half in h.chunk(2, dim=-1))
        h = (F.silu(gate) if kind == "swiglu" else F.gelu(gate)) * up
    else:
        h = F.gelu(h, approximate="tanh" if kind == "gelu_tanh" else "none")
    return h.to(x.dtype)


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown activation {kind!r}: use swiglu, geglu, gelu or gelu_tanh")


@triton.jit
def _times_sigmoid(x, z):
    """Return x / (1 + exp(-z)), by the fast division and exponential."""
    return fast_divide(x, 1.0 + tl.math.exp2(-1.4426950408889634 * z))


@triton.jit
def _gelu(x):
    """Return max(x, 0) - |x| * erfc(|x| / sqrt(2)) / 2, erfc within 1.5e-7 (Abramowitz and Stegun 7.1.26).

    erf of libdevice takes more than twice the instructions, so many that they would bound the kernel, not memory.
    """
    magnitude = tl.abs(x)
    t = fast_divide(1.0, 1.0 + 0.3275911 * 0.7071067811865476 * magnitude)
    series = 1.061405429
    series = series * t - 1.453152027
    series = series * t + 1.421413741
    series = series * t - 0.284496736
    series = series * t + 0.254829592
    half_exponential = tl.math.exp2(-0.5 * 1.4426950408889634 * x * x - 1.0)
    return tl.maximum(x, 0.0) - magnitude * (series * t * half_exponential)


@triton.jit
def activate(gate, up, KIND: tl.constexpr):
    """Return the activation of fp32 values. up is used only if KIND is gated."""
    if KIND == "swiglu":
        y = _times_sigmoid(gate, gate) * up
    elif KIND == "geglu":
        y = _gelu(gate) * up
    elif KIND == "gelu":
        y = _gelu(gate)
    else:
        # 0.5 * (1 + tanh(z)) is sigmoid(2 * z)
        y = _times_sigmoid(gate, 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    return y


@triton.jit
def _activation_kernel(
    x_ptr, y_ptr, stride_xt, INTERMEDIATE: tl.constexpr, BLOCK_I: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = i < INTERMEDIATE
    gate = tl.load(x_ptr + token * stride_xt + i, mask=mask, other=0.0).to(tl.float32)
    up = gate
    if GATED:
        up = tl.load(x_ptr + token * stride_xt + INTERMEDIATE + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * INTERMEDIATE + i, activate(gate, up, KIND), mask=mask)


def activation_triton(x: Tensor, kind: str) -> Tensor:
    """Launch one program per token and block of columns. x may be strided by token; its rows must be contiguous."""
    check_kind(kind)
    total_tokens, width = x.shape
    gated = kind in GATED
    if gated and width % 2:
        raise ValueError(f"a gated row is gate, then up: pass x of an even width, got {width}")
    check_rows("x", x, total_tokens, width)
    intermediate = width // 2 if gated else width
    y = torch.empty((total_tokens, intermediate), dtype=x.dtype, device=x.device)
    block_i = min(1024, triton.next_power_of_2(intermediate))
    _activation_kernel[(total_tokens, triton.cdiv(intermediate, block_i))](
        x,
        y,
        stride_xt=x.stride(0),
        INTERMEDIATE=intermediate,
        BLOCK_I=block_i,
        KIND=kind,
        GATED=gated,
        **row_launch(block_i),
    )
    return y


activation = operation(activation_reference, cuda=activation_triton)
