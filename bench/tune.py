"""Other tiles than the table's, beside the table's: what a GPU says of each, correct first.

    PYTHONPATH=engine:kernels:tests python bench/tune.py [--only NAME ...] [--out FILE.json]

For each entry of `tiles.py` that decides a rate, candidates run in its place, in fp16 at the shapes of `op_cases`, and
the fastest is named; one that is wrong, or does not launch, says so. All are compiled beforehand, many beside each
other: what is timed comes from triton's cache. The winner is entered by hand, with where and when. What decides
FUSED_ACTIVATION and FUSED_ROTARY `ops.py` shows, both ways side by side. On a CPU the CPU's bodies run, to keep the
harness itself in order. The last line on stdout is JSON.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import harness
import op_cases
import torch

from unpadded.cli.benchmark.machine import seconds
from unpadded_kernels import tiles
from unpadded_kernels.tiles import Tile

TIMES = 20  # runs of a candidate at one shape


@dataclass(frozen=True)
class Sweep:
    """Candidates for one place of the table, and the cases of `ops` that they are timed by."""

    cases: tuple[str, ...]
    provider: str
    table: dict[Any, Any]
    key: Any
    candidates: tuple[Any, ...]


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--only", nargs="*", help="sweeps by name (default: all)")
    args = parser.parse_args()
    found = sweeps(tiles.generation(op_cases.DEVICE))
    names = args.only or list(found)
    if unknown := sorted(set(names) - found.keys()):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(found)}")
    with harness.reporting(args.out) as result:
        result["sweeps"] = {}
        compile_all({name: len(found[name].candidates) for name in names})
        for name in names:
            result["sweeps"][name] = rows = []
            print(f"{name}, the table's first:")
            for row in run(found[name]):
                rows.append(row)
                print(f"  {row['seconds'] * 1e6:,.1f} us" if "seconds" in row else f"  {row['failed']}", row["tile"])
            best = min((row for row in rows if "seconds" in row), key=lambda row: row["seconds"], default=None)
            print(f"  fastest: {best['tile']}" if best else "  none runs")


def sweeps(generation: int) -> dict[str, Sweep]:
    fp32 = torch.finfo(op_cases.DTYPE).bits == 32
    key_generation = 80 if fp32 else generation
    tma = not fp32 and generation >= 90
    attention_cases = tuple(name for name in op_cases.CASES if name.startswith("attention, texts of"))
    attention = tuple(
        Tile(block_m=m, block_n=n, num_warps=warps, num_stages=stages, tma=tma, overlap=overlap)
        for m, n, warps, stages, overlap in itertools.product((64, 128), (64, 128), (4, 8), (2, 3), {tma, False})
    )
    products = tuple(
        Tile(block_m=m, block_n=n, block_k=64, num_warps=warps, num_stages=stages, tma=tma, at_once=at_once)
        for m, n, warps, stages, at_once in itertools.product((128, 256), (64, 128, 256), (4, 8), (3, 4), (1, 2))
        if m * n <= 128 * 256 and (at_once == 1 or warps == 4)
    )
    rows = ("add_layer_norm", "embedding", "swiglu", "rotary")
    linear = {
        "nothing": ("linear, qkv", "linear, down"),
        "gated": ("linear and swiglu",),
        "rotary": ("linear and rotary",),
    }
    fused = "unpadded" if fp32 else "unpadded, fused"
    return {
        "attention": Sweep(
            attention_cases, "unpadded", tiles.ATTENTION, (fp32, op_cases.HEAD_DIM, key_generation), attention
        ),
        **{
            f"linear, {follows}": Sweep(
                *(cases, "unpadded" if follows == "nothing" else fused),
                *(tiles.LINEAR, (fp32, follows, key_generation)),
                # a gated tile holds its columns of both products
                tuple(one for one in products if follows != "gated" or one.block_m * one.block_n <= 128 * 128),
            )
            for follows, cases in linear.items()
        },
        "rows": Sweep(rows, "unpadded", vars(tiles), "_ROW_ELEMENTS_PER_WARP", (256, 512, 1024)),
    }


def compile_all(candidates: dict[str, int]) -> None:
    """Run each candidate once, in processes beside each other. candidates: how many there are, by sweep."""
    jobs = [(name, index) for name, count in candidates.items() for index in range(count)]
    workers = min(12, os.cpu_count() or 1)
    with contextlib.suppress(BrokenProcessPool), ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for failed in filter(None, pool.map(run_once, jobs)):
            print(f"  {failed}")


def run_once(job: tuple[str, int]) -> str | None:
    """What went wrong, if anything, with a candidate: its sweep's name, and its place there."""
    name, index = job
    sweep = sweeps(tiles.generation(op_cases.DEVICE))[name]
    sweep.table[sweep.key] = candidate = sweep.candidates[index]
    try:
        for case in map(op_cases.CASES.__getitem__, sweep.cases):
            made = case()
            made.providers[sweep.provider](*made.arguments)
    except Exception as error:  # whatever a compiler or a launch raises; `run` meets and reports it again
        return f"{name}, {candidate}: {type(error).__name__}"
    return None


def run(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """A row a candidate, the table's own first: the sum over the cases of the median seconds."""
    own = sweep.table[sweep.key]
    try:
        for candidate in (own, *(one for one in sweep.candidates if one != own)):
            sweep.table[sweep.key] = candidate
            row = {"tile": asdict(candidate) if isinstance(candidate, Tile) else candidate}
            try:
                yield row | {"seconds": sum(time_of(name, sweep.provider) for name in sweep.cases)}
            except Exception as error:  # whatever a compiler or a launch raises, the others still run
                yield row | {"failed": f"{type(error).__name__}: {error}"[:200]}
    finally:
        sweep.table[sweep.key] = own


def time_of(name: str, provider: str) -> float:
    torch.manual_seed(0)
    case = op_cases.CASES[name]()
    call = case.providers[provider]
    op_cases.assert_correct(call, case)
    return statistics.median(seconds(lambda: call(*case.arguments), op_cases.DEVICE, TIMES if op_cases.CUDA else 1))


if __name__ == "__main__":
    main()
