"""Fail if a speedup over a baseline is lower than the one stored for this machine.

    PYTHONPATH=tests python bench/check.py [--update]

unpadded and the baseline run alternately, so that other load slows both; the median of the rounds' ratios counts. A
ratio more than 15 % below the stored one is measured again and fails if it is still too low. The first run on a machine
(processor and threads) stores its ratios, and so does --update.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import model
import numpy as np
import torch
from support import checkpoints

import unpadded
from unpadded.cli.benchmark import half_dtype, machine
from unpadded.cli.benchmark.comparison import forward_alone, interleave
from unpadded.cli.benchmark.providers import PROVIDERS, Model
from unpadded.cli.benchmark.workloads import TextSampler

DROP = 0.15
PARAGRAPHS = 128
SHAPES = {"mixed": [50, 900, 120, 400, 70, 600, 200, 1000], "4 x 1024": [1024] * 4}  # tokens
DEVICE = torch.device("cpu")
Pair = tuple[Callable[[], Any], Callable[[], Any]]  # unpadded, baseline


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--ratios", type=Path, default=harness.ROOT / "bench" / "results" / "ratios.json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--update", action="store_true", help="store the measured ratios")
    parser.add_argument("--small", action="store_true", help="tiny models and texts, to test this script")
    args = parser.parse_args()
    card = machine.card(harness.ROOT)
    name = f"{card['cpu']}, {card['threads']} threads"
    stored = json.loads(args.ratios.read_text()) if args.ratios.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(pairs(Path(folder), args.small), args.rounds, stored.get(name, {}).get("ratios", {}))
    if args.update or name not in stored:
        stored[name] = {"machine": card, "ratios": measured}
        args.ratios.write_text(json.dumps(stored, indent=1) + "\n")
        print(f"stored for {name} in {args.ratios}")
        return
    dropped = lower(measured, stored[name]["ratios"])
    if dropped:
        sys.exit(f"check: {', '.join(dropped)} dropped by more than {DROP:.0%}; find out why, or store with --update")


def measure(pairs: dict[str, Pair], rounds: int, before: dict[str, float]) -> dict[str, float]:
    """Return the ratio of every pair; one that is too low is measured twice and its maximum taken."""
    measured = {}
    for name, pair in pairs.items():
        measured[name] = ratio(pair, rounds)
        if lower({name: measured[name]}, before):
            measured[name] = max(measured[name], ratio(pair, rounds))
        print(f"{name}: {measured[name]:.2f}" + (f" (stored: {before[name]:.2f})" if name in before else ""))
    return measured


def lower(measured: dict[str, float], before: dict[str, float]) -> list[str]:
    """Return the names whose ratio is more than DROP below the stored one."""
    return [name for name, value in measured.items() if name in before and value < (1 - DROP) * before[name]]


def ratio(pair: Pair, rounds: int) -> float:
    for run in pair:
        run()
    seconds, _, _ = interleave(dict(zip(("unpadded", "baseline"), pair, strict=True)), rounds, DEVICE)
    return statistics.median(base / own for own, base in zip(seconds["unpadded"], seconds["baseline"], strict=True))


def pairs(folder: Path, small: bool) -> dict[str, Pair]:
    """Return the pairs by name: encode and sentence-transformers, encode and its forward pass, packed and padded."""
    found: dict[str, Pair] = {}
    half = str(half_dtype(DEVICE)).removeprefix("torch.")
    checkpoints.write_nomic(
        folder, names="transformers", tokenizer=False, **model.SMALL if small else checkpoints.REAL | {"layers": 2}
    )
    draw = np.random.default_rng(0)
    for dtype, other in (("float32", "sentence-transformers"), (half, "sentence-transformers-best")):
        engine = unpadded.load(checkpoints.MINILM, device="cpu", dtype=dtype)
        texts = TextSampler(engine).workload("paragraphs", 8 if small else PARAGRAPHS)
        baseline = PROVIDERS[other](Model(str(checkpoints.MINILM), {dtype: engine}, getattr(torch, half)))
        windows = list(engine._pipeline.reader.windows(texts, engine._pipeline.plan()))
        encode = partial(engine.encode, texts)
        found[f"MiniLM, paragraphs, {dtype}"] = encode, partial(baseline, texts)
        found[f"MiniLM, paragraphs, {dtype}, forward pass alone"] = encode, partial(forward_alone, engine, windows)
        packed = unpadded.load(folder, device="cpu", dtype=dtype, max_length=8192)
        padded = model.transformers(folder, DEVICE, dtype)
        for shape, lengths in SHAPES.items():
            ids = [draw.integers(5, 30000, length // (20 if small else 1), dtype=np.int32) for length in lengths]
            found[f"NomicBERT, {shape}, {dtype}"] = (
                partial(packed.encode, ids, prompt=""),
                partial(model.padded, padded, DEVICE, ids),
            )
    return found


if __name__ == "__main__":
    main()
