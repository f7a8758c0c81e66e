"""Measure the speed from text on disk to vectors in memory, as `unpadded bench` does, and compare it with libraries.

    PYTHONPATH=tests python bench/throughput.py [--device cuda] [--rounds 5] [--out bench/results/throughput.json]

On a CPU: all-MiniLM-L6-v2 (real weights) on queries, on paragraphs and on increasing numbers of paragraphs; NomicBERT
(768 wide, seeded weights) on passages and on documents of realistic length. On CUDA: NomicBERT on texts of 512, 50 and
8192 tokens and on documents, a million tokens of each: 32 batches. The last line on stdout is JSON.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import wordpiece
from support import checkpoints

import unpadded
from unpadded.cli import benchmark
from unpadded.cli.benchmark.workloads import TextSampler

LONGEST = 8192
TOKENS = 2**20  # per workload on CUDA: 32 batches
AGAINST = ("sentence-transformers", "sentence-transformers-best")  # for NomicBERT; the others pad in the same way
SMALL = {"layers": 1, "hidden": 64, "heads": 2, "intermediate": 128}


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="default: 5 on CUDA, 3 on a CPU")
    parser.add_argument("--against", nargs="*", default=AGAINST, help="providers to compare NomicBERT with")
    parser.add_argument("--layers", type=int, default=12, help="layers of NomicBERT (default: 12)")
    parser.add_argument(
        "--lengths", type=Path, default=harness.ROOT / "bench" / "lengths.txt", help="file of token counts of documents"
    )
    parser.add_argument("--scaling", type=int, nargs="*", default=[1000, 10_000, 100_000], help="numbers of paragraphs")
    parser.add_argument("--small", action="store_true", help="tiny models and texts, to test this script")
    args = parser.parse_args()
    device = torch.device(args.device)
    rounds = args.rounds or (1 if args.small else 5 if device.type == "cuda" else 3)
    with harness.reporting(args.out) as result, tempfile.TemporaryDirectory() as folder:
        result["models"] = []
        if device.type == "cpu" and checkpoints.PACKAGE and not args.small:
            result["models"].append(found := {"model": "all-MiniLM-L6-v2"})
            engines = load(checkpoints.MINILM, device)
            both = dict.fromkeys(("queries", "paragraphs"))
            benchmark.measure(str(checkpoints.MINILM), engines, both, rounds=rounds, result=found)
            found["scaling"] = []
            for row in scaling(list(engines.values())[-1], args.scaling):
                found["scaling"].append(row)
                print(f"{row['texts']:,} texts: {row['tokens_per_second']:,.0f} tokens/s", flush=True)
        shape = SMALL if args.small else checkpoints.REAL | {"layers": args.layers}
        checkpoints.write_nomic(Path(folder), names="transformers", tokenizer=False, **shape)
        wordpiece.write_tokenizer(Path(folder), LONGEST)
        engines = load(folder, device)
        workloads = texts(engines, device, args.lengths, args.small)
        result["models"].append(found := {"model": f"NomicBERT, {shape['layers']} layers"})
        benchmark.measure(folder, engines, workloads, against=args.against, rounds=rounds, result=found)


def load(model: str | Path, device: torch.device) -> dict[str, unpadded.Engine]:
    """Load a model in fp16 on CUDA, in fp32 and bf16 on a CPU."""
    dtypes = ["float16"] if device.type == "cuda" else ["float32", "bfloat16"]
    return {dtype: unpadded.load(model, device=device, dtype=dtype) for dtype in dtypes}


def scaling(engine: unpadded.Engine, counts: Sequence[int]) -> Iterator[dict[str, float]]:
    """Measure tokens/s of `stream` over the first `count` of sampled paragraphs, for each count."""
    paragraphs = TextSampler(engine).workload("paragraphs", max(counts, default=1))
    engine.encode(paragraphs[:16], prompt="")
    for count in counts:
        start = time.perf_counter()
        tokens = sum(int(block.token_counts.sum()) for block in engine.stream(paragraphs[:count], prompt=""))
        yield {"texts": count, "tokens": tokens, "tokens_per_second": tokens / (time.perf_counter() - start)}


def texts(engines: dict[str, Any], device: torch.device, lengths: Path, small: bool) -> dict[str, Any]:
    """Return NomicBERT's workloads by name: texts, or how many to sample."""
    if device.type == "cpu" and not small:
        return {"passages": 32, "documents": None}
    sampler = TextSampler(next(iter(engines.values())))
    found = np.minimum(np.array(lengths.read_text().split(), np.int64), LONGEST)
    workloads = {f"{length} tokens": [length] * (TOKENS // length) for length in (512, 50, 8192)}
    documents = int(TOKENS / found.mean())
    workloads["real documents"] = np.random.default_rng(0).choice(found, documents, replace=False).tolist()
    if small:
        workloads = {name: [min(length, 100) for length in some[:4]] for name, some in workloads.items()}
    return {name: sampler.sample(some) for name, some in workloads.items()}


if __name__ == "__main__":
    main()
