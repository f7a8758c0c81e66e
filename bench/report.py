"""Tables and plots from results: every figure in the README comes out of here, none is typed.

    python bench/report.py bench/results --readme README.md    # rewrite the README's tables, draw the plots
    python bench/report.py DIR --write DIR/summary.md          # a run's own summary

DIR holds the JSON that the benches write, each under its own name; those that are absent are left out. A folder in it
holds those of another machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from unpadded.cli.benchmark import charts

BEGIN, END = "<!-- made by bench/report.py -->", "<!-- end -->"
Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--readme", type=Path, metavar="FILE")
    args = parser.parse_args()
    for path, drawn in plots(args.folder).items():
        path.write_text(drawn)
    if args.readme:
        args.readme.write_text(with_tables(args.readme.read_text(), report(args.folder, args.readme.parent)))
    if args.write:
        args.write.write_text(report(args.folder, args.write.parent))
    if not args.readme and not args.write:
        print(report(args.folder, Path()))


def report(folder: Path, beside: Path) -> str:
    """Every result of a folder as Markdown; beside: where the text will lie, from which its plots are found."""
    parts = []
    drawn = plots(folder)
    for path, result in results(folder):
        try:
            parts.append(SECTIONS[path.stem](result))
        except KeyError as missing:
            parts.append(f"{path.name}: the run ended before it had {missing}")
        parts.append(provenance(result, path))
        if path.with_suffix(".svg") in drawn:
            parts.append(f"![{path.stem}]({os.path.relpath(path.with_suffix('.svg'), beside)})")
    return "\n\n".join(parts) + "\n"


def plots(folder: Path) -> dict[Path, str]:
    """The SVG of every result that has one, beside it."""
    drawn: dict[Path, str] = {}
    for path, result in results(folder):
        if path.stem in PLOTS:
            with contextlib.suppress(KeyError, ValueError):  # a run that ended before it had a figure
                drawn[path.with_suffix(".svg")] = PLOTS[path.stem](result)
    return drawn


def results(folder: Path) -> Iterator[tuple[Path, Result]]:
    """What this machine measured, then what others did."""
    others = sorted(path for path in folder.iterdir() if path.is_dir())
    for place in (folder, *others):
        for name in SECTIONS:
            path = place / f"{name}.json"
            if path.exists():
                yield path, json.loads(path.read_text())


def with_tables(readme: str, tables: str) -> str:
    """The README with its tables replaced; what stands between the two marks is ours."""
    replaced, found = re.subn(
        f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n\n{tables}\n{END}", readme, flags=re.DOTALL
    )
    if found != 1:
        raise SystemExit(f"the README has {found} places between {BEGIN} and {END}; it needs one")
    return replaced


def provenance(result: Result, path: Path) -> str:
    card = result.get("machine") or result["machine_info"]["card"]
    where = card.get("gpu") or f"{card['cpu']}, {card['threads']} threads"
    packages = ", ".join(f"{name} {version}" for name, version in card["packages"].items() if version)
    name = path.name if path.parent.name == "results" else f"{path.parent.name}/{path.name}"
    return f"<sub>{where}; {packages}; commit {card['commit']}; `bench/results/{name}`</sub>"


def throughput(result: Result) -> str:
    parts = []
    for model in result["models"]:
        rows = [
            row
            | {
                "workload": found["workload"],
                "ratio": row["speedup"],
                "share_of_matmul_rate": row["share_of_matmul_rate"],
            }
            for found in model["workloads"]
            for row in found["rows"]
        ]
        parts.append(
            f"{model['model']}, text to vectors: tokens/s, of ours the share of the matrix-product rate, and the ratio "
            "to sentence-transformers at its defaults.\n\n" + grid(rows, lambda row: row["provider"])
        )
        own = [
            (found["workload"], dtype, *(f"{share:.1%}" for share in ours["stages"].values()), f"{ours[KEY]:.1%}")
            for found in model["workloads"]
            for dtype, ours in found["unpadded"].items()
        ]
        parts.append(table(("where the time goes", "dtype", *STAGES, "speed, of the forward pass alone"), own))
        if model["scaling"]:
            grown = ((f"{row['texts']:,}", f"{row['tokens_per_second']:,.0f}") for row in model["scaling"])
            parts.append(table(("paragraphs embedded at once", "tokens/s"), grown))
    return "\n\n".join(parts)


STAGES, KEY = ("tokenize", "copy", "forward", "output"), "share_of_forward_alone"


def drop_in(result: Result) -> str:
    rows = ((row["drop_in"], f"**{row['ratio']:.2f} x**", f"{row['min_cosine']:.7f}") for row in result["rows"])
    return table(("one line changed", "speed", "min cosine to the original"), rows)


def server(result: Result) -> str:
    names = ("clients", "texts/s", "tokens/s", "p50, ms", "p99, ms", "share of engine.encode", "wrong answers")
    rows = [(load, *(str(found.get(name, "")) for name in names)) for load, found in result["loads"].items()]
    sizes = [
        (load, size, str(found["requests"]), str(found["p50, ms"]), str(found["p99, ms"]))
        for load, by_size in ((load, found["by size"]) for load, found in result["loads"].items())
        for size, found in by_size.items()
    ]
    by_size = table(("load", "texts of a request", "answers", "p50, ms", "p99, ms"), sizes)
    parts = [table(("server load", *names), rows), by_size]
    if "to infinity" in result:
        to = result["to infinity"]
        parts.append(f"To infinity: **{to['texts/s']:.2f} x** its texts/s, {to['p99, ms']:.2f} x its 99th percentile.")
    return "\n\n".join(parts)


def loading(result: Result) -> str:
    rows = (
        (
            row["dtype"],
            f"{row['read_and_cast_s']:.2f} s",
            f"{row['load_s']:.2f} s",
            f"{row['times_bound']:.2f}",
            f"{row['memory']:.2f} x the file",
            f"{row['load_and_pack_s']:.2f} s, {row['memory_of_packing']:.2f} x the file",
        )
        for row in result["rows"]
    )
    megabytes = f"{result['bytes'] / 1e6:.0f} MB of fp32 loaded as"
    return table((megabytes, "read the file + cast", "load", "ratio", "peak memory", "laid out for a CPU, too"), rows)


def memory(result: Result) -> str:
    rows = ((f"{row['texts']} x 8192 tokens", f"{row['over_weights'] / 2**30:.2f} GiB") for row in result["rows"])
    return table(("embedded at once", "peak memory over the weights"), rows)


def ceilings(result: Result) -> str:
    rows = [
        (f"matrix product, {name}", f"{rate / 1e12:.3g} TFLOP/s") for name, rate in result["flop_per_second"].items()
    ]
    rows.append(("copy", f"{result['copy_bytes_per_second'] / 1e9:,.0f} GB/s"))
    return table(("ceiling", "measured"), rows)


def kernels(result: Result) -> str:
    rows = []
    for row in result["benchmarks"]:
        info = row["extra_info"]
        rows.append((info["kernel"], info["provider"], info["rate"], f"{info['share']:.0%}"))
    return table(("kernel", "provider", "rate", "of the ceiling"), rows)


def model(result: Result) -> str:
    other = {
        (row["workload"], row["dtype"]): row["tokens_per_second"]
        for row in result["rows"]
        if row["provider"] == "transformers, padded"
    }
    rows = []
    for row in result["rows"]:
        theirs = other.get((row["workload"], row["dtype"]))
        rows.append(row | {"ratio": theirs and row["tokens_per_second"] / theirs})
    parts = [
        f"NomicBERT, {result['layers']} layers, ids to vectors: tokens/s, share of the matrix-product rate and the "
        "ratio to transformers' padded batches.\n\n" + grid(rows, lambda row: f"{row['provider']}, {row['dtype']}")
    ]
    if result["batch_invariant_cost"]:
        price = ((workload, f"{share:.1%}") for workload, share in result["batch_invariant_cost"].items())
        parts.append(table(("price of batch_invariant", "of tokens/s"), price))
    if result["latency"]:
        latency = ((name, f"{found['median'] * 1e3:.2f} ms") for name, found in result["latency"].items())
        parts.append(table(("one query of 32 tokens, ids to vector", "median"), latency))
    if result["not run"]:
        parts.append(table(("not run", "reason"), result["not run"].items()))
    return "\n\n".join(parts)


def grid(rows: list[Result], name: Callable[[Result], str]) -> str:
    """A line a provider, a column a workload: tokens/s, the share of the floor where there is one, the ratio."""
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    lines: dict[str, dict[str, Result]] = {}
    for row in rows:
        lines.setdefault(name(row), {})[row["workload"]] = row

    def cell(row: Result | None) -> str:
        if row is None:
            return ""
        share = f", {row['share_of_matmul_rate']:.0%}" if row["share_of_matmul_rate"] else ""
        ratio = f", **{row['ratio']:.2f} x**" if row["ratio"] else ""
        return f"{row['tokens_per_second']:,.0f}{share}{ratio}"

    body = (
        (line, *(cell(found.get(w)) for w in workloads), f"{min(r['min_cosine'] for r in found.values()):.6f}")
        for line, found in lines.items()
    )
    return table(("", *workloads, "min cosine to fp32"), body)


def draw_throughput(result: Result) -> str:
    groups = {
        f"{model['model']}, {found['workload']}": {
            row["provider"]: row["speedup"] for row in found["rows"] if row["speedup"]
        }
        for model in result["models"]
        for found in model["workloads"]
    }
    return charts.bars("Text to vectors: speed, in that of sentence-transformers at its defaults", groups, "{:.2f} x")


def draw_model(result: Result) -> str:
    """tokens/s against length, of texts of equal lengths."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in result["rows"]:
        length = re.fullmatch(r"(?:\d+ x )?(\d+) tokens", row["workload"])
        if length:
            name = f"{row['provider']}, {row['dtype']}"
            series.setdefault(name, []).append((int(length[1]), row["tokens_per_second"]))
    return charts.lines("Ids to vectors", series, "tokens of a text", "tokens/s")


