"""Compare each head with sentence-transformers: `Engine.score` with `CrossEncoder.predict`, in pairs/s, `encode_sparse`
with `SparseEncoder.encode` and `encode_tokens` with `MultiVectorEncoder.encode`, in texts/s.

    PYTHONPATH=tests python bench/heads.py [--device cuda] [--inputs 512] [--rounds 3] [--out bench/results/heads.json]

The checkpoints have seeded weights in the published formats: on a CPU BERT rerankers of the sizes of ms-marco-MiniLM-L6
and bge-reranker-base, on CUDA rerankers of the shapes of gte-reranker-modernbert-base and ettin-reranker-150m. A pair
is a query and a passage of Python's manual, together 20 to 512 tokens; 32 passages share a query. A text for sparse
weights or token vectors has 20 to 300 tokens, and the bias of the logits leaves a few hundred weights above zero.
Rounds interleave and have new texts. Both libraries run in the same dtype, and sentence-transformers with the fastest
of several batch sizes, which the first round finds. Before it the values are compared with those of sentence-
transformers in float32. A round for which unpadded would need more than --seconds has fewer inputs. Without --only or
with --only spans, also `Engine.encode_spans` of a long text is compared with `encode` of it. The last line on stdout is
JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import splade
import torch
from head_models import DOCUMENT, write_bert, write_colbert, write_ettin, write_gte
from support import checkpoints

import unpadded
from unpadded.checkpoint.spec import EncoderSpec
from unpadded.cli.benchmark.comparison import flops
from unpadded.cli.benchmark.machine import matmul_rate
from unpadded.cli.benchmark.workloads import TextSampler
from unpadded.engine import Engine

PAIR, QUERY, PASSAGES = (20, 512), (8, 32), 32  # tokens of a pair and of a query; passages per query
BATCHES = {"cpu": (1, 4, 32), "cuda": (32, 128, 256)}  # of sentence-transformers, whose default is 32
CHECKED, MIN_INPUTS = 8, 16
SPAN_ROUNDS = 6
UTILIZATION = 0.6  # share of the matmul rate that a round is expected to reach
MAX_ERROR = 1e-5  # relative, and at most twice that of sentence-transformers in the same dtype
Run = Callable[[Sequence[Any]], Any]


class TooSlow(Exception):
    """A round within the limit would have too few inputs to measure."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head: the checkpoints to measure by device and name, the inputs, and the values of both libraries."""

    call: str
    peer_call: str
    unit: str
    models: dict[str, dict[str, Callable[[Path, bool], object]]]
    inputs: Callable[[TextSampler, np.random.Generator, int], Sequence[Any]]
    token_counts: Callable[[Engine, Sequence[Any]], np.ndarray]
    own: Callable[[Engine], Run]
    peer: Callable[[Path, torch.device, str], Callable[[int], Run]]  # the last argument is the batch size
    counts: dict[str, int]  # inputs per round, by device
    flops: Callable[[EncoderSpec], int] = lambda spec: 0  # per token, after the encoder


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inputs", type=int, help="per round; default: 512 pairs or 128 texts on a CPU, 2048 on CUDA")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60, help="about the longest round of unpadded (default: 60)")
    parser.add_argument("--only", metavar="MODEL", help="measure this model and keep the rows of others in --out")
    parser.add_argument("--small", action="store_true", help="tiny models of CUDA's shapes, to test this script")
    args = parser.parse_args()
    device = torch.device(args.device)
    args.inputs = args.inputs or (16 if args.small else None)
    args.rounds = 1 if args.small else args.rounds
    dtypes = ["float16"] if device.type == "cuda" else ["float32", "bfloat16"][: 1 if args.small else 2]
    with harness.reporting(args.out) as result:
        rates = {dtype: matmul_rate(device, getattr(torch, dtype), 3) for dtype in dtypes}
        result |= {"matmul_rate": rates, "rows": [], "not run": {}}
        if args.only and args.out and args.out.exists():
            result |= {key: value for key, value in json.loads(args.out.read_text()).items() if key == "spans"}
            result["rows"] = [row for row in json.loads(args.out.read_text())["rows"] if row["model"] != args.only]
        if args.only in (None, "spans"):
            result["spans"] = measure_spans(device, args.small)
        for name, head in HEADS.items():
            for model, write in head.models["cuda" if args.small else device.type].items():
                if args.only not in (None, model):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    write(Path(folder), args.small)
                    for dtype, rate in rates.items():
                        print(f"{name}, {model}, {dtype}:", flush=True)
                        try:
                            rows = measure(head, Path(folder), device, dtype, rate, args)
                        except TooSlow as error:
                            result["not run"][f"{name}, {model}, {dtype}"] = str(error)
                            print(f"  not run: {error}")
                            continue
                        result["rows"] += [{"head": name, "model": model} | row for row in rows]
        if wrong := [row for row in result["rows"] if row["relative_error"] > row["maximum_error"]]:
            raise SystemExit(f"wrong values: {wrong}")


