"""Predict the time of NomicBERT's operations on a GPU from counted bytes, flops and instructions.

    PYTHONPATH=engine:kernels python bench/model_of_time.py [--gpu H200] [--lengths 512 8192] [--tokens 32768]
        [--measured kernels.json ...] [--out FILE.json]

Every figure is a prediction: the counts are exact, the rates are assumptions made before any kernel had run on a GPU
(2026-11), good to 12 % or so. An operation takes the longest of its bytes, its flops and its instructions. `--measured`
adds the medians of files that `pytest bench/ops.py --benchmark-json` wrote. The last line on stdout is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

LAYERS, HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM = 12, 768, 3072, 12, 64
HALF = 2  # bytes of a value
KERNELS = 9 * LAYERS + 4  # per batch: nine per layer, embedding, cosines and sines, two of the pooling
RAMP = 3.5e-6  # seconds of a kernel at its start and end, in which it does not use the whole GPU


@dataclass(frozen=True, kw_only=True)
class Gpu:
    multiprocessors: int = 132
    clock: float = 1.7e9  # Hz, under load
    bytes_per_second: float  # of a kernel that streams rows

    @property
    def instructions_per_second(self) -> float:
        """A multiprocessor issues for four warps per cycle."""
        return 4 * self.multiprocessors * self.clock


# A large copy reaches 3.0 and 4.3 TB/s; streaming kernels are assumed to reach the same share of it.
GPUS = {"H100": Gpu(bytes_per_second=2.75e12), "H200": Gpu(bytes_per_second=2.75e12 * 4.3 / 3.0)}


@dataclass(frozen=True, kw_only=True)
class Op:
    """The work of one operation per token and layer; instructions are those of SASS for sm_90, counted by warp."""

    name: str
    bytes: float = 0
    flops: float = 0
    flops_per_second: float = 1
    instructions: float = 0
    times: int = 1  # per layer
    cases: tuple[tuple[str, str], ...] = ()  # cases and providers of op_cases that measure it


def attention_rate(length: int, at_512: float, at_8192: float) -> float:
    """Return flop/s: seconds per flop are a constant plus a cost per program, which divides by the keys of a text."""
    per_program = (1 / at_512 - 1 / at_8192) / (1 / 512 - 1 / 8192)
    return 1 / (1 / at_8192 + per_program * (1 / length - 1 / 8192))


def attention(length: int, at_512: float, at_8192: float, provider: str) -> Op:
    return Op(
        name="attention",
        bytes=4 * HIDDEN * HALF,
        flops=4 * HIDDEN * length,
        flops_per_second=attention_rate(length, at_512, at_8192),
        instructions=4 * 510 / 128 * HEADS * length / 64,  # 510 per warp, for 128 queries and 64 keys of one head
        cases=((f"attention, texts of {length}", provider),),
    )


def linear(name: str, inner: int, outer: int, rate: float) -> Op:
    cases = ((f"linear, {name}", "unpadded, library"),)
    moved = (inner + outer) * HALF
    return Op(name=name, bytes=moved, flops=2 * inner * outer, flops_per_second=rate, cases=cases)


OUT = linear("out", HIDDEN, HIDDEN, 560e12)
DOWN = linear("down", INTERMEDIATE, HIDDEN, 680e12)
NORM = Op(
    name="add_layer_norm", bytes=3 * HIDDEN * HALF, instructions=349, times=2, cases=(("add_layer_norm", "unpadded"),)
)


QKV = linear("qkv", HIDDEN, 3 * HIDDEN, 620e12)
ROTARY = Op(
    name="rotary",
    bytes=4 * HIDDEN * HALF + 4 * HEAD_DIM,  # with the table of cosines and sines
    instructions=243,
    cases=(("rotary", "unpadded"),),
)
ACTIVATION = Op(
    name="activation",
    bytes=3 * INTERMEDIATE * HALF,
    instructions=334 * INTERMEDIATE / 1024,
    cases=(("swiglu", "unpadded"),),
)
GATE_UP = linear("gate-up", HIDDEN, 2 * INTERMEDIATE, 650e12)


# plain Triton's matmul to gate and up, whose epilogue is the activation
GATE_UP_AND_SWIGLU = Op(
    name="gate-up and swiglu",
    bytes=(HIDDEN + INTERMEDIATE) * HALF,
    flops=4 * HIDDEN * INTERMEDIATE,
    flops_per_second=585e12,
    cases=(("linear and swiglu", "unpadded, triton"),),
)


def library(length: int) -> list[Op]:
    """Return the operations of a layer with the library's matmuls and this project's other kernels."""
    return [QKV, ROTARY, attention(length, 290e12, 430e12, "unpadded, triton"), OUT, NORM, GATE_UP, ACTIVATION, DOWN]


def triton(length: int) -> list[Op]:
    """Return the operations of a layer in plain Triton, whose gate-up ends with the activation."""
    own = attention(length, 290e12, 430e12, "unpadded, triton")
    return [QKV, ROTARY, own, OUT, NORM, GATE_UP_AND_SWIGLU, DOWN]


# Kernels -> the operations of a layer for texts of a length.
KERNEL_CHOICES = {"library": library, "triton": triton}


def gpu(name: str) -> Gpu:
    found = next((known for known in GPUS if known in name), None)
    if found is None:
        raise ValueError(f"there is no prediction for this GPU: {name!r}; use one of {', '.join(GPUS)}")
    return GPUS[found]


def predict(name: str, length: int, kernels: str = "library", tokens: int = 32768) -> list[dict[str, Any]]:
    """Return one row per operation and one for the rest: its bound and predicted us per token of all layers.

    name: of the GPU; length: tokens per text; kernels: of KERNEL_CHOICES; tokens: per batch.
    """
    device, rows = gpu(name), []
    for op in KERNEL_CHOICES[kernels](length):
        seconds = {
            "bytes": op.bytes / device.bytes_per_second,
            "flops": op.flops / op.flops_per_second,
            "instructions": op.instructions / device.instructions_per_second,
        }
        bound = max(seconds, key=lambda resource: seconds[resource])
        us = 1e6 * LAYERS * op.times * seconds[bound]
        rows.append({"op": op.name, "bound": bound, "predicted": us, "cases": op.cases, "times": op.times})
    # embedding reads and writes a row, pooling reads one; cosines and sines are written
    ends = (3 * HIDDEN * HALF + 4 * HEAD_DIM) / device.bytes_per_second
    launches = KERNELS - LAYERS * (len(library(length)) - len(KERNEL_CHOICES[kernels](length)))
    us = 1e6 * (ends + launches * RAMP / tokens)
    rows.append({"op": "launches, embedding, pool", "bound": "launches", "predicted": us, "cases": (), "times": 1})
    return rows


def read_measured(paths: list[Path]) -> tuple[str | None, dict[tuple[str, str], float]]:
    """Return the GPU's name and the us per token of one call, by case and provider."""
    name, found = None, {}
    for path in paths:
        result = json.loads(path.read_text())
        name = name or result["machine_info"]["card"].get("gpu")
        for row in result["benchmarks"]:
            info = row["extra_info"]
            found[info["kernel"], info["provider"]] = 1e6 * row["stats"]["median"] / info["rows"]
    if paths and name is None:
        raise ValueError(f"the files were not measured on a GPU: {', '.join(map(str, paths))}; run bench/gpu.sh on one")
    return name, found


