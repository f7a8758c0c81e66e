"""What this machine can do at most: the rate of a large matrix product and of a large copy, on random data.

    python bench/ceilings.py [--device cuda]

Every share in the other benches is of these. The last line on stdout is JSON.
"""

from __future__ import annotations

import harness
import torch

from unpadded.cli.benchmark.machine import copy_rate, matmul_rate


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtypes = ["float32", "bfloat16", *(["float16"] if device.type == "cuda" else [])]
    found = {name: matmul_rate(device, getattr(torch, name)) for name in dtypes}
    copied = copy_rate(device)
    for name, rate in found.items():
        print(f"matrix product in {name}: {rate / 1e12:.3g} TFLOP/s")
    print(f"copy: {copied / 1e9:,.0f} GB/s")
    harness.report({"flop_per_second": found, "copy_bytes_per_second": copied}, args.out)


if __name__ == "__main__":
    main()
