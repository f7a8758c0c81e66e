"""Print the results of bench/gpu.sh in at most 40 lines: python bench/gpu_summary.py DIR

DIR has the JSON files and logs of the steps, any of which may be missing, and steps.txt with one line per step: its
name, exit code and seconds.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LINES, WIDTH = 40, 180
PER_LINE = 4  # steps
Result = dict[str, Any]


def main() -> None:
    print("\n".join(summary(Path(sys.argv[1]))))


def summary(folder: Path) -> list[str]:
    parts = (card, steps, smoke, tests, ceilings, models, heads, matmuls, kernels, latency, throughput)
    lines = [line[:WIDTH].rstrip() for part in parts for line in part(folder)]
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], f"... and {len(lines) - LINES + 1} more lines"]


def read(folder: Path, name: str) -> Result:
    """Return a step's result; without the rows that an interrupted step did not write, or empty."""
    try:
        found: Result = json.loads((folder / f"{name}.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def card(folder: Path) -> Iterator[str]:
    cards = (read(folder, name).get("machine") for name in ("ceilings", "smoke", "headline", "model"))
    found = next(filter(None, cards), None)
    if found:
        packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
        yield f"{found.get('gpu') or found['cpu']}; Python {found['python']}, {packages}; commit {found['commit']}"


def steps(folder: Path) -> Iterator[str]:
    names = {"0": "ok", "124": "out of time", "137": "killed", "skipped": "skipped"}
    path = folder / "steps.txt"
    rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    texts = [f"{name}: {names.get(status, f'FAILED ({status})')}, {seconds} s" for name, status, seconds in rows]
    for start in range(0, len(texts), PER_LINE):
        yield " | ".join(texts[start : start + PER_LINE])


def smoke(folder: Path) -> Iterator[str]:
    rows = read(folder, "smoke").get("rows", [])
    failed = [row for row in rows if "failed" in row]
    if rows:
        error = max((row["error"] for row in rows if "failed" not in row), default=0)
        yield f"operations: {len(rows) - len(failed)} of {len(rows)} correct, maximum relative error {error:.1e}"
    for row in failed[:4]:
        yield f"  WRONG: {row['case']}, {row['dtype']}, {row['provider']}: {row['failed']}"


def tests(folder: Path) -> Iterator[str]:
    """Yield the last line of every log of pytest, with the first failures."""
    for name in ("kernel-tests", "engine-tests", "memory-tests", "family-tests"):
        path = folder / f"{name}.log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        ends = [line.strip("= ") for line in lines if re.search(r"\d (passed|failed|skipped|error).* in \d", line)]
        failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        if ends or lines:
            yield f"{name}: {'; '.join(ends[-2:]) or 'no result'}"
        yield from (f"  {line}" for line in failed[:2])


def ceilings(folder: Path) -> Iterator[str]:
    found = read(folder, "ceilings")
    if found:
        rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in found["flop_per_second"].items())
        yield f"ceilings: {rates}, copy {found['copy_bytes_per_second'] / 1e12:.2f} TB/s"


def models(folder: Path) -> Iterator[str]:
    """Yield one line per provider: tokens/s of each workload, and the lowest cosine to fp32."""
    rows = [row for name in ("headline", "model") for row in read(folder, name).get("rows", [])]
    by_provider: dict[str, list[Result]] = {}
    for row in rows:
        by_provider.setdefault(f"{row['provider']}, {row['dtype']}", []).append(row)
    for provider, found in by_provider.items():
        rates = ", ".join(f"{row['workload']} {row['tokens_per_second'] / 1e6:.3f} M" for row in found)
        yield f"{provider}: {rates} tokens/s; cosine {min(row['min_cosine'] for row in found):.6f}"


def timings(folder: Path, name: str) -> dict[str, dict[str, Result]]:
    found: dict[str, dict[str, Result]] = {}
    for row in read(folder, name).get("benchmarks", []):
        info = row["extra_info"]
        found.setdefault(info["kernel"], {})[info["provider"].removeprefix("unpadded, ")] = info
    return found


def matmuls(folder: Path) -> Iterator[str]:
    for kernel, providers in timings(folder, "matmuls").items():
        yield f"{kernel}: " + ", ".join(f"{name} {info['rate']}" for name, info in providers.items())


def kernels(folder: Path) -> Iterator[str]:
    """Yield the share of the ceiling that every other kernel reaches, in one line."""
    found = timings(folder, "kernels")
    shares = [f"{kernel} {info['unpadded']['share']:.0%}" for kernel, info in found.items() if "unpadded" in info]
    if shares:
        yield f"share of the ceiling: {', '.join(shares)}"


def latency(folder: Path) -> Iterator[str]:
    found = read(folder, "model").get("latency", {})
    if found:
        yield "one query: " + ", ".join(f"{name} {times['median'] * 1e3:.2f} ms" for name, times in found.items())


def throughput(folder: Path) -> Iterator[str]:
    """Yield tokens/s from text on disk of each workload, and the speed relative to the forward pass alone."""
    workloads = [
        found for model in read(folder, "throughput").get("models", []) for found in model.get("workloads", [])
    ]
    texts = [
        f"{found['workload']} {found['rows'][0]['tokens_per_second'] / 1e6:.3f} M tokens/s "
        f"({next(iter(found['unpadded'].values()))['share_of_forward_alone']:.0%} of the forward pass alone)"
        for found in workloads
    ]
    if texts:
        yield f"text on disk to vectors: {', '.join(texts)}"


def heads(folder: Path) -> Iterator[str]:
    """Yield inputs/s of each head and checkpoint, and those of sentence-transformers."""
    rows = read(folder, "heads").get("rows", [])
    for own, peer in zip(rows[::2], rows[1::2], strict=True):
        yield (
            f"{own['head']}, {own['model']}, {own['dtype']}: {own['inputs_per_second']:,.0f} {own['unit']}/s, "
            f"{own['tokens_per_second'] / 1e6:.3f} M tokens/s; sentence-transformers {peer['inputs_per_second']:,.0f}; "
            f"relative error {own['relative_error']:.0e}"
        )


if __name__ == "__main__":
    main()
