"""Speed of every kernel, its reference, the compiled reference and other libraries' kernels: pytest bench/ops.py

Each result is checked before it is timed. On CUDA, medians of event timings with a cold L2 cache. `extra_info` has the
rate and its share of the ceiling measured here: a large copy for memory-bound operations, a large matmul in 16 bits for
the others.
"""

from __future__ import annotations

import time
from typing import Any, Self

import ceilings
import pytest
import torch
from op_cases import CASES, CUDA, DEVICE, DTYPE, Case, assert_correct

from unpadded.cli.benchmark import machine

SECONDS, ROUNDS = (1.0, 50) if CUDA else (0.1, 3)  # maximum per provider of a case
L2_BYTES = 2**30 if CUDA else 0  # more than any L2 cache


class Instant:
    """A time stamp on the GPU's clock, or the host's without a GPU. pytest-benchmark subtracts one from another."""

    def __init__(self) -> None:
        self.time = time.perf_counter()
        if CUDA:
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()

    def __sub__(self, start: Self) -> float:
        if not CUDA:
            return self.time - start.time
        self.event.synchronize()
        return start.event.elapsed_time(self.event) / 1e3


@pytest.fixture(scope="session")
def copy_rate() -> float:
    return ceilings.copy_rate(DEVICE)


@pytest.fixture(scope="session")
def matmul_rate() -> float:
    return machine.matmul_rate(DEVICE, DTYPE, 20 if CUDA else 1)


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]()


NAMES = (
    "unpadded",
    "unpadded, library",
    "unpadded, triton",
    "reference",
    "torch.compile",
    "torch FA2",
    "cuDNN",
    "torch._scaled_mm",
    "flash-attn",
    "Liger",
)


@pytest.mark.benchmark(timer=Instant)
@pytest.mark.parametrize("provider", NAMES)
@pytest.mark.parametrize("case", CASES, indirect=True, ids=str)
def test_kernel(benchmark, request: pytest.FixtureRequest, case: Case, provider: str) -> None:
    if provider not in case.providers:
        pytest.skip("not a provider of this operation here")
    run = case.providers[provider]
    assert_correct(run, case)
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device=DEVICE)

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        flush.zero_()  # evict the inputs from the L2 cache
        return case.arguments, {}

    once = min(machine.seconds(lambda: run(*case.arguments), DEVICE, 2))
    rounds = max(3, min(ROUNDS, int(SECONDS / once)))
    benchmark.pedantic(run, setup=setup, rounds=rounds, iterations=1, warmup_rounds=1)
    rate = case.work / benchmark.stats.stats.median
    text = f"{rate / 1e9:,.0f} GB/s" if case.memory_bound else f"{rate / 1e12:.3g} TFLOP/s"
    share = rate / request.getfixturevalue("copy_rate" if case.memory_bound else "matmul_rate")
    kernel = request.node.callspec.params["case"]
    rows = len(case.arguments[0])
    benchmark.extra_info |= {"kernel": kernel, "provider": provider, "rate": text, "share": share, "rows": rows}
