"""Every kernel beside its reference, its reference compiled and the library's own: pytest bench/kernels.py

Correct first, timed after. On CUDA: 32,768 tokens in fp16, timed by events on a GPU whose L2 a write of 1 GiB has
emptied (the launches queue behind it), medians. On a CPU the references run, to keep the harness itself in order.
`extra_info` has the rate and its share of the measured ceiling: a large copy for what memory bounds, a large product
for the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import ceilings
import pytest
import torch
from torch import Tensor

from unpadded_kernels import (
    activation,
    add_layer_norm,
    attention,
    embedding,
    linear_activation,
    linear_invariant,
    masked_mean_pool,
    pool,
    rotary_,
)
from unpadded_kernels.activation import activation_reference
from unpadded_kernels.attention import attention_block_m, attention_reference, tile_map_of
from unpadded_kernels.embedding import embedding_reference
from unpadded_kernels.layer_norm import add_layer_norm_reference
from unpadded_kernels.linear import linear_activation_reference, linear_invariant_reference, linear_invariant_triton
from unpadded_kernels.padded_pooling import masked_mean_pool_reference
from unpadded_kernels.pooling import pool_reference
from unpadded_kernels.rotary import rotary_reference

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.float16 if CUDA else torch.float32
TOKENS = 32768 if CUDA else 512
HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM = 768, 3072, 12, 64
ROUNDS = 50 if CUDA else 3
L2_BYTES = 2**30 if CUDA else 0
TOLERANCE = 1e-2 if CUDA else 1e-4

Provider = Callable[..., Tensor | None]


@dataclass(frozen=True)
class Case:
    """One op at one shape. work: bytes moved where memory bounds it, else flops; providers: by name, one meaning."""

    arguments: tuple[Any, ...]
    work: int
    memory: bool
    providers: dict[str, Provider]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def add_layer_norm_case() -> Case:
    arguments = randn(TOKENS, HIDDEN), randn(TOKENS, HIDDEN), randn(HIDDEN), randn(HIDDEN), 1e-12
    work = 3 * arguments[0].nbytes
    return Case(arguments, work, True, providers(add_layer_norm, add_layer_norm_reference))


def embedding_case() -> Case:
    ids = torch.randint(30528, (TOKENS,), device=DEVICE, dtype=torch.int32)
    arguments = ids, ids, randn(30528, HIDDEN), randn(HIDDEN), None, randn(HIDDEN), randn(HIDDEN), 1e-12
    work = 2 * TOKENS * HIDDEN * DTYPE.itemsize
    return Case(arguments, work, True, providers(embedding, embedding_reference))


def swiglu_case() -> Case:
    x = randn(TOKENS, 2 * INTERMEDIATE)
    return Case((x, "swiglu"), x.nbytes * 3 // 2, True, providers(activation, activation_reference))


def rotary_case() -> Case:
    qkv, angle = randn(TOKENS, 3, HEADS, HEAD_DIM), 100 * torch.rand(TOKENS, HEAD_DIM // 2, device=DEVICE)
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=-1)  # turned in place again and again, qkv keeps its size
    return Case((qkv, cos_sin), qkv.nbytes * 4 // 3 + cos_sin.nbytes, True, providers(rotary_, rotary_reference))


def mean_pool_case() -> Case:
    hidden, cu_seqlens = randn(TOKENS, HIDDEN), packed(512)
    arguments = hidden, cu_seqlens, "mean", True, HIDDEN, True
    return Case(arguments, hidden.nbytes, True, {"unpadded": pool, "reference": pool_reference})


def padded_mean_pool_case() -> Case:
    hidden = randn(TOKENS // 512, 512, HIDDEN)
    arguments = hidden, torch.ones(hidden.shape[:2], device=DEVICE, dtype=torch.int64), True
    return Case(arguments, hidden.nbytes, True, providers(masked_mean_pool, masked_mean_pool_reference))


def attention_case(length: int) -> Case:
    qkv, cu_seqlens = randn(TOKENS, 3, HEADS, HEAD_DIM), packed(length)
    lengths = cu_seqlens.diff().tolist()
    tile_map = tile_map_of(lengths, attention_block_m(DTYPE, HEAD_DIM, DEVICE)).to(DEVICE)
    arguments = qkv, cu_seqlens, max(lengths), HEAD_DIM**-0.5, None, None, tile_map
    work = sum(4 * HEADS * HEAD_DIM * length * length for length in lengths)
    found: dict[str, Provider] = {"unpadded": attention, "reference": attention_reference}
    return Case(arguments, work, False, found | ({"torch FA2": _torch_attention} if CUDA else {}))


def linear_case(inner: int, outer: int) -> Case:
    arguments = randn(TOKENS, inner), randn(outer, inner) * inner**-0.5, randn(outer)
    found = {"unpadded": linear_invariant, "reference": linear_invariant_reference}
    return Case(arguments, 2 * TOKENS * inner * outer, False, found)


def linear_swiglu_case() -> Case:
    arguments = randn(TOKENS, HIDDEN), randn(2 * INTERMEDIATE, HIDDEN) * HIDDEN**-0.5, None, "swiglu"
    found: dict[str, Provider] = {"unpadded": linear_activation, "reference": linear_activation_reference}
    fused: dict[str, Provider] = {"unpadded, fused": linear_invariant_triton} if CUDA else {}
    return Case(arguments, 4 * TOKENS * HIDDEN * INTERMEDIATE, False, found | fused)


CASES: dict[str, Callable[[], Case]] = {
    "add_layer_norm": add_layer_norm_case,
    "embedding": embedding_case,
    "swiglu": swiglu_case,
    "rotary": rotary_case,
    "mean_pool": mean_pool_case,
    "padded_mean_pool": padded_mean_pool_case,
    "linear 768 to 2304": lambda: linear_case(768, 2304),
    "linear 3072 to 768": lambda: linear_case(3072, 768),
    "linear and swiglu": linear_swiglu_case,
    **{f"attention, texts of {n}": lambda n=n: attention_case(n) for n in (128, 512, 2048, 8192) if n <= TOKENS},
}


def packed(length: int) -> Tensor:
    """cu_seqlens of texts of one length."""
    return torch.arange(0, TOKENS + 1, length, device=DEVICE, dtype=torch.int32)


def providers(op: Provider, reference: Provider) -> dict[str, Provider]:
    compiled: dict[str, Provider] = {"torch.compile": torch.compile(reference, dynamic=False)} if CUDA else {}
    return {"unpadded": op, "reference": reference} | compiled


def _torch_attention(
    qkv: Tensor, cu_seqlens: Tensor, longest: int, scale: float, _window: None, _slopes: None, _map: Tensor
) -> Tensor:
    q, k, v = qkv.unbind(1)
    forward = torch.ops.aten._flash_attention_forward
    return forward(q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, False, False, scale=scale)[0].flatten(1)


class Instant:
    """A moment on the GPU's clock. pytest-benchmark subtracts one from another."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start: Self) -> float:
        self.event.synchronize()
        return start.event.elapsed_time(self.event) / 1e3


