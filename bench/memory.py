"""Measure the peak memory of embedding texts of 8192 tokens on a CPU, for several numbers of texts.

    PYTHONPATH=tests python bench/memory.py [--texts 1 4] [--dtype float32]

A NomicBERT of real size (12 layers, 768 wide, seeded weights) runs in a new process for each number of texts. Memory
counts from after the imports; it may exceed the weights by 1.5 GiB. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
import numpy as np
from support import checkpoints

from unpadded.cli.benchmark.machine import process_memory

BOUND = 1.5 * 2**30


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), int(args.measure[1]), args.dtype)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.write_nomic(Path(folder), **checkpoints.REAL)
        for texts in args.texts:
            command = [sys.executable, __file__, "--dtype", args.dtype, "--measure", folder, str(texts)]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row = json.loads(run.stdout)
            rows.append(row)
            print(f"{texts} x 8192 tokens, {args.dtype}: {row['over_weights'] / 2**30:.2f} GiB above the weights")
    harness.report({"rows": rows}, args.out)
    if any(row["over_weights"] > BOUND for row in rows):
        sys.exit(f"memory: more than {BOUND / 2**30} GiB above the weights")


def measure(folder: Path, texts: int, dtype: str) -> dict[str, float]:
    """Return the bytes of the weights and the peak bytes above them, in this process."""
    import transformers

    import unpadded

    ids = np.random.default_rng(0).integers(5, 30000, (texts, 8192), dtype=np.int32)
    unpadded.load, transformers.AutoTokenizer  # noqa: B018  imports them and torch, whose memory does not count
    before = process_memory("VmHWM")
    engine = unpadded.load(folder, device="cpu", dtype=dtype, max_length=8192)
    weights = (folder / "model.safetensors").stat().st_size * (4 if dtype == "float32" else 2) // 4
    engine.encode(list(ids))
    return {"texts": texts, "weights": weights, "over_weights": process_memory("VmHWM") - before - weights}


if __name__ == "__main__":
    main()
