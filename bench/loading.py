"""Time and memory of loading a checkpoint: 12 layers x 768, fp32, 547 MB, seeded, with a warm page cache.

    python bench/loading.py [--rounds 7] [--out FILE.json]

The bound is reading the file once and casting it once. `load` is compared with the same load through the safetensors
package, which maps the file into memory, and with the weights then prepacked for a CPU. Every measurement is a fresh
process, and rounds interleave; medians are reported. Memory is the growth of the peak over the file's size: resident
memory (VmHWM), which includes mapped pages of the file, and private memory (RssAnon, sampled every 2 ms).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import torch
from support import checkpoints
from torch import Tensor

from unpadded.checkpoint.safetensors_header import StoredTensor
from unpadded.cli.benchmark.machine import process_memory

DTYPES = ("float16", "bfloat16", "float32")
MEMORY_LIMIT = 1.3  # x the file, resident, of fp32 loaded as fp16
TIME_LIMIT = 1.5  # x reading the file and casting it


def read_and_cast(folder: Path, dtype: torch.dtype) -> object:
    """Read the whole file into memory, then cast all of it at once."""
    data = bytearray((folder / "model.safetensors").stat().st_size)
    with (folder / "model.safetensors").open("rb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.readinto(view) :]
    values = torch.frombuffer(data, dtype=torch.float32, count=len(data) // 4)
    return values.to(dtype)


def load(folder: Path, dtype: torch.dtype, *, prepack: bool = False) -> object:
    from unpadded.checkpoint.reader import open_checkpoint
    from unpadded.model.weights import load_weights, packed_linear

    return load_weights(
        open_checkpoint(folder), device=torch.device("cpu"), dtype=dtype, change=packed_linear if prepack else None
    )


def load_and_prepack(folder: Path, dtype: torch.dtype) -> object:
    return load(folder, dtype, prepack=True)


def load_with_safetensors(folder: Path, dtype: torch.dtype) -> object:
    """Load as `load` does, but read each tensor with safe_open, then cast and copy it into the fused destination."""
    from safetensors import safe_open

    from unpadded.model import weights

    class SafetensorsLoader:
        def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
            self.file = safe_open(folder / "model.safetensors", "pt")

        def load(self, shape: tuple[int, ...], parts: Iterable[StoredTensor]) -> Tensor:
            destination = torch.empty(shape, dtype=dtype)
            rest = destination.view(-1)
            for part in parts:
                stored = self.file.get_tensor(part.name).flatten()
                rest[: len(stored)].copy_(stored)
                assert rest[: len(stored)].sum().isfinite(), part.name
                rest = rest[len(stored) :]
            return destination

    with mock.patch.object(weights, "TensorLoader", SafetensorsLoader):
        return load(folder, dtype)


WAYS: dict[str, Callable[[Path, torch.dtype], object]] = {
    "read and cast": read_and_cast,
    "load": load,
    "load with safetensors": load_with_safetensors,
    "load and prepack": load_and_prepack,
}


def measure(way: str, folder: Path, dtype: str) -> None:
    """Print the private bytes before the load, then seconds and growth of resident bytes; in this process."""
    import safetensors.torch  # noqa: F401  imports are not part of loading

    import unpadded.model.weights  # noqa: F401

    torch.ones(1 << 20).to(getattr(torch, dtype))  # starts the threads
    print(process_memory("RssAnon"), flush=True)
    before = process_memory("VmHWM")
    started = time.perf_counter()
    loaded = WAYS[way](folder, getattr(torch, dtype))
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "resident": process_memory("VmHWM") - before}))
    del loaded


def in_fresh_process(way: str, folder: Path, dtype: str) -> dict[str, float]:
    """Return seconds, and the growth of resident and private memory over the file's size."""
    command = [sys.executable, __file__, "--measure", way, str(folder), dtype]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        before, peak = int(process.stdout.readline()), 0
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            if found := re.search(r"RssAnon:\s+(\d+)", status.read_text()):  # absent once the process has exited
                peak = max(peak, 1024 * int(found[1]))
            time.sleep(0.002)
        result = json.loads(process.stdout.read())
    assert process.returncode == 0
    size = (folder / "model.safetensors").stat().st_size
    return {
        "seconds": result["seconds"],
        "resident": result["resident"] / size,
        "private": max(0, peak - before) / size,
    }


def check(folder: Path) -> None:
    """Compare what is loaded with what was written, before it is timed."""
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    up = [stored[f"encoder.layers.11.mlp.{name}.weight"].half() for name in ("fc12", "fc11")]
    for way in (load, load_with_safetensors):
        weights = way(folder, torch.float16)
        assert torch.equal(weights.layers[11].mlp.up.weight, torch.cat(up)), way
        assert torch.equal(weights.word, stored["embeddings.word_embeddings.weight"].half()), way


def compare(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Return the medians, one row per dtype and way."""
    runs: dict[tuple[str, str], list[dict[str, float]]] = {(dtype, way): [] for dtype in DTYPES for way in WAYS}
    for _ in range(rounds):
        for (dtype, way), found in runs.items():
            found.append(in_fresh_process(way, folder, dtype))
    return [
        {"dtype": dtype, "way": way}
        | {key: statistics.median(run[key] for run in found) for key in ("seconds", "resident", "private")}
        for (dtype, way), found in runs.items()
    ]


def limits_met(rows: list[dict[str, Any]]) -> bool:
    found = {(row["dtype"], row["way"]): row for row in rows}
    fast = all(
        found[dtype, "load"]["seconds"] <= TIME_LIMIT * found[dtype, "read and cast"]["seconds"] for dtype in DTYPES
    )
    return fast and found["float16", "load"]["resident"] < MEMORY_LIMIT


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        way, folder, dtype = args.measure
        measure(way, Path(folder), dtype)
        return

    with tempfile.TemporaryDirectory() as folder:
        path = checkpoints.write_nomic(Path(folder), **checkpoints.REAL, tokenizer=False)
        size = (path / "model.safetensors").stat().st_size
        check(path)
        rows = compare(path, args.rounds)

    print(f"{size / 1e6:.0f} MB of fp32, median of {args.rounds} fresh processes each, warm page cache")
    print(f"{'as':10}{'way':24}{'seconds':>10}{'resident':>16}{'private':>16}")
    for row in rows:
        print(
            f"{row['dtype']:10}{row['way']:24}{row['seconds']:10.3f}"
            f"{row['resident']:9.2f} x file{row['private']:9.2f} x file"
        )
    met = limits_met(rows)
    print(f"limits: {TIME_LIMIT} x read and cast, {MEMORY_LIMIT} x file as float16: {'met' if met else 'NOT met'}")
    harness.report({"bytes": size, "rounds": args.rounds, "met": met, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
