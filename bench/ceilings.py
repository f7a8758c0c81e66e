"""What this machine can do at most: the rate of a large matrix product and of a large copy, on random data.

    python bench/ceilings.py [--device cuda]

Every share in the other benches is of these. The last line on stdout is JSON.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import machine
import torch

from unpadded_kernels import linear


def main() -> None:
    parser = machine.arguments(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16} | (
        {"float16": torch.float16} if device.type == "cuda" else {}
    )
    found = {name: product_rate(device, dtype) for name, dtype in dtypes.items()}
    copied = copy_rate(device)
    for name, rate in found.items():
        print(f"matrix product in {name}: {rate / 1e12:.3g} TFLOP/s")
    print(f"copy: {copied / 1e9:,.0f} GB/s")
    machine.report({"flop_per_second": found, "copy_bytes_per_second": copied}, args.out)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """flop/s of a product: 8192 x 8192 x 8192 on CUDA, 2048 x 768 x 3072 (a layer's) on a CPU; the best of many."""
    m, k, n = (8192, 8192, 8192) if device.type == "cuda" else (2048, 768, 3072)
    x, weight = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    return 2 * m * k * n / min(_seconds(lambda: linear(x, weight, None), device, 50))


def copy_rate(device: torch.device) -> float:
    """bytes/s read and written by a copy of 2 GiB on CUDA, 512 MiB on a CPU; the median of many."""
    source = torch.randn(2**29 if device.type == "cuda" else 2**27, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(_seconds(lambda: target.copy_(source), device, 20))


def _seconds(run: Callable[[], object], device: torch.device, times: int) -> list[float]:
    """Seconds of each run, by CUDA events where there is CUDA."""
    run()
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(times):
            run()
            marks.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(events)]


if __name__ == "__main__":
    main()
