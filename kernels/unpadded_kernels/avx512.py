"""Kernels in C for CPUs with AVX-512 (`avx512.c`), compiled by the machine's C compiler when they are first needed.

Triton needs that compiler on a GPU, too. Without it, or on another processor, `supports` is False and the operations
run their other CPU bodies. The library is kept in the user's cache directory, named by its source and its flags.

A linear layer in 8-bit integers quantizes rows and weights:

    x[i]      = x_scale[i] * q[i] + middle[i]        middle = (max(x[i]) + min(x[i])) / 2,  |q| <= 127
    weight[j] = weight_scale[j] * p[j]               |p| <= 127
    y[i, j]   = x_scale[i] * weight_scale[j] * sum(q[i] * p[j]) + middle[i] * sum(weight[j]) + bias[j]

An offset per row keeps the precision of rows that are not centered, such as those after a GELU (bench/NOTES.md).
"""

import ctypes
import functools
import hashlib
import logging
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels.activation import GATED
from unpadded_kernels.linear_cpu import bits_follow_threads

logger = logging.getLogger("unpadded")

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = "-O3 -fopenmp -ffp-contract=off -shared -fPIC -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "swiglu": 3, "geglu": 4}
_PANEL = 64  # columns that are multiplied together; biases are read less than this far beyond the last query


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels compute with this dtype here: float32, bfloat16 or, for linear layers, int8."""
    return dtype in _kernels()[1]


@functools.cache
def _kernels() -> tuple[Any, tuple[torch.dtype, ...]]:
    """Return the library and the dtypes that it computes with on this processor, or None and no dtype."""
    if not torch.cpu._is_avx512_supported():
        return None, ()
    flags, dtypes = FLAGS.split(), [torch.float32]
    if torch.cpu._is_avx512_bf16_supported():
        flags.append("-mavx512bf16")
        dtypes.append(torch.bfloat16)
    if torch.cpu._is_vnni_supported():
        flags.append("-mavx512vnni")
        dtypes.append(torch.int8)
    try:
        library = ctypes.CDLL(str(_compiled(flags)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        logger.warning("slower kernels run: those for AVX-512 need gcc and a writable XDG_CACHE_HOME, but %s", reason)
        return None, ()
    number, size, pointer = ctypes.c_int, ctypes.c_long, ctypes.c_void_p
    library.linear.argtypes = [number] * 6 + [size] * 6 + [pointer] * 7
    library.attention.argtypes = [number] * 2 + [size] * 6 + [ctypes.c_float] + [pointer] * 5
    library.norm.argtypes = [number] * 2 + [size] * 4 + [ctypes.c_float] + [pointer] * 6
    library.maxima.argtypes = [number] * 2 + [size] * 5 + [pointer] * 4
    library.rotary.argtypes = [number] * 2 + [size] * 3 + [pointer] * 2
    return library, tuple(dtypes)


def _compiled(flags: list[str]) -> Path:
    """Return the compiled library; OSError or CalledProcessError if that fails."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise OSError("there is no C compiler")
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, flags)).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unpadded"
    target = folder / f"avx512-{key}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:  # so that no process loads half a file
            built = Path(own) / target.name
            command = [compiler, *flags, str(SOURCE), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            built.replace(target)
    return target


class PackedWeight(NamedTuple):
    """A weight of a linear layer in the layout of the kernels, [panels, in_features in fours of bytes, 64, n]."""

    panels: Tensor
    shape: tuple[int, int]  # out_features, twice as many if gated, and in_features
    scales: Tensor | None = None  # [panels * 64] fp32, of int8: weight_scale
    totals: Tensor | None = None  # [panels * 64] fp32, of int8: sum(weight[j]), as quantized
    starts: Tensor | None = None  # [panels * 64] int32, of int8: -128 * sum(p[j]), because rows are stored as q + 128


def can_pack(weight: Tensor) -> bool:
    """Whether `pack` takes a weight: oneDNN is faster in bf16 with AMX, and inputs are read four bytes at a time."""
    suits = supports(weight.dtype) and not bits_follow_threads(weight.dtype) and weight.shape[1] % 2 == 0
    return suits and weight.device.type == "cpu"


def pack(weight: Tensor, kind: str | None = None) -> PackedWeight:
    """Copy a weight into the layout of the kernels.

    weight: [out_features, in_features], one that `can_pack`; kind: the activation that follows, or None. With a gated
    one a panel has 32 gate rows, then their 32 up rows.
    """
    rows, per_step = _panel_rows(weight, kind), 4 // weight.itemsize
    rows = F.pad(rows, (0, -rows.shape[-1] % per_step))
    panels = rows.unflatten(-1, (-1, per_step)).transpose(1, 2).contiguous()
    return PackedWeight(panels, (weight.shape[0], weight.shape[1]))


def pack_int8(weight: Tensor, kind: str | None = None) -> PackedWeight:
    """Quantize a weight and copy it into the layout of the kernels; arguments as of `pack`."""
    p, scale = quantize_weight(weight)
    total = p.sum(1)
    rows = (_panel_rows(vector[:, None], kind).flatten() for vector in (scale, total * scale, (-128 * total).int()))
    return PackedWeight(*pack(p, kind)[:2], *rows)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return p, [out_features, in_features] int8, and weight_scale, [out_features] fp32."""
    scale = (weight.float().abs().amax(1) / 127).clamp_(min=1e-30)  # of a row of zeros
    return (weight.float() / scale[:, None]).round_().to(torch.int8), scale


def _panel_rows(weight: Tensor, kind: str | None) -> Tensor:
    """Return the rows of a weight by panel, after the last of them rows of zeros: [panels, 64, in_features]."""
    parts = weight.detach().chunk(2) if kind in GATED else (weight.detach(),)
    width = _PANEL // len(parts)
    return torch.cat([F.pad(part, (0, 0, 0, -len(part) % width)).unflatten(0, (-1, width)) for part in parts], 1)


def unpack(weight: PackedWeight, kind: str | None) -> Tensor:
    """Return the weight that `pack` was called with."""
    rows = weight.panels.transpose(1, 2).flatten(2)[..., : weight.shape[1]]
    parts = rows.chunk(2, 1) if kind in GATED else (rows,)
    return torch.cat([part.flatten(0, 1)[: weight.shape[0] // len(parts)] for part in parts])


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, kind: str | None, dtype: torch.dtype) -> Tensor:
    """Return activation(x @ weight.T + bias), [total_tokens, out_features] in `dtype`.

    x: [total_tokens, in_features] in the weight's dtype, or float32 or bfloat16 if that is int8. Rows are contiguous.
    """
    panels, steps = weight.panels.shape[:2]
    out_features = weight.shape[0] // (2 if kind in GATED else 1)
    y = torch.empty(x.shape[0], out_features, dtype=dtype)
    _kernels()[0].linear(
        torch.get_num_threads(),
        _DTYPES[weight.panels.dtype],
        _DTYPES[x.dtype],
        _DTYPES[dtype],
        0 if bias is None else _DTYPES[bias.dtype],
        _ACTIVATIONS[kind],
        *(*x.shape, out_features, panels, steps, x.stride(0)),
        *map(_address, (x, weight.panels, weight.scales, weight.totals, weight.starts, bias, y)),
    )
    return y


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    biases: Tensor | None,
    key_lengths: Tensor | None,
) -> Tensor:
    """Compute `attention_reference`: [total_tokens, heads * head_dim].

    qkv: [total_tokens, 3, heads, head_dim] with an even head_dim; biases: [1 or heads, 2 * n - 1] fp32, one per
    distance key - query from 1 - n on, n being the number of tokens of the longest text.
    """
    qkv, cu_seqlens = qkv.contiguous(), cu_seqlens.int()
    key_lengths = None if key_lengths is None else key_lengths.int()
    total_tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(total_tokens, heads * head_dim)
    bias_stride = reach = 0
    if biases is not None:  # by distance query - key, and as many more as a vector reads beyond the last query
        reach = biases.shape[1] // 2
        biases = F.pad(biases.flip(1) * math.log2(math.e), (0, _PANEL))
        bias_stride = biases.shape[1] if len(biases) > 1 else 0
    _kernels()[0].attention(
        torch.get_num_threads(),
        _DTYPES[qkv.dtype],
        *(len(cu_seqlens) - 1, heads, head_dim, -1 if window is None else window, bias_stride, reach, scale),
        *map(_address, (qkv, cu_seqlens, key_lengths, biases, out)),
    )
    return out


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, total: Tensor | None
) -> Tensor:
    """Return LayerNorm, or RMSNorm if bias is None, of x + residual, like x; write the sum into `total` if it is given.

    x, residual: [total_tokens, hidden]; weight, bias: [hidden]; total: contiguous, like x. All of one dtype.
    """
    y = torch.empty(x.shape, dtype=x.dtype)
    _kernels()[0].norm(
        torch.get_num_threads(),
        _DTYPES[x.dtype],
        *(*x.shape, x.stride(0), 0 if residual is None else residual.stride(0), eps),
        *map(_address, (x, residual, weight, bias, y, total)),
    )
    return y


def rotary(qkv: Tensor, cos_sin: Tensor) -> None:
    """Compute `rotary_reference` of contiguous tensors."""
    sizes = len(qkv), *qkv.shape[2:]
    _kernels()[0].rotary(torch.get_num_threads(), _DTYPES[qkv.dtype], *sizes, qkv.data_ptr(), cos_sin.data_ptr())


def maxima(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return max_t x[t] . weight[v] over the tokens t of each text, -inf without tokens: [batch, vocabulary] fp32.

    x: [total_tokens, hidden]; weight: [vocabulary, hidden], of one dtype, with contiguous rows and an even hidden.
    """
    y, cu_seqlens = torch.full((len(cu_seqlens) - 1, len(weight)), float("-inf")), cu_seqlens.int()
    _kernels()[0].maxima(
        torch.get_num_threads(),
        _DTYPES[x.dtype],
        *(len(y), x.shape[1], len(weight), x.stride(0), weight.stride(0)),
        *map(_address, (x, weight, cu_seqlens, y)),
    )
    return y


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
