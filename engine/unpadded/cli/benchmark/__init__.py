"""Text on disk to vectors in memory, beside what people use: the same texts, in turns, in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from unpadded.cli.benchmark.charts import bars
from unpadded.cli.benchmark.comparison import compare
from unpadded.cli.benchmark.comparison import scaling as measure_scaling
from unpadded.cli.benchmark.machine import card, matmul_rate
from unpadded.cli.benchmark.providers import PROVIDERS, Model, make_providers
from unpadded.cli.benchmark.workloads import TEXTS, TextSampler
from unpadded.engine import Engine

__all__ = ["PROVIDERS", "TEXTS", "card", "chart", "half_dtype", "measure", "table"]


def measure(
    name: str,
    engines: dict[str, Engine],
    workloads: Mapping[str, Sequence[str] | int | None],
    *,
    against: Sequence[str] = tuple(PROVIDERS),
    rounds: int = 3,
    scaling: Sequence[int] = (),
    into: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure a model on workloads, and print each table as it is ready.

    name: of the model, a folder or a hub id; engines: ours, by dtype; workloads: the texts of each, or how many are cut
    to the lengths of `TEXTS`' workload of that name, None for as many as it has; against: names of `PROVIDERS`;
    scaling: numbers of paragraphs to embed, one after the other, by the last of the engines; into: what is filled with
    results as they come and returned, so that an interruption loses none.
    """
    device = next(iter(engines.values())).runner.device
    model = Model(name, engines, half_dtype(device))
    providers, reasons = make_providers(model, against)
    for provider, reason in reasons.items():
        print(f"{provider} does not run here: {reason}")
    result = {} if into is None else into
    result.setdefault("model", model.engine.checkpoint.name)
    result |= {"workloads": [], "not run": reasons, "scaling": []}
    rates = {dtype: matmul_rate(device, getattr(torch, dtype)) for dtype in engines if hasattr(torch, dtype)}
    cutter = TextSampler(model.engine)
    for workload, given in workloads.items():
        texts = cutter.workload(workload, given) if given is None or isinstance(given, int) else given
        result["workloads"].append(compare(workload, texts, model, providers, rates, rounds))
        print(table(result["workloads"][-1]), flush=True)
    if scaling:
        texts = cutter.workload("paragraphs", max(scaling))
        for row in measure_scaling(list(engines.values())[-1], texts, scaling):
            result["scaling"].append(row)
            print(f"{row['texts']:,} texts: {row['tokens_per_second']:,.0f} tokens/s", flush=True)
    return result


def half_dtype(device: torch.device) -> torch.dtype:
    """The 16-bit type that is fast there; fp32 on a processor that has none."""
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def table(found: dict[str, Any]) -> str:
    """One workload for a terminal."""
    lines = [f"\n{found['workload']}: {found['texts']:,} texts, {found['tokens']:,} tokens"]
    lines.append(f"{'':30}{'texts/s':>12}{'tokens/s':>12}{'ratio':>8}{'ceiling':>9}{'memory':>11}  min cosine")
    for row in found["rows"]:
        ratio, share, grown = row["speedup"], row["share_of_matmul_rate"], row["peak_bytes"]
        lines.append(
            f"{row['provider']:30}{row['texts_per_second']:12,.1f}{row['tokens_per_second']:12,.0f}"
            + ("" if ratio is None else f"{ratio:6.2f} x").rjust(8)
            + ("" if share is None else f"{share:.0%}").rjust(9)
            + ("" if grown is None else f"{grown / 2**20:,.0f} MiB").rjust(11)
            + f"  {row['min_cosine']:.6f}"
        )
    for dtype, own in found["unpadded"].items():
        parts = ", ".join(f"{stage} {share:.1%}" for stage, share in own["stages"].items())
        lines.append(f"unpadded, {dtype}: {parts}; {own['share_of_forward_alone']:.1%} of the forward pass alone")
    return "\n".join(lines)


def chart(result: dict[str, Any]) -> str:
    """tokens/s of every provider on every workload, as SVG."""
    groups = {
        f"{found['workload']}": {row["provider"]: row["tokens_per_second"] for row in found["rows"]}
        for found in result["workloads"]
    }
    return bars(f"{result['model']}: tokens/s, text to vectors", groups)
