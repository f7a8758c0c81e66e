"""Operations to benchmark: inputs at one shape, the kernel, its reference, and other libraries' implementations.

On CUDA the shapes are those of a 768-wide encoder over 32,768 tokens in fp16. On a CPU they are tiny, to test the
benchmarks themselves. Liger and flash-attn take part where they are installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unpadded_kernels import (
    activation,
    add_layer_norm,
    attention,
    embedding,
    expert_mlp,
    linear,
    linear_activation,
    linear_invariant,
    masked_mean_pool,
    matryoshka,
    mean_pool,
    pre_layer_norm,
    rms_norm,
    rotary_,
    vocabulary_max,
)
from unpadded_kernels.activation import activation_reference
from unpadded_kernels.attention import attention_reference, make_tile_map
from unpadded_kernels.embedding import embedding_reference
from unpadded_kernels.layer_norm import (
    add_layer_norm_reference,
    pre_layer_norm_reference,
    rms_norm_reference,
)
from unpadded_kernels.linear import FUSES_ACTIVATION, linear_activation_reference, linear_invariant_reference
from unpadded_kernels.matryoshka import matryoshka_reference
from unpadded_kernels.moe import expert_mlp_reference
from unpadded_kernels.pooling import masked_mean_pool_reference, mean_pool_reference
from unpadded_kernels.rotary import rotary_reference
from unpadded_kernels.tiles import attention_block_m
from unpadded_kernels.vocabulary_max import vocabulary_max_reference

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.float16 if CUDA else torch.float32
TOKENS, VOCABULARY, EXPERTS = (32768, 30528, 8) if CUDA else (512, 100, 4)
HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM = (768, 3072, 12, 64) if CUDA else (128, 256, 2, 64)
TOP = 2  # experts per token
TOLERANCE = 1e-2 if CUDA else 1e-4

Provider = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One operation at one shape, and the functions that compute it, by name."""

    arguments: tuple[Any, ...]
    work: int  # bytes moved if memory_bound, else flops
    memory_bound: bool
    providers: dict[str, Provider]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def norm_case(op: Provider, reference: Provider, passes: float) -> Case:
    """passes: how often a row is read or written in 16 bits."""
    arguments = randn(TOKENS, HIDDEN), randn(TOKENS, HIDDEN), randn(HIDDEN), randn(HIDDEN), 1e-12
    has_liger = op is add_layer_norm and installed("liger_kernel")
    liger: dict[str, Provider] = {"Liger": _liger_layer_norm} if has_liger else {}
    return Case(arguments, int(passes * arguments[0].nbytes), True, providers(op, reference) | liger)


def rms_norm_case() -> Case:
    arguments = randn(TOKENS, HIDDEN), randn(TOKENS, HIDDEN), randn(HIDDEN), 1e-6
    return Case(arguments, 4 * arguments[0].nbytes, True, providers(rms_norm, rms_norm_reference))


def embedding_case() -> Case:
    ids = torch.randint(VOCABULARY, (TOKENS,), device=DEVICE, dtype=torch.int32)
    arguments = ids, ids, None, randn(VOCABULARY, HIDDEN), randn(2, HIDDEN), None, randn(HIDDEN), randn(HIDDEN), 1e-12
    work = 2 * TOKENS * HIDDEN * DTYPE.itemsize
    return Case(arguments, work, True, providers(embedding, embedding_reference))


