"""Time and memory of loading a checkpoint: 12 layers x 768, fp32, 547 MB, seeded, with a warm page cache.

The bound is reading the file once and casting it once. For a CPU the matrices are then laid out as its products read
them, which is measured apart. Every measurement is a fresh process; rounds interleave.

    python bench/loading.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from support import checkpoints

from unpadded.cli.benchmark.machine import process_memory

DTYPES = ("float16", "bfloat16", "float32")
MEMORY_LIMIT = 1.3  # x the file, for fp32 as fp16
TIME_LIMIT = 1.5  # x reading the file and the cast


def read_and_cast(folder: Path, dtype: torch.dtype) -> object:
    """The whole file into memory, then one cast of all of it."""
    data = bytearray((folder / "model.safetensors").stat().st_size)
    with (folder / "model.safetensors").open("rb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.readinto(view) :]
    values = torch.frombuffer(data, dtype=torch.float32, count=len(data) // 4)
    return values.to(dtype)


def load(folder: Path, dtype: torch.dtype, *, prepack: bool = False) -> object:
    from unpadded.checkpoint.reader import open_checkpoint
    from unpadded.model.weights import load_weights

    return load_weights(open_checkpoint(folder), device=torch.device("cpu"), dtype=dtype, prepack=prepack)


def measure(what: str, folder: Path, dtype: str) -> dict[str, float]:
    """Seconds, and the growth of the peak resident memory over the file's size; in this process."""
    work = {"read and cast": read_and_cast, "load": load, "load and prepack": partial(load, prepack=True)}[what]
    import unpadded.model.weights  # noqa: F401  its import is not loading

    torch.ones(1 << 20).to(getattr(torch, dtype))  # starts the threads
    before = process_memory("VmHWM")
    started = time.perf_counter()
    loaded = work(folder, getattr(torch, dtype))
    seconds = time.perf_counter() - started
    grown = process_memory("VmHWM") - before
    del loaded
    return {"seconds": seconds, "memory": grown / (folder / "model.safetensors").stat().st_size}


def in_fresh_process(what: str, folder: Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", what, str(folder), dtype]
    run = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(run.stdout)


def check(folder: Path) -> None:
    """What is loaded is what was written, before it is timed."""
    from safetensors.torch import load_file

    from unpadded.checkpoint.reader import open_checkpoint
    from unpadded.model.weights import load_weights

    stored = load_file(folder / "model.safetensors")
    weights = load_weights(open_checkpoint(folder), device=torch.device("cpu"), dtype=torch.float16)
    up = [stored[f"encoder.layers.11.mlp.{name}.weight"].half() for name in ("fc12", "fc11")]
    assert torch.equal(weights.layers[11].up, torch.cat(up))
    assert torch.equal(weights.word, stored["embeddings.word_embeddings.weight"].half())


def compare(folder: Path, rounds: int) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for dtype in DTYPES:
            for what in ("read and cast", "load", "load and prepack"):
                found.setdefault((dtype, what), []).append(in_fresh_process(what, folder, dtype))
    rows = []
    for dtype in DTYPES:
        bound = statistics.median(run["seconds"] for run in found[dtype, "read and cast"])
        seconds = statistics.median(run["seconds"] for run in found[dtype, "load"])
        memory = max(run["memory"] for run in found[dtype, "load"])
        prepacked = found[dtype, "load and prepack"]
        rows.append(
            {
                "dtype": dtype,
                "read_and_cast_s": bound,
                "load_s": seconds,
                "times_bound": seconds / bound,
                "memory": memory,
                "load_and_pack_s": statistics.median(run["seconds"] for run in prepacked),
                "memory_of_packing": max(run["memory"] for run in prepacked),
            }
        )
    return rows


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        what, folder, dtype = args.measure
        print(json.dumps(measure(what, Path(folder), dtype)))
        return

    with tempfile.TemporaryDirectory() as folder:
        path = checkpoints.write_nomic(Path(folder), **checkpoints.REAL, tokenizer=False)
        size = (path / "model.safetensors").stat().st_size
        check(path)
        rows = compare(path, args.rounds)

    print(f"{size / 1e6:.0f} MB of fp32, median of {args.rounds} fresh processes each, warm page cache")
    print(
        f"{'as':10}{'read + cast':>14}{'load':>10}{'ratio':>8}{'peak memory':>14}{'for a CPU':>12}{'peak memory':>14}"
    )
    for row in rows:
        print(
            f"{row['dtype']:10}{row['read_and_cast_s']:12.3f} s{row['load_s']:8.3f} s{row['times_bound']:8.2f}"
            f"{row['memory']:9.2f} x file{row['load_and_pack_s']:10.3f} s{row['memory_of_packing']:8.2f} x file"
        )
    met = all(row["times_bound"] <= TIME_LIMIT for row in rows) and rows[0]["memory"] < MEMORY_LIMIT
    print(f"limits: ratio <= {TIME_LIMIT}, memory < {MEMORY_LIMIT} as float16: {'met' if met else 'NOT met'}")
    harness.report({"bytes": size, "met": met, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
