"""Matrix product of rows in 8 bits (see `fp8`), alone or with the MLP's activation in the same pass.

    y[t, n] = activation(x_scale[t] * weight_scale[n] * (x[t] @ weight[n]) + bias[n])

Bound by arithmetic: 2 * in_features * out_features flops per token, at twice the rate of 16 bits. The sums are as fine
as the tensor cores keep them: by what is published, to about 14 bits on sm_90, where an e4m3 has 4. A row of the result
has the same bits whatever rows stand beside it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from unpadded_kernels._triton import device_guard
from unpadded_kernels.fp8 import E4M3, dequantized
from unpadded_kernels.linear import linear_invariant_cpu, linear_invariant_reference, scaled_product_triton


def linear_fp8_reference(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kind: str | None,
    dtype: torch.dtype,
    product: Callable[..., Tensor] = linear_invariant_reference,
) -> Tensor:
    """linear, then where kind is given its activation, in fp32 of what the rows of x and weight stand for.

    x: [total_tokens, in_features] e4m3; x_scale: [total_tokens] fp32; weight: [rows, in_features] e4m3, gate rows then
    up rows when kind is gated; weight_scale: [rows] fp32; bias: [rows] or None; product: what multiplies them in fp32.
    Returns [total_tokens, out_features] in dtype.
    """
    operands = dequantized(x, x_scale), dequantized(weight, weight_scale), None if bias is None else bias.float()
    return product(*operands, kind).to(dtype)


def linear_fp8_triton(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    kind: str | None,
    dtype: torch.dtype,
) -> Tensor:
    """The kernel of linear, with e4m3's tiles and both scales on the fp32 sums."""
    if x.dtype != E4M3 or weight.dtype != E4M3:
        raise ValueError(f"x and weight must be {E4M3}, got {x.dtype} and {weight.dtype}: pass them to quantize_rows")
    (total_tokens, in_features), rows = x.shape, weight.shape[0]
    shapes = [tuple(tensor.shape) for tensor in (x_scale, weight, weight_scale, *([] if bias is None else [bias]))]
    if shapes != [(total_tokens,), (rows, in_features), (rows,), (rows,)][: len(shapes)]:
        raise ValueError(
            f"of x {tuple(x.shape)}, x_scale must be [{total_tokens}], weight [rows, {in_features}], weight_scale and "
            f"bias [rows], got {shapes}"
        )
    return scaled_product_triton(x, x_scale, weight, weight_scale, bias, kind, None, dtype)


linear_fp8 = torch.library.custom_op(
    "unpadded::linear_fp8",
    linear_fp8_reference,
    mutates_args=(),
    schema="(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, str? kind, ScalarType dtype)"
    " -> Tensor",
)
# Its products keep a row's bits; slower than fp32, since nothing on a CPU multiplies e4m3.
linear_fp8.register_kernel("cpu", partial(linear_fp8_reference, product=linear_invariant_cpu))
linear_fp8.register_kernel("cuda", device_guard(linear_fp8_triton))
linear_fp8.register_fake(linear_fp8_reference)
