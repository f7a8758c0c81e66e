"""The plots of docs/benchmarks.md, drawn by bench/report.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_throughput(result: dict[str, Any]) -> Figure:
    from plots import bar_chart

    groups = {
        f"{model['model']}, {found['workload']}": {
            row["provider"]: row["speedup"] for row in found["rows"] if row["speedup"]
        }
        for model in result["models"]
        for found in model["workloads"]
    }
    return bar_chart("Text to vectors: speedup over sentence-transformers with its defaults", groups, "{:.2f} x")


def plot_model(result: dict[str, Any]) -> Figure:
    """Plot tokens/s of workloads whose texts all have one length."""
    from plots import line_chart

    series: dict[str, list[tuple[float, float]]] = {}
    for row in result["rows"]:
        length = re.fullmatch(r"(?:\d+ x )?(\d+) tokens", row["workload"])
        if length:
            name = f"{row['provider']}, {row['dtype']}"
            series.setdefault(name, []).append((int(length[1]), row["tokens_per_second"]))
    return line_chart("Token ids to vectors", series, "tokens per text", "tokens/s")


def plot_kernels(result: dict[str, Any]) -> Figure:
    from plots import bar_chart

    groups: dict[str, dict[str, float]] = {}
    for row in result["benchmarks"]:
        info = row["extra_info"]
        groups.setdefault(info["kernel"], {})[info["provider"]] = 100 * info["share"]
    return bar_chart("Share of the ceiling: a large copy, or a large matmul in 16 bits", groups, "{:.0f} %")


PLOTS: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "throughput": plot_throughput,
    "model": plot_model,
    "kernels": plot_kernels,
}
