"""Measure this machine's ceilings: the rates of a large matmul and of a large copy, on random data.

    python bench/ceilings.py [--device cuda]

The last line on stdout is JSON.
"""

from __future__ import annotations

import statistics

import harness
import torch

from unpadded.cli.benchmark.machine import matmul_rate, seconds


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="one matmul per dtype, to test this script")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtypes = ["float32", "bfloat16", *(["float16"] if device.type == "cuda" else [])]
    matmul = {name: matmul_rate(device, getattr(torch, name), 1 if args.small else 20) for name in dtypes}
    copy = copy_rate(device)
    for name, rate in matmul.items():
        print(f"matmul in {name}: {rate / 1e12:.3g} TFLOP/s")
    print(f"copy: {copy / 1e9:,.0f} GB/s")
    harness.report({"flop_per_second": matmul, "copy_bytes_per_second": copy}, args.out)


def copy_rate(device: torch.device) -> float:
    """Return the median bytes/s, read and written, of copying 2 GiB on CUDA or 256 MiB on a CPU."""
    source = torch.randn(2**29 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(seconds(lambda: target.copy_(source), device, 10))


if __name__ == "__main__":
    main()