@pytest.fixture(scope="session")
def copy_rate() -> float:
    return ceilings.copy_rate(DEVICE)


@pytest.fixture(scope="session")
def product_rate() -> float:
    return ceilings.product_rate(DEVICE, DTYPE)


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]()


NAMES = ("unpadded", "unpadded, fused", "reference", "torch.compile", "torch FA2")


@pytest.mark.benchmark(timer=Instant if CUDA else time.perf_counter)
@pytest.mark.parametrize("provider", NAMES)
@pytest.mark.parametrize("case", CASES, indirect=True, ids=str)
def test_kernel(benchmark, case: Case, provider: str, copy_rate: float, product_rate: float) -> None:
    if provider not in case.providers:
        pytest.skip("not a provider of this op here")
    run = case.providers[provider]
    assert_correct(run, case)
    emptied = torch.empty(L2_BYTES, dtype=torch.uint8, device=DEVICE)

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        emptied.zero_()
        return case.arguments, {}

    benchmark.pedantic(run, setup=setup, rounds=ROUNDS, iterations=1, warmup_rounds=2)
    rate = case.work / benchmark.stats.stats.median
    text = f"{rate / 1e9:,.0f} GB/s" if case.memory else f"{rate / 1e12:.3g} TFLOP/s"
    share = rate / (copy_rate if case.memory else product_rate)
    benchmark.extra_info |= {"provider": provider, "rate": text, "share": share}


def assert_correct(run: Provider, case: Case) -> None:
    """Against the reference in the same dtype, by relative Frobenius norm; an op in place by what it leaves."""

    def result_of(provider: Provider) -> Tensor:
        first = case.arguments[0].clone()
        result = provider(first, *case.arguments[1:])
        return (first if result is None else result).float()

    expected = result_of(case.providers["reference"])
    error = ((result_of(run) - expected).norm() / expected.norm()).item()
    assert error <= TOLERANCE, f"relative error {error:.2g}"