def measure(
    head: Head, folder: Path, device: torch.device, dtype: str, rate: float, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return one row for each library: inputs/s, tokens/s, and the relative error to float32.

    rate: flop/s of a large matmul. Raises TooSlow if a round would have too few inputs.
    """
    engine = unpadded.load(folder, device=device, dtype=dtype)
    sampler, draw = TextSampler(engine), np.random.default_rng(0)
    checked = head.inputs(sampler, draw, CHECKED)
    spec, lengths = engine.checkpoint.spec, head.token_counts(engine, checked)
    work = (flops(spec, lengths) + head.flops(spec) * int(lengths.sum())) / CHECKED  # flop per input
    possible = int(args.seconds * UTILIZATION * rate / work) // CHECKED * CHECKED
    if possible < MIN_INPUTS:
        raise TooSlow(
            f"matmuls at {rate / 1e12:.3g} TFLOP/s allow {args.seconds * rate / work:.0f} {head.unit} a round"
        )
    count = min(args.inputs or head.counts[device.type], possible)

    own, peer = head.own(engine), head.peer(folder, device, dtype)
    batches = BATCHES[device.type]
    expected = head.peer(folder, device, "float32")(batches[0])(checked)
    errors = {name: relative_error(run(checked), expected) for name, run in (("own", own), ("peer", peer(batches[0])))}
    maximum = {"own": max(MAX_ERROR, 2 * errors["peer"]), "peer": errors["peer"]}

    runs = {"own": own, **{str(batch): peer(batch) for batch in batches}}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    tokens = []
    for number in range(args.rounds):
        inputs = head.inputs(sampler, draw, count)
        tokens.append(int(head.token_counts(engine, inputs).sum()))
        if number == 0 and device.type == "cuda":  # a new shape allocates, chooses matmuls and captures graphs
            for run in runs.values():
                run(inputs)
        for name, run in runs.items():
            taken[name].append(seconds(run, inputs))
        if number == 0:  # later rounds run the fastest batch size only
            first = {batch: taken[str(batch)][0] for batch in batches}
            best = str(min(first, key=first.__getitem__))
            runs = {name: runs[name] for name in ("own", best)}
    ratio = statistics.median(slow / fast for slow, fast in zip(taken[best], taken["own"], strict=True))
    rows = []
    for name, call, spent in (("own", head.call, taken["own"]), ("peer", head.peer_call, taken[best])):
        row = {
            "provider": call,
            "dtype": dtype,
            "unit": head.unit,
            "inputs": count,
            "tokens": tokens,
            "seconds": spent,
            "inputs_per_second": count / statistics.median(spent),
            "tokens_per_second": statistics.median(n / s for n, s in zip(tokens, spent, strict=True)),
            "relative_error": errors[name],
            "maximum_error": maximum[name],
        }
        if name == "own":
            row |= {"speedup": ratio, "speedup_by_batch": {b: s / taken["own"][0] for b, s in first.items()}}
        else:
            row["batch"] = int(best)
        print(
            f"  {call}: {count} {head.unit}, {row['inputs_per_second']:,.1f} {head.unit}/s, "
            f"{row['tokens_per_second']:,.0f} tokens/s, relative error {errors[name]:.1e}"
            + (f", {ratio:.2f} x" if name == "own" else f", batches of {best}"),
            flush=True,
        )
        rows.append(row)
    return rows


def measure_spans(device: torch.device, small: bool) -> dict[str, Any]:
    """Return the seconds of `encode` and `encode_spans` of texts of 8192 tokens, and the median of their ratios."""
    shape = {"layers": 1, "hidden": 64, "heads": 1} if small else {**checkpoints.REAL, "layers": 4}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.write_nomic(Path(folder), **shape)
        engine = unpadded.load(folder, device=device, max_length=256 if small else 8192, rotary_scaling_factor=2)
        texts = TextSampler(engine).sample([8192] * (SPAN_ROUNDS + 1))  # at most max_length
        tokens = int(engine.embed(texts[:1]).token_counts[0])
        spans = len(engine.encode_spans(texts[0], span_tokens=tokens // 32).vectors)
        calls = {"encode": engine.encode, "spans": partial(engine.encode_spans, span_tokens=tokens // 32)}
        pairs = []
        for index, text in enumerate(texts[1:]):
            spent = {name: seconds(calls[name], text) for name in sorted(calls, reverse=index % 2 == 1)}
            pairs.append((spent["encode"], spent["spans"]))
    ratio = statistics.median(after / before for before, after in pairs)
    print(f"encode_spans of {spans} spans in {tokens} tokens: {ratio:.3f} x the time of encode", flush=True)
    return {"tokens": tokens, "spans": spans, "seconds": pairs, "ratio": ratio}


def seconds(run: Run, inputs: Sequence[Any]) -> float:
    start = time.perf_counter()
    run(inputs)
    return time.perf_counter() - start


def relative_error(found: Any, expected: Any) -> float:
    found, expected = map(dense, (found, expected))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def dense(values: Any) -> np.ndarray:
    """Return scores or sparse weights as an array."""
    if isinstance(values, unpadded.Sparse):
        return np.asarray(values.to_scipy().toarray())
    return values if isinstance(values, np.ndarray) else values.to_dense().float().cpu().numpy()


def draw_pairs(sampler: TextSampler, draw: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Return pairs of a query and a passage with `PAIR` tokens, the three special tokens included."""
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        tokens = int(draw.integers(QUERY[0], QUERY[1] + 1))
        (query,) = sampler.sample([tokens])
        totals = draw.integers(max(PAIR[0], tokens + 8), PAIR[1] + 1, min(PASSAGES, count - len(pairs)))
        pairs += [(query, passage) for passage in sampler.sample(totals - tokens + 1)]  # they share a special token
    return pairs


def pair_token_counts(engine: Engine, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    found = engine.tokenizer.encode_pairs(pairs, range(len(pairs)), engine.checkpoint.max_length, "right", False)
    return np.array([len(row.ids) for row in found], np.int64)


def score(engine: Engine) -> Run:
    return partial(engine.score, activation="none")


def cross_encoder(folder: Path, device: torch.device, dtype: str) -> Callable[[int], Run]:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), device=str(device), model_kwargs={"dtype": getattr(torch, dtype)})
    options = {"activation_fn": torch.nn.Identity(), "show_progress_bar": False}
    return lambda batch: lambda pairs: model.predict(list(pairs), batch_size=batch, **options)


