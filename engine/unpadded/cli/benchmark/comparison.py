"""Interleaved measurements of several providers, the stages of one engine."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unpadded.checkpoint.spec import EncoderSpec
from unpadded.cli.benchmark.machine import PeakMemory
from unpadded.cli.benchmark.providers import REFERENCE, Encode, Model
from unpadded.engine import Engine
from unpadded.execution.scheduler import schedule
from unpadded.model.batch import pack
from unpadded.model.heads import head_rows
from unpadded.tokenization.windows import Window
from unpadded_kernels import matryoshka

WARM_UP = 16  # texts on a CPU
FORWARD_ALONE = "forward pass alone"


def compare(
    workload: str,
    texts: Sequence[str],
    model: Model,
    providers: dict[str, Encode],
    rates: dict[str, float],
    rounds: int,
) -> dict[str, Any]:
    """Measure one workload: one row per provider, and how unpadded's time divides into stages.

    rates: flop/s of a large matmul on this machine, by dtype.
    """
    windows = {dtype: list(_windows(engine, texts)) for dtype, engine in model.engines.items()}
    lengths = np.concatenate([window.token_counts for window in next(iter(windows.values()))])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.jsonl"
        file.write_text("".join(json.dumps(text) + "\n" for text in texts))
        runs = {name: partial(_from_disk, encode, file) for name, encode in providers.items()}
        for dtype, engine in model.engines.items():
            runs[f"{FORWARD_ALONE}, {dtype}"] = partial(forward_alone, engine, windows[dtype])
        if model.device.type == "cuda":  # the first run of a shape allocates, chooses matmuls and captures graphs
            for run in runs.values():
                run()
        else:
            for encode in providers.values():
                encode(texts[:WARM_UP])
        seconds, results, peaks = interleave(runs, rounds, model.device)
    tokens, work = int(lengths.sum()), flops(model.engine.checkpoint.spec, lengths)
    reference = _unit(results.get(REFERENCE, results[next(iter(providers))]))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    rows = []
    for name in providers:
        dtype = name.removeprefix("unpadded, ")
        rows.append(
            {
                "provider": name,
                "seconds": seconds[name],
                "texts_per_second": len(texts) / median[name],
                "tokens_per_second": tokens / median[name],
                "speedup": median[REFERENCE] / median[name] if REFERENCE in median else None,
                "share_of_matmul_rate": work / median[name] / rates[dtype] if dtype in rates else None,
                "min_cosine": float((_unit(results[name]) * reference).sum(1).min()),
                "peak_bytes": peaks[name],
            }
        )
    own = {}
    for dtype, engine in model.engines.items():
        alone = f"{FORWARD_ALONE}, {dtype}"
        own[dtype] = {
            "stages": stages(engine, texts),
            "forward_alone_seconds": seconds[alone],
            "share_of_forward_alone": median[alone] / median[f"unpadded, {dtype}"],
        }
    return {"workload": workload, "texts": len(texts), "tokens": tokens, "rows": rows, "unpadded": own}


def interleave(
    runs: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, Any], dict[str, int | None]]:
    """Run each once per round; return the seconds of every round, the last results and the first runs' peak memory."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    peaks: dict[str, int | None] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            memory = None if name in peaks else PeakMemory(device)
            start = time.perf_counter()
            results[name] = run()  # the result is on the host, so the device has finished
            seconds[name].append(time.perf_counter() - start)
            if memory is not None:
                peaks[name] = memory.increase()
    return seconds, results, peaks


def stages(engine: Engine, texts: Sequence[str]) -> dict[str, float]:
    """Return each stage's share of the time when no stages overlap; "copy" packs a batch and moves it to the device."""
    pipeline = engine._pipeline
    plan, runner = pipeline.plan(prompt=""), pipeline.runner
    seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        seconds[name] += time.perf_counter() - start

    with stage("tokenize"):
        windows = list(pipeline.reader.windows(texts, plan))
    with torch.inference_mode():
        for window in windows:
            rows = np.empty((len(window.sequences), plan.vector_options.dimensions), np.float32)
            for batch in schedule([len(ids) for ids in window.sequences], pipeline.token_budget):
                with stage("copy"):
                    packed = runner.to_device(pack([window.sequences[i] for i in batch], runner.encoder.spec))
                with stage("forward"):
                    options = plan.vector_options
                    pooled = head_rows(runner.encoder, packed, options.adapter, runner.heads["vector"])
                    pooled = matryoshka(pooled, options.layer_norm, options.dimensions, options.normalize)
                with stage("output"):
                    rows[batch] = pooled.cpu().numpy()
            with stage("output"):
                pipeline.collect([(window, rows)], plan)
    return {name: spent / sum(seconds.values()) for name, spent in seconds.items()}


def forward_alone(engine: Engine, windows: Sequence[Window]) -> np.ndarray:
    """Run the batches that `encode` runs, from token ids, without tokenizing or reordering."""
    pipeline = engine._pipeline
    plan = pipeline.plan(prompt="")
    launched = [
        pipeline.runner.launch([window.sequences[i] for i in batch], plan.vector_options)
        for window in windows
        for batch in schedule([len(ids) for ids in window.sequences], pipeline.token_budget)
    ]
    return np.concatenate([wait() for wait in launched])


def flops(spec: EncoderSpec, lengths: np.ndarray) -> int:
    """Return the flops of the matmuls and of full attention over texts of these lengths."""
    mlp = (spec.up_rows + spec.intermediate) * spec.hidden
    sparse = len(spec.experts.layers) * (spec.experts.top_k - 1) if spec.experts else 0
    per_token = 2 * (spec.layers * (4 * spec.hidden**2 + mlp) + sparse * mlp)
    squares = int((lengths.astype(np.int64) ** 2).sum())
    return int(lengths.sum()) * per_token + 4 * spec.layers * spec.hidden * squares


def _windows(engine: Engine, texts: Sequence[str]) -> Iterator[Window]:
    return engine._pipeline.reader.windows(texts, engine._pipeline.plan(prompt=""))


def _from_disk(encode: Encode, file: Path) -> np.ndarray:
    with file.open() as lines:
        return encode([json.loads(line) for line in lines])


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit
