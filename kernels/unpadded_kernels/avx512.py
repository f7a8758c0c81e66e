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
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels.activation import GATED

logger = logging.getLogger("unpadded")

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = "-O3 -fno-tree-coalesce-vars -fopenmp -ffp-contract=off -shared -fPIC"
FLAGS += " -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, "split": 3}
_ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "swiglu": 3, "geglu": 4}
_TYPES = {"i": ctypes.c_int, "l": ctypes.c_long, "f": ctypes.c_float, "p": ctypes.c_void_p}
_SIGNATURES = {
    "linear": "iillppp",
    "attention": "iillllllfppppp",
    "norm": "ilfllpplplppp",
    "layer": "illfllllfppppppppppp",
    "embedding": "ilfllpppp",
    "mean_pool": "iilllppp",
    "maxima": "iilllllpppp",
    "rotary": "iilllpp",
    "in_tiles": "il",
}
_PANEL = 64  # columns that are multiplied together; biases are read less than this far beyond the last query


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels compute with this dtype here: float32, bfloat16 or, for linear layers, int8."""
    return dtype in _kernels()[1]


def has_fast_bf16() -> bool:
    """Whether the kernels compute faster in bfloat16 than in float32 here."""
    return supports(torch.bfloat16) and bool(_kernels()[0].has_fast_bf16())


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
    if torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx():
        flags.append("-DAMX")
    try:
        library = ctypes.CDLL(str(_compiled(flags)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        logger.warning("slower kernels run: those for AVX-512 need gcc and a writable XDG_CACHE_HOME, but %s", reason)
        return None, ()
    for name, types in _SIGNATURES.items():
        getattr(library, name).argtypes = [_TYPES[one] for one in types]
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


def can_pack(weight: Tensor) -> bool:
    """Whether a weight can be packed: inputs are read four bytes at a time."""
    return supports(weight.dtype) and weight.shape[1] % 2 == 0 and weight.device.type == "cpu"


class PackedLinear:
    """A linear layer, activation(x @ weight.T + bias), that holds a copy of its weight in the layout of the kernels."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: str | None, int8: torch.dtype | None = None
    ) -> None:
        """weight: [out_features, in_features], one that `can_pack`; int8: with 8-bit integers, the dtype of the result.

        A gated activation combines the first half of the rows, gate, with the second one, up.
        """
        self.activation, self.dtype, self.int8 = activation, int8 or weight.dtype, int8 is not None
        self.shape, self.out_features, self.bias = weight.shape, len(weight) // (2 if activation in GATED else 1), bias
        vectors: list[Tensor | None] = [None] * 3
        if self.int8:
            weight, scale = quantize_weight(weight)
            total = weight.sum(1)
            vectors = [self._by_panel(one[:, None]).flatten() for one in (scale, total * scale, (-128 * total).int())]
        tiles = weight.shape[1] % 32 == 0 and _kernels()[0].in_tiles(_DTYPES["split"], 16)
        factors = "split" if tiles and weight.dtype == torch.float32 else weight.dtype
        weight = split_weight(weight) if factors == "split" else weight
        rows, per_step = self._by_panel(weight), 4 // weight.itemsize
        rows = F.pad(rows, (0, -rows.shape[-1] % per_step)).unflatten(-1, (-1, per_step))
        self.panels = rows.transpose(1, 2).contiguous()  # [panels, steps of four bytes, 64, elements in a step]
        self._memory = self.panels, *vectors, None if bias is None else bias.detach()
        dtypes = factors, self.dtype, torch.float32 if bias is None else bias.dtype
        numbers = *(_DTYPES[one] for one in dtypes), _ACTIVATIONS[activation]
        sizes = self.shape[1], self.out_features, *self.panels.shape[:2]
        self.members = [*numbers, *sizes, *map(_address, self._memory)]
        self._struct = torch.tensor(self.members)

    def _by_panel(self, weight: Tensor) -> Tensor:
        """Return the rows of a weight by panel, after the last of them rows of zeros: [panels, 64, in_features].

        With a gated activation a panel has 32 gate rows, then their 32 up rows.
        """
        parts = weight.detach().chunk(2) if self.activation in GATED else (weight.detach(),)
        width = _PANEL // len(parts)
        return torch.cat([F.pad(part, (0, 0, 0, -len(part) % width)).unflatten(0, (-1, width)) for part in parts], 1)

    def unpack(self) -> Tensor:
        """Return the weight, of one that is not int8."""
        rows = self.panels.transpose(1, 2).flatten(2)
        if rows.shape[2] == 3 * self.shape[1]:  # split
            rows = rows.unflatten(-1, (-1, 3, 32)).float().flip(-2).sum(-2).flatten(-2)
        parts = rows[..., : self.shape[1]].chunk(2 if self.activation in GATED else 1, 1)
        return torch.cat([part.flatten(0, 1)[: self.shape[0] // len(parts)] for part in parts])

    def __call__(self, x: Tensor) -> Tensor:
        """Return [total_tokens, out_features].

        x: [total_tokens, in_features], with contiguous rows, in the weight's dtype; fp32 or bf16 if that is int8.
        """
        y = torch.empty(x.shape[0], self.out_features, dtype=self.dtype)
        sizes = torch.get_num_threads(), _DTYPES[x.dtype], x.shape[0], x.stride(0)
        _kernels()[0].linear(*sizes, *map(_address, (self._struct, x, y)))
        return y


def split_weight(weight: Tensor) -> Tensor:
    """Return [out_features, 3 * in_features] bf16: 32 features are three times 32 parts, whose sums they are."""
    first = weight.detach().bfloat16()
    second = (weight.detach() - first.float()).bfloat16()
    third = (weight.detach() - first.float() - second.float()).bfloat16()
    return torch.stack([part.unflatten(1, (-1, 32)) for part in (first, second, third)], 2).flatten(1)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return p, [out_features, in_features] int8, and weight_scale, [out_features] fp32."""
    scale = (weight.float().abs().amax(1) / 127).clamp_(min=1e-30)  # of a row of zeros
    return (weight.float() / scale[:, None]).round_().to(torch.int8), scale


class PackedLayer:
    """A layer of an encoder in one call. With attended = attention(rotary(qkv(x))), x and r the residual:

        x, r = attention_norm(out(attended), r)        x, r = mlp_norm(down(up(x)), r)

    A norm returns its result and the next residual: the sum before it with `prenorm`, otherwise the result, too.
    """

    def __init__(
        self, linears: Sequence[PackedLinear], norms: Sequence[Sequence[Any]], heads: int, eps: float, prenorm: bool
    ) -> None:
        """linears: qkv, out, up and down; norms: weight and bias of each, None for RMSNorm, in the dtype of out."""
        vectors = [None if one is None else one.detach() for norm in norms for one in norm]
        self._memory, self._eps, self._prenorm = (linears, vectors), eps, prenorm
        members = [member for linear in linears for member in linear.members]
        for norm in vectors[:2], vectors[2:]:
            members += _DTYPES[linears[1].dtype], linears[1].out_features, *map(_address, norm)
        self._struct = torch.tensor([*members, heads])

    def __call__(
        self, x: Tensor, residual: Tensor, cos_sin: Tensor | None, selected: Tensor | None, memory: Tensor, *mask: Any
    ) -> tuple[Tensor, Tensor]:
        """Overwrite x and residual, or return those of the selected tokens: [n, hidden].

        x, residual: [total_tokens, hidden], contiguous; selected: [n] int32; memory: at least 4 * total_tokens * hidden
        fp32, for q, k, v and the result of attention; mask: see `_mask`.
        """
        if self._prenorm and residual is x:
            residual = x.clone()
        y = x if selected is None else torch.empty(len(selected), x.shape[1], dtype=x.dtype)
        total = residual if selected is None else torch.empty_like(y)
        numbers, tensors = _mask(*mask)
        sizes = torch.get_num_threads(), len(x), len(y), self._eps
        pointers = self._struct, x, residual, cos_sin, selected, memory, y, total if self._prenorm else None, *tensors
        _kernels()[0].layer(*sizes, *numbers, *map(_address, pointers))
        return y, total if self._prenorm else y


def attention(qkv: Tensor, *mask: Any) -> Tensor:
    """Compute `attention_reference`: [total_tokens, heads * head_dim].

    qkv: [total_tokens, 3, heads, head_dim] with an even head_dim; mask: see `_mask`.
    """
    qkv, (numbers, tensors) = qkv.contiguous(), _mask(*mask)
    total_tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(total_tokens, heads * head_dim)
    sizes = torch.get_num_threads(), _DTYPES[qkv.dtype], heads, head_dim
    _kernels()[0].attention(*sizes, *numbers, *map(_address, (qkv, out, *tensors)))
    return out


def _mask(
    cu_seqlens: Tensor, scale: float, window: int | None, biases: Tensor | None, key_lengths: Tensor | None
) -> tuple[tuple[float, ...], tuple[Tensor | None, ...]]:
    """Return the arguments of attention in C, and the tensors whose addresses follow.

    biases: [1 or heads, 2 * n - 1] fp32, one per distance key - query from 1 - n on, n being the number of tokens of
    the longest text.
    """
    bias_stride = reach = 0
    if biases is not None:  # by distance query - key, and as many more as a vector reads beyond the last query
        reach = biases.shape[1] // 2
        biases = F.pad(biases.flip(1) * math.log2(math.e), (0, _PANEL))
        bias_stride = biases.shape[1] if len(biases) > 1 else 0
    numbers = cu_seqlens.shape[0] - 1, -1 if window is None else window, bias_stride, reach, scale
    return numbers, (cu_seqlens.int(), None if key_lengths is None else key_lengths.int(), biases)


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, total: Tensor | None
) -> Tensor:
    """Return LayerNorm, or RMSNorm if bias is None, of x + residual, like x; write the sum into `total` if it is given.

    x, residual: [total_tokens, hidden]; weight, bias: [hidden]; total: contiguous, like x. All of one dtype.
    """
    y = torch.empty(x.shape, dtype=x.dtype)
    sizes = torch.get_num_threads(), x.shape[0], eps, _DTYPES[x.dtype], x.shape[1]
    rows = x.stride(0), _address(x), 0 if residual is None else residual.stride(0), _address(residual)
    _kernels()[0].norm(*sizes, _address(weight), _address(bias), *rows, _address(y), _address(total))
    return y


def embedding(
    ids: tuple[Tensor, Tensor | None, Tensor | None],
    tables: tuple[Tensor, Tensor | None, Tensor | None],
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """Return LayerNorm of the sum of each token's rows of the tables, whose rows are contiguous, all of one dtype.

    ids: [total_tokens] int32, or None for zeros; tables: [rows, hidden] or None.
    """
    pairs = zip(tables, ids, strict=True)
    members = [(0 if table is None else table.stride(0), _address(table), _address(one)) for table, one in pairs]
    y = torch.empty(ids[0].shape[0], weight.shape[0], dtype=weight.dtype)
    sizes = torch.get_num_threads(), y.shape[0], eps, _DTYPES[weight.dtype], y.shape[1]
    struct = (ctypes.c_long * 9)(*chain.from_iterable(members))
    _kernels()[0].embedding(*sizes, _address(weight), _address(bias), struct, _address(y))
    return y


def mean_pool(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Compute `mean_pool_reference`; the rows of hidden and cu_seqlens are contiguous."""
    y = torch.empty(len(cu_seqlens) - 1, hidden.shape[1])
    sizes = torch.get_num_threads(), _DTYPES[hidden.dtype], *y.shape, hidden.stride(0)
    _kernels()[0].mean_pool(*sizes, *map(_address, (hidden, cu_seqlens, y)))
    return y


def rotary(qkv: Tensor, cos_sin: Tensor) -> None:
    """Compute `rotary_reference` of contiguous tensors."""
    sizes = torch.get_num_threads(), _DTYPES[qkv.dtype], len(qkv), *qkv.shape[2:]
    _kernels()[0].rotary(*sizes, *map(_address, (qkv, cos_sin)))


def maxima(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return max_t x[t] . weight[v] over the tokens t of each text, -inf without tokens: [batch, vocabulary] fp32.

    x: [total_tokens, hidden]; weight: [vocabulary, hidden], of one dtype, with contiguous rows and an even hidden.
    """
    y, cu_seqlens = torch.full((len(cu_seqlens) - 1, len(weight)), float("-inf")), cu_seqlens.int()
    sizes = torch.get_num_threads(), _DTYPES[x.dtype], len(y), x.shape[1], len(weight), x.stride(0), weight.stride(0)
    _kernels()[0].maxima(*sizes, *map(_address, (x, weight, cu_seqlens, y)))
    return y


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
