"""Time other tile sizes than those in `tiles.py` on a GPU, and check each for correctness first.

    PYTHONPATH=engine:kernels:tests python bench/tune.py [--only NAME ...] [--out FILE.json]

For each entry of `tiles.py` that decides a rate, candidates run in its place, in fp16 at the shapes of `op_cases`.
They are ranked by the geometric mean, over the cases, of the time relative to that of the table's tile; the seconds of
each case are printed and stored, too. A candidate that is wrong or does not launch is reported, and the others run. All
are compiled beforehand in parallel, so that timed runs find them in Triton's cache. Enter the fastest in `tiles.py` by
hand, with GPU and date. Whether a fused linear beats the library's matmul and a second kernel, `ops.py` measures. On a
CPU the CPU bodies run, which only tests this script. The last line on stdout is JSON.
"""

from __future__ import annotations

import contextlib
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
    """Candidates for one entry of a table in `tiles`, and the cases of `op_cases` that time them."""

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
            print("  time relative to the table's tile; us of " + "; ".join(found[name].cases))
            for row in run(found[name]):
                rows.append(row)
                print(f"  {timing(row)}, {row['tile']}" if "seconds" in row else f"  {row['failed']}, {row['tile']}")
            best = min((row for row in rows if "ratio" in row), key=lambda row: row["ratio"], default=None)
            print(f"  fastest: {best['tile']}" if best else "  no ranking: the table's tile does not run")


# Without those that lost when compiled for sm_90 (triton 3.6): attention and linears with more accumulators per thread
# than these spill registers or have their wgmmas serialized, attention with 64 queries per tile and 8 warps takes more
# wgmmas than its scores need, and two linears do not fit a multiprocessor.
# (block_m, block_n, num_warps, num_stages)
ATTENTION = (
    (128, 64, 4, 2),
    (128, 64, 4, 3),
    (128, 64, 8, 3),
    (128, 128, 8, 3),
)
# (block_m, block_n, num_warps, num_stages) by epilogue; a gated tile has block_n columns of gate and as many of up
LINEAR = {
    "nothing": ((128, 256, 8, 3), (256, 128, 8, 3), (128, 128, 8, 4)),
    "gated": ((128, 128, 8, 3), (256, 64, 8, 3)),
}
# (provider, cases) by epilogue
LINEAR_CASES = {
    "nothing": ("unpadded", ("linear, qkv", "linear, out", "linear, gate-up", "linear, down")),
    "gated": ("unpadded, triton", ("linear and swiglu",)),
}


def sweeps(generation: int) -> dict[str, Sweep]:
    fp32 = torch.finfo(op_cases.DTYPE).bits == 32
    key_generation = 80 if fp32 else generation
    tma = not fp32 and generation >= 90
    attention = tuple(
        Tile(block_m=m, block_n=n, num_warps=warps, num_stages=stages, tma=tma) for m, n, warps, stages in ATTENTION
    )
    attention_cases = tuple(name for name in op_cases.CASES if name.startswith("attention, texts of"))
    key: Any = op_cases.DTYPE.itemsize, op_cases.HEAD_DIM, key_generation
    found = {"attention": Sweep(attention_cases, "unpadded, triton", tiles.ATTENTION, key, attention)}
    for epilogue, shapes in LINEAR.items():
        candidates = tuple(
            Tile(block_m=m, block_n=n, block_k=64, num_warps=warps, num_stages=stages, tma=tma)
            for m, n, warps, stages in shapes
        )
        key = op_cases.DTYPE.itemsize, epilogue, key_generation
        provider, cases = LINEAR_CASES[epilogue]
        found[f"linear, {epilogue}"] = Sweep(cases, provider, tiles.LINEAR, key, candidates)
    # fewer elements per warp need barriers: predicted to be slower, so one candidate checks that
    rows = ("add_layer_norm", "embedding", "swiglu", "rotary")
    found["rows"] = Sweep(rows, "unpadded", vars(tiles), "_ROW_ELEMENTS_PER_WARP", (512,))
    return found


def compile_all(candidates: dict[str, int]) -> None:
    """Run each candidate once, in parallel processes. candidates: the number of them by sweep."""
    jobs = [(name, index) for name, count in candidates.items() for index in range(count)]
    workers = min(12, os.cpu_count() or 1)
    with contextlib.suppress(BrokenProcessPool), ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for failed in filter(None, pool.map(run_once, jobs)):
            print(f"  {failed}")


def run_once(job: tuple[str, int]) -> str | None:
    """Run one candidate, given by its sweep's name and its index there. Return the error, or None."""
    name, index = job
    sweep = sweeps(tiles.generation(op_cases.DEVICE))[name]
    sweep.table[sweep.key] = candidate = sweep.candidates[index]
    try:
        for case in map(op_cases.CASES.__getitem__, sweep.cases):
            made = case()
            made.providers[sweep.provider](*made.arguments)
    except Exception as error:  # compilers and launches raise errors of any type; `run` reports this one again
        return f"{name}, {candidate}: {type(error).__name__}"
    return None


def run(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Yield one row per candidate, the table's own first.

    It has the median seconds of each case and, if the table's own runs, "ratio": the geometric mean over the cases of
    the seconds relative to the table's.
    """
    own = sweep.table[sweep.key]
    base: dict[str, float] | None = None
    try:
        for candidate in (own, *(one for one in sweep.candidates if one != own)):
            sweep.table[sweep.key] = candidate
            row = {"tile": asdict(candidate) if isinstance(candidate, Tile) else candidate}
            try:
                row["seconds"] = found = {name: time_of(name, sweep.provider) for name in sweep.cases}
                base = found if candidate == own else base
                if base:
                    row["ratio"] = statistics.geometric_mean(found[name] / base[name] for name in sweep.cases)
                yield row
            except Exception as error:  # of any type; the other candidates still run
                yield row | {"failed": f"{type(error).__name__}: {error}"[:200]}
    finally:
        sweep.table[sweep.key] = own


def timing(row: dict[str, Any]) -> str:
    ratio = f"{row['ratio']:.3f}" if "ratio" in row else "?"
    return f"{ratio}; " + ", ".join(f"{seconds * 1e6:,.1f}" for seconds in row["seconds"].values())


def time_of(name: str, provider: str) -> float:
    torch.manual_seed(0)
    case = op_cases.CASES[name]()
    call = case.providers[provider]
    op_cases.assert_correct(call, case)
    return statistics.median(seconds(lambda: call(*case.arguments), op_cases.DEVICE, TIMES if op_cases.CUDA else 1))


if __name__ == "__main__":
    main()