def swiglu_case() -> Case:
    x = randn(TOKENS, 2 * INTERMEDIATE)
    liger: dict[str, Provider] = {"Liger": _liger_swiglu} if installed("liger_kernel") else {}
    return Case((x, "swiglu"), x.nbytes * 3 // 2, True, providers(activation, activation_reference) | liger)


def rotary_case() -> Case:
    qkv, cos_sin = randn(TOKENS, 3, HEADS, HEAD_DIM), table()  # in place; rotating it repeatedly keeps its norm
    return Case((qkv, cos_sin), qkv.nbytes * 4 // 3 + cos_sin.nbytes, True, providers(rotary_, rotary_reference))


def mean_pool_case() -> Case:
    hidden, cu_seqlens = randn(TOKENS, HIDDEN), packed(512)
    arguments = hidden, cu_seqlens
    return Case(arguments, hidden.nbytes, True, {"unpadded": mean_pool, "reference": mean_pool_reference})


def matryoshka_case() -> Case:
    pooled = torch.randn(TOKENS, HIDDEN, device=DEVICE)
    found = {"unpadded": matryoshka, "reference": matryoshka_reference}
    return Case((pooled, True, HIDDEN, True), 2 * pooled.nbytes, True, found)


def padded_mean_pool_case() -> Case:
    hidden = randn(TOKENS // 512, 512, HIDDEN)
    arguments = hidden, torch.ones(hidden.shape[:2], device=DEVICE, dtype=torch.int64), True
    return Case(arguments, hidden.nbytes, True, providers(masked_mean_pool, masked_mean_pool_reference))


def attention_case(*lengths: int, window: int | None = None, alibi: bool = False, reach: int = 0) -> Case:
    """Repeat texts of these lengths up to TOKENS. With a window only the keys inside it count as flops."""
    qkv, cu_seqlens = randn(TOKENS, 3, HEADS, HEAD_DIM), packed(*lengths)
    lengths = tuple(cu_seqlens.diff().tolist())
    tile_map = make_tile_map(lengths, attention_block_m(DTYPE, HEAD_DIM, DEVICE)).to(DEVICE)
    slopes = torch.rand(HEADS, device=DEVICE) if alibi else None
    bias = [torch.randn(HEADS, 2 * reach + 1, device=DEVICE)] if reach else []
    arguments = qkv, cu_seqlens, max(lengths), HEAD_DIM**-0.5, window, slopes, tile_map, *bias
    seen = sum(length * (length if window is None else min(length, 2 * window + 1)) for length in lengths)
    found: dict[str, Provider] = {"unpadded": attention, "reference": attention_reference}
    if window is None and not alibi and not reach:
        found |= {"torch FA2": _torch_attention} if CUDA else {}
        found |= {"cuDNN": _cudnn_attention} if CUDA and len(set(lengths)) == 1 else {}
        found |= {"flash-attn": _flash_attn} if CUDA and installed("flash_attn") else {}
    return Case(arguments, 4 * HEADS * HEAD_DIM * seen, False, found)


def linear_case(inner: int, outer: int) -> Case:
    arguments = randn(TOKENS, inner), weights(outer, inner), randn(outer)
    found = {"unpadded": linear_invariant, "unpadded, library": linear, "reference": linear_invariant_reference}
    return Case(arguments, 2 * TOKENS * inner * outer, False, found)


def linear_swiglu_case(tokens: int) -> Case:
    arguments = randn(tokens, HIDDEN), weights(2 * INTERMEDIATE, HIDDEN), None, "swiglu"
    found: dict[str, Provider] = {"unpadded": linear_activation, "reference": linear_activation_reference}
    for name, fuses in FUSES.items():
        found[name] = partial(with_fusion, fuses, linear_activation)
    return Case(arguments, 4 * tokens * HIDDEN * INTERMEDIATE, False, found)


def expert_mlp_case() -> Case:
    up = torch.stack([weights(INTERMEDIATE, HIDDEN) for _ in range(EXPERTS)])
    down = torch.stack([weights(HIDDEN, INTERMEDIATE) for _ in range(EXPERTS)])
    arguments = randn(TOKENS, HIDDEN), weights(EXPERTS, HIDDEN), up, down, randn(HIDDEN), TOP, "gelu"
    found: dict[str, Provider] = {"unpadded": expert_mlp, "reference": expert_mlp_reference}
    return Case(arguments, 4 * TOP * TOKENS * HIDDEN * INTERMEDIATE, False, found)


def vocabulary_max_case() -> Case:
    arguments = randn(TOKENS, HIDDEN), weights(VOCABULARY, HIDDEN), torch.randn(VOCABULARY, device=DEVICE), packed(160)
    found: dict[str, Provider] = {"unpadded": vocabulary_max, "reference": vocabulary_max_reference}
    return Case(arguments, 2 * TOKENS * HIDDEN * VOCABULARY, False, found)


# Matmuls and attention first: they decide which kernels run, and a run may be interrupted.
CASES: dict[str, Callable[[], Case]] = {
    "linear, qkv": lambda: linear_case(HIDDEN, 3 * HIDDEN),
    "linear, out": lambda: linear_case(HIDDEN, HIDDEN),
    "linear, gate-up": lambda: linear_case(HIDDEN, 2 * INTERMEDIATE),
    "linear, down": lambda: linear_case(INTERMEDIATE, HIDDEN),
    "linear and swiglu": lambda: linear_swiglu_case(TOKENS),
    **{f"attention, texts of {n}": lambda n=n: attention_case(n) for n in (512, 8192, 2048, 128) if n <= TOKENS},
    # with incomplete tiles
    "linear and swiglu, 333 tokens": lambda: linear_swiglu_case(333),
    "attention, mixed texts": lambda: attention_case(1, 7, 64, 127, 128, 129, 300, 513),
    "attention, window of 64": lambda: attention_case(min(TOKENS, 8192), window=64),
    "attention, ALiBi": lambda: attention_case(min(TOKENS, 2048), alibi=True),
    "attention, position bias": lambda: attention_case(min(TOKENS, 512), reach=91),
    "add_layer_norm": lambda: norm_case(add_layer_norm, add_layer_norm_reference, 3),
    "pre_layer_norm": lambda: norm_case(pre_layer_norm, pre_layer_norm_reference, 4),
    "rms_norm": rms_norm_case,
    "embedding": embedding_case,
    "swiglu": swiglu_case,
    "rotary": rotary_case,
    "mean_pool": mean_pool_case,
    "matryoshka": matryoshka_case,
    "padded_mean_pool": padded_mean_pool_case,
    "expert_mlp": expert_mlp_case,
    "vocabulary_max": vocabulary_max_case,
}


def weights(rows: int, columns: int) -> Tensor:
    return randn(rows, columns) * columns**-0.5


def table() -> Tensor:
    """Return cos and sin of random angles, [TOKENS, HEAD_DIM]."""
    angle = 100 * torch.rand(TOKENS, HEAD_DIM // 2, device=DEVICE)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def packed(*lengths: int) -> Tensor:
    """Return cu_seqlens of texts of these lengths, repeated up to TOKENS."""
    ends = torch.tensor(lengths).repeat(TOKENS // sum(lengths) + 1).cumsum(0).clamp(max=TOKENS).unique()
    return torch.nn.functional.pad(ends, (1, 0)).to(DEVICE, torch.int32)


def providers(op: Provider, reference: Provider) -> dict[str, Provider]:
    compiled: dict[str, Provider] = {"torch.compile": torch.compile(reference, dynamic=False)} if CUDA else {}
    return {"unpadded": op, "reference": reference} | compiled


# Ways to compute `linear_activation`, and whether each is one kernel.
FUSES = {"unpadded, library": False, "unpadded, triton": True}


def with_fusion(fuses: bool, run: Callable[..., Any], *arguments: Any) -> Any:
    """Return run(*arguments) with `linear_activation` as one kernel or two."""
    before = FUSES_ACTIVATION.copy()
    FUSES_ACTIVATION.update(dict.fromkeys(before, fuses))
    try:
        return run(*arguments)
    finally:
        FUSES_ACTIVATION.update(before)


def _torch_attention(
    qkv: Tensor, cu_seqlens: Tensor, longest: int, scale: float, _window: None, _slopes: None, _map: Tensor
) -> Tensor:
    q, k, v = qkv.unbind(1)
    forward = torch.ops.aten._flash_attention_forward
    return forward(q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, False, False, scale=scale)[0].flatten(1)


def _cudnn_attention(
    qkv: Tensor, _cu_seqlens: Tensor, longest: int, scale: float, _window: None, _slopes: None, _map: Tensor
) -> Tensor:
    """Run cuDNN on a padded batch: the texts of these cases have one length."""
    q, k, v = qkv.view(-1, longest, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(len(qkv), -1)


def _flash_attn(
    qkv: Tensor, cu_seqlens: Tensor, longest: int, scale: float, _window: None, _slopes: None, _map: Tensor
) -> Tensor:
    from flash_attn import flash_attn_varlen_qkvpacked_func

    return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, longest, softmax_scale=scale).flatten(1)


def _scaled_mm(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, _bias: None, _kind: None, _dtype: torch.dtype
) -> Tensor:
    scales = {"scale_a": x_scale[:, None], "scale_b": weight_scale[None]}
    return torch._scaled_mm(x, weight.t(), **scales, out_dtype=torch.bfloat16)


def _liger_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x + residual, weight, bias, eps)


def _liger_swiglu(x: Tensor, _kind: str) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(*x.chunk(2, dim=-1))


def assert_correct(run: Provider, case: Case) -> None:
    error = relative_error(run, case)
    assert error <= TOLERANCE, f"relative error {error:.2g}"


def relative_error(run: Provider, case: Case) -> float:
    """Return the relative Frobenius norm of the difference to the reference in the same dtype.

    An operation in place is compared by its changed input, one with several results by the first; tests/ compares the
    others.
    """

    def result_of(provider: Provider) -> Tensor:
        first = case.arguments[0].clone()
        result = provider(first, *case.arguments[1:])
        result = result[0] if isinstance(result, tuple) else result
        return (first if result is None else result).float()

    expected = result_of(case.providers["reference"])
    return ((result_of(run) - expected).norm() / expected.norm()).item()