def draw_kernels(result: Result) -> str:
    groups: dict[str, dict[str, float]] = {}
    for row in result["benchmarks"]:
        info = row["extra_info"]
        groups.setdefault(info["kernel"], {})[info["provider"]] = 100 * info["share"]
    return charts.bars("Share of the measured ceiling: of a copy, or of a product in 16 bits", groups, "{:.0f} %")


def families(result: Result) -> str:
    rows = result["rows"]
    shared = set.intersection(*(set(row["kernels"]) for row in rows))
    cells = (
        (
            row["family"],
            ", ".join(row["references"]),
            f"{row['texts']} of up to {row['longest']} tokens",
            f"{row['error']:.1e}",
            ", ".join(kernel for kernel in row["kernels"] if kernel not in shared),
            str(row["tests"]),
        )
        for row in rows
    )
    kernels = f"on CUDA, besides {', '.join(sorted(shared))}"
    return table(("family", "held against", "texts", "worst relative error, fp32", kernels, "tests passed"), cells)


SECTIONS: dict[str, Callable[[Result], str]] = {
    "throughput": throughput,
    "model": model,
    "kernels": kernels,
    "drop_in": drop_in,
    "server": server,
    "loading": loading,
    "memory": memory,
    "ceilings": ceilings,
    "families": families,
}
PLOTS: dict[str, Callable[[Result], str]] = {
    "throughput": draw_throughput,
    "model": draw_model,
    "kernels": draw_kernels,
}


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
