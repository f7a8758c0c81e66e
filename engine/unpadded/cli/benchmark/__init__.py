"""Speed from text on disk to vectors in memory, compared with other libraries on the same texts in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from unpadded.cli.benchmark.comparison import compare
from unpadded.cli.benchmark.machine import card, matmul_rate
from unpadded.cli.benchmark.providers import PROVIDERS, REFERENCE, Model, make_providers
from unpadded.cli.benchmark.workloads import TEXTS, TextSampler
from unpadded.engine import Engine

__all__ = ["PROVIDERS", "TEXTS", "card", "conclusion", "half_dtype", "measure", "table"]


def measure(
    name: str,
    engines: dict[str, Engine],
    workloads: Mapping[str, Sequence[str] | int | None],
    *,
    against: Sequence[str] = tuple(PROVIDERS),
    rounds: int = 3,
    result: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure a model on workloads and print each table as soon as it is complete.

    name: a folder or a Hugging Face id.
    engines: the model loaded by unpadded, by dtype.
    workloads: by name, the texts, or how many to sample for a workload of `TEXTS`; None for its default number.
    against: names of `PROVIDERS` to compare with.
    result: the dict to fill and return, so that an interrupted run keeps what it has measured.
    """
    device = next(iter(engines.values()))._pipeline.runner.device
    model = Model(name, engines, half_dtype(device))
    providers, reasons = make_providers(model, against)
    for provider, reason in reasons.items():
        print(f"{provider}: {reason}")
    result = {} if result is None else result
    result.setdefault("model", model.engine.checkpoint.name)
    result |= {"workloads": [], "not run": reasons}
    rates = {dtype: matmul_rate(device, getattr(torch, dtype)) for dtype in engines if hasattr(torch, dtype)}
    sampler = TextSampler(model.engine)
    for workload, texts in workloads.items():
        if texts is None or isinstance(texts, int):
            texts = sampler.workload(workload, texts)
        result["workloads"].append(compare(workload, texts, model, providers, rates, rounds))
        print(table(result["workloads"][-1]), flush=True)
    return result


def half_dtype(device: torch.device) -> torch.dtype:
    """Return the fast 16-bit dtype of a device; fp32 for a CPU that has none."""
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def table(found: dict[str, Any]) -> str:
    """Format one workload of a result for a terminal."""
    lines = [f"\n{found['workload']}: {found['texts']:,} texts, {found['tokens']:,} tokens"]
    lines.append(f"{'':30}{'texts/s':>12}{'tokens/s':>12}{'speedup':>9}{'memory':>11}  min cosine")
    for row in found["rows"]:
        speedup, peak = row["speedup"], row["peak_bytes"]
        lines.append(
            f"{row['provider']:30}{row['texts_per_second']:12,.1f}{row['tokens_per_second']:12,.0f}"
            + ("" if speedup is None else f"{speedup:6.2f} x").rjust(9)
            + ("" if peak is None else f"{peak / 2**20:,.0f} MiB").rjust(11)
            + f"  {row['min_cosine']:.6f}"
        )
    for dtype, own in found["unpadded"].items():
        parts = ", ".join(f"{stage} {share:.0%}" for stage, share in own["stages"].items())
        lines.append(f"time of unpadded, {dtype}: {parts}")
    return "\n".join(lines)


def conclusion(result: dict[str, Any]) -> str:
    """Say in a sentence how fast unpadded is in the first dtype, compared with the reference if it ran."""
    own = [(found["workload"], found["rows"][0]) for found in result["workloads"]]
    if any(row["speedup"] is None for _, row in own):
        rates = ", ".join(f"{row['tokens_per_second']:,.0f} tokens/s on {workload}" for workload, row in own)
        return f"unpadded embeds {rates} here"
    speedups = ", ".join(f"{row['speedup']:.1f}x as fast as {REFERENCE} on {workload}" for workload, row in own)
    return f"unpadded is {speedups} here"