def draw_documents(sampler: TextSampler, draw: np.random.Generator, count: int) -> list[str]:
    """Return texts with `DOCUMENT` tokens, the marker and special tokens included."""
    return sampler.sample(draw.integers(DOCUMENT[0], DOCUMENT[1] + 1, count) - 1)


def document_token_counts(engine: Engine, documents: Sequence[str]) -> np.ndarray:
    found = engine.tokenizer.encode(documents, prompt=engine.checkpoint.prompts["document"], max_length=DOCUMENT[1])
    return np.array([len(row.ids) for row in found], np.int64)


def multi_vector_encoder(folder: Path, device: torch.device, dtype: str) -> Callable[[int], Run]:
    from sentence_transformers import MultiVectorEncoder

    model = MultiVectorEncoder(str(folder), device=str(device), model_kwargs={"dtype": getattr(torch, dtype)})

    def encode(documents: Sequence[str], batch: int) -> np.ndarray:
        vectors = model.encode_document(list(documents), batch_size=batch, show_progress_bar=False)
        return torch.cat(vectors).float().cpu().numpy()

    return lambda batch: partial(encode, batch=batch)


MINILM = {"layers": 6, "hidden": 384, "heads": 12, "intermediate": 1536}
HEADS = {
    "score": Head(
        call="Engine.score",
        peer_call="CrossEncoder.predict",
        unit="pairs",
        models={
            "cpu": {
                "BERT, 6 layers x 384": partial(write_bert, **MINILM),
                "BERT, 12 layers x 768": partial(write_bert, **checkpoints.REAL),
            },
            "cuda": {"gte-reranker-modernbert-base": write_gte, "ettin-reranker-150m": write_ettin},
        },
        inputs=draw_pairs,
        token_counts=pair_token_counts,
        own=score,
        peer=cross_encoder,
        counts={"cpu": 512, "cuda": 2048},
    ),
    "sparse": Head(
        call="Engine.encode_sparse",
        peer_call="SparseEncoder.encode",
        unit="texts",
        models={
            "cpu": {
                "SPLADE, BERT, 6 layers x 384": partial(splade.write, **MINILM),
                "SPLADE, BERT, 12 layers x 768": partial(splade.write, **checkpoints.REAL),
            },
            "cuda": {"splade-v3": partial(splade.write, **checkpoints.REAL)},
        },
        inputs=splade.draw_texts,
        token_counts=splade.token_counts,
        own=lambda engine: engine.encode_sparse,
        peer=splade.sparse_encoder,
        counts={"cpu": 128, "cuda": 2048},
        flops=lambda spec: 2 * spec.hidden * (spec.hidden + spec.vocabulary),
    ),
    "tokens": Head(
        call="Engine.encode_tokens",
        peer_call="MultiVectorEncoder.encode_document",
        unit="documents",
        models={
            "cpu": {"ColBERT, 6 layers x 384": partial(write_colbert, **MINILM)},
            "cuda": {"ColBERT, 12 layers x 768": partial(write_colbert, **checkpoints.REAL)},
        },
        inputs=draw_documents,
        token_counts=document_token_counts,
        own=lambda engine: lambda documents: engine.encode_tokens(documents).vectors,
        peer=multi_vector_encoder,
        counts={"cpu": 128, "cuda": 2048},
    ),
}


if __name__ == "__main__":
    main()
