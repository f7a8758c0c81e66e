"""From a pooled row to a vector: layer norm without affine parameters, cut, L2 normalization; each step is optional.

    x = layer_norm(pooled)[:dimensions]      y = x / max(||x||, 1e-12)

Bound by the launch: a row is 4 * hidden bytes. What a request chooses is a number at run time, so that no choice
compiles a kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels._operation import operation
from unpadded_kernels._triton import tl, triton


def matryoshka_reference(pooled: Tensor, layer_norm: bool, dimensions: int, normalize: bool) -> Tensor:
    """pooled: [batch, hidden] fp32. Returns [batch, dimensions] fp32."""
    x = F.layer_norm(pooled, pooled.shape[-1:]) if layer_norm else pooled
    x = x[:, :dimensions]
    return F.normalize(x, dim=-1) if normalize else x.clone(memory_format=torch.contiguous_format)


@triton.jit(do_not_specialize=["layer_norm", "dimensions", "normalize"])
def _matryoshka_kernel(
    pooled_ptr, out_ptr, layer_norm, dimensions, normalize, HIDDEN: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    x = tl.load(pooled_ptr + row * HIDDEN + h, mask=h < HIDDEN, other=0.0)
    if layer_norm:
        centered = tl.where(h < HIDDEN, x - tl.sum(x, axis=0) / HIDDEN, 0.0)
        x = centered * (1 / tl.sqrt(tl.sum(centered * centered, axis=0) / HIDDEN + 1e-5))
    x = tl.where(h < dimensions, x, 0.0)
    if normalize:
        x = x / tl.maximum(tl.sqrt(tl.sum(x * x, axis=0)), 1e-12)
    tl.store(out_ptr + row * dimensions + h, x, mask=h < dimensions)


def matryoshka_triton(pooled: Tensor, layer_norm: bool, dimensions: int, normalize: bool) -> Tensor:
    """Launch one program per row."""
    batch, width = pooled.shape
    if not 0 < dimensions <= width:
        raise ValueError(f"dimensions must be between 1 and {width}, got {dimensions}")
    if not pooled.is_contiguous():
        raise ValueError(f"pooled must be contiguous, got strides {pooled.stride()}: pass .contiguous()")
    out = torch.empty((batch, dimensions), dtype=torch.float32, device=pooled.device)
    _matryoshka_kernel[(batch,)](
        pooled,
        out,
        layer_norm=int(layer_norm),
        dimensions=dimensions,
        normalize=int(normalize),
        HIDDEN=width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=8,
        enable_fp_fusion=True,
    )
    return out


matryoshka = operation(matryoshka_reference, cuda=matryoshka_triton)
