"""The tables of bench/cpu_peers.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Result = dict[str, Any]

INTRO = (
    "Every provider runs in processes of its own, one at a time. Each cell of unpadded has its speed relative to the "
    "fastest other library in the same precision: below 1.00 x unpadded is slower. tokens/s count the tokens of the "
    "texts, without padding. The query is one text of 16 tokens, tokenizing included; its ratio is one of speeds too. "
    "Memory is resident after the workloads, and at its peak. Loading includes the library's import. Cosines and the "
    "ten nearest paragraphs are compared with those of sentence-transformers in float32."
)


def cpu_peers(result: Result) -> str:
    """Return one table per model and number of threads."""
    parts = [INTRO]
    for model in result["models"]:
        for run in model["runs"]:
            threads = f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}"
            number = len(next(iter(run["rows"][0]["seconds"].values())))
            rounds = f"{number} round{'s' if number > 1 else ''}"
            parts += [f"### {model['model']}, {threads}, {rounds}", table(model, run)]
        if model["not run"]:
            lines = [f"| {name} | {reason} |" for name, reason in model["not run"].items()]
            parts.append("\n".join(["| not run | reason |", "| --- | --- |", *lines]))
        parts.append("; ".join(f"{name} {version}" for name, version in sorted(model["packages"].items())))
    return "\n\n".join(parts)


def table(model: Result, run: Result) -> str:
    """Return the rows of one number of threads as Markdown."""
    workloads = list(model["tokens"])
    header = [
        "",
        *(f"{workload}, tokens/s" for workload in workloads),
        "one query, ms",
        "memory, MB",
        "load, s",
        "cosine, mean / min",
    ]
    overlap = all("overlap" in found for found in model["accuracy"].values())
    busy = all("busy_share" in row for row in run["rows"])
    header += ["same ten nearest"] * overlap + ["speed with one core busy"] * busy
    lines = [header, ["---"] * len(header)]
    for row in run["rows"]:
        found = model["accuracy"][row["provider"]]
        cells = [
            row["provider"],
            *(
                f"{rate:,.0f}{relative(run, row, lambda other, name=name: other['tokens_per_second'][name])}"
                for name, rate in row["tokens_per_second"].items()
            ),
            f"{row['latency_seconds'] * 1e3:.2f}{relative(run, row, lambda r: 1 / r['latency_seconds'])}",
            f"{row['resident_bytes'] / 1e6:,.0f}, {row['peak_bytes'] / 1e6:,.0f}",
            f"{row['load_seconds']:.1f}",
            f"{found['mean_cosine']:.6f} / {found['min_cosine']:.6f}",
        ]
        cells += [f"{found['overlap']:.3f}"] if overlap else []
        cells += [f"{row['busy_share']:.2f} x"] if busy else []
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def relative(run: Result, row: Result, speed: Callable[[Result], float]) -> str:
    """Return the speed of unpadded relative to the fastest other library in its precision; empty for the others."""
    others = [
        speed(other)
        for other in run["rows"]
        if other["library"] != "unpadded" and other["precision"] == row["precision"]
    ]
    return f", **{speed(row) / max(others):.2f} x**" if others and row["library"] == "unpadded" else ""