def lines(rows: list[dict[str, Any]], measured: dict[tuple[str, str], float]) -> Iterator[str]:
    yield f"  {'operation':28}{'bound':14}{'predicted us/token':>20}" + f"{'measured':>12}" * bool(measured)
    for row in rows:
        times = [LAYERS * row["times"] * measured[case] for case in row["cases"] if case in measured]
        if times:
            row["measured"] = times[0]
        yield f"  {row['op']:28}{row['bound']:14}{row['predicted']:20.3f}" + (f"{times[0]:12.3f}" if times else "")
    total = sum(row["predicted"] for row in rows)
    yield f"  {'sum':42}{total:20.3f}   predicted: {1 / total:.2f} million tokens/s"


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--gpu", nargs="*", help=f"default: that of --measured, or {' and '.join(GPUS)}")
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 8192], help="tokens per text")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens per batch")
    parser.add_argument("--kernels", nargs="*", choices=KERNEL_CHOICES, default=list(KERNEL_CHOICES))
    parser.add_argument("--measured", type=Path, nargs="*", default=[], help="results of pytest bench/ops.py")
    args = parser.parse_args()
    name, measured = read_measured(args.measured)
    with harness.reporting(args.out) as result:
        result["predictions"] = []
        for gpu_name in args.gpu or ([name] if name else list(GPUS)):
            for length in args.lengths:
                for kernels in args.kernels:
                    rows = predict(gpu_name, length, kernels, args.tokens)
                    print(f"{gpu_name}, texts of {length} tokens, {kernels}: predictions")
                    print("\n".join(lines(rows, measured)))
                    found = {"gpu": gpu_name, "length": length, "kernels": kernels, "rows": rows}
                    result["predictions"].append(found)


if __name__ == "__main__":
    main()
