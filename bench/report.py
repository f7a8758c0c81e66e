"""Write tables and plots of benchmark results as Markdown; every figure in the documentation is generated here.

    python bench/report.py bench/results --page docs/benchmarks.md --readme README.md
    python bench/report.py DIR --page DIR/summary.md

DIR contains the JSON files that the benchmarks write, each under its own name, and optionally one folder per other
machine. Missing files are skipped. --page writes all tables, with the plots beside it; --readme replaces the short
table between its two markers.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unpadded.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGIN, END = "<!-- made by bench/report.py -->", "<!-- end -->"
INTRO = (
    "# Benchmarks\n\n"
    "`bench/report.py` generates this page from the JSON files of the benchmarks. All rows of a table were measured in "
    "one process on the same texts, with interleaved rounds, and medians are shown."
)
Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--page", type=Path, metavar="FILE")
    parser.add_argument("--readme", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.page:
        args.page.write_text(page(args.folder))
        try:
            from unpadded.cli.benchmark import plots
        except OptionError as error:
            print(f"{args.page} has no plots: {error}")
        else:
            for name, figure in figures(args.folder).items():
                plots.save(figure, args.page.parent / name)
    if args.readme:
        args.readme.write_text(with_summary(args.readme.read_text(), summary(args.folder)))


def page(folder: Path) -> str:
    """Return every result of a folder as Markdown."""
    parts = [INTRO]
    for path, result in results(folder):
        parts.append(f"## {SECTIONS[path.stem][0]}")
        try:
            parts.append(SECTIONS[path.stem][1](result))
            if path.stem in PLOTS:
                parts.append(f"![{SECTIONS[path.stem][0]}]({plot_name(path, folder)})")
        except KeyError as missing:
            parts.append(f"{path.name}: the run stopped before it wrote {missing}")
        parts.append(provenance(result, path, folder))
    return "\n\n".join(parts) + "\n"


def summary(folder: Path) -> str:
    """Return the speedups of unpadded as one Markdown table."""
    rows = []
    throughput = json.loads((folder / "throughput.json").read_text())
    for model in throughput["models"]:
        for found in model["workloads"]:
            speedups = {row["provider"]: f"{row['speedup']:.1f} x" for row in found["rows"]}
            workload = f"{model['model']}, {found['workload']}"
            rows.append((workload, speedups["unpadded, float32"], speedups["unpadded, bfloat16"]))
    header = ("text to vectors, speedup over sentence-transformers in float32", "float32", "bfloat16")
    return table(header, rows) + "\n\n" + provenance(throughput, folder / "throughput.json", folder)


def figures(folder: Path) -> dict[str, Figure]:
    """Return the plots of a folder's results, by file name."""
    drawn = {}
    for path, result in results(folder):
        if path.stem in PLOTS:
            try:
                drawn[plot_name(path, folder)] = PLOTS[path.stem](result)
            except KeyError:  # the run stopped before it had these figures
                continue
    return drawn


def plot_name(path: Path, folder: Path) -> str:
    return "-".join(path.relative_to(folder).with_suffix(".svg").parts)


def results(folder: Path) -> Iterator[tuple[Path, Result]]:
    """Yield the results in the folder itself, then those in its subfolders, one per other machine."""
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        for name in SECTIONS:
            path = place / f"{name}.json"
            if path.exists():
                yield path, json.loads(path.read_text())


def with_summary(readme: str, text: str) -> str:
    """Return the README with the text between its two markers replaced."""
    replaced, found = re.subn(
        f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n\n{text}\n\n{END}", readme, flags=re.DOTALL
    )
    if found != 1:
        raise SystemExit(f"the README has {found} places between {BEGIN} and {END}; it needs exactly one")
    return replaced


def provenance(result: Result, path: Path, folder: Path) -> str:
    """Return one line with the machine, the package versions, the commit and the file of a result."""
    card = result.get("machine") or result["machine_info"]["card"]
    where = card.get("gpu") or f"{card['cpu']}, {card['threads']} threads"
    packages = ", ".join(f"{name} {version}" for name, version in card["packages"].items() if version)
    return f"<sub>{where}; {packages}; commit {card['commit']}; `{path.relative_to(folder)}`</sub>"


def throughput(result: Result) -> str:
    parts = [
        "Each cell has tokens/s, for unpadded the share of the rate of a large matmul on this machine, and the speedup "
        "over sentence-transformers with its defaults. sentence-transformers-best runs in 16 bits."
    ]
    for model in result["models"]:
        rows = [row | {"workload": found["workload"]} for found in model["workloads"] for row in found["rows"]]
        parts += [f"### {model['model']}", grid(rows, lambda row: row["provider"])]
        stages = [
            (found["workload"], dtype, *(f"{share:.1%}" for share in own["stages"].values()), f"{own[ALONE]:.1%}")
            for found in model["workloads"]
            for dtype, own in found["unpadded"].items()
        ]
        shares = [f"{stage}, share of time" for stage in ("tokenize", "copy", "forward", "output")]
        parts.append(table(("workload", "dtype", *shares, "speed relative to the forward pass alone"), stages))
        if model["scaling"]:
            scaling = ((f"{row['texts']:,}", f"{row['tokens_per_second']:,.0f}") for row in model["scaling"])
            parts.append(table(("paragraphs in one call", "tokens/s"), scaling))
    return "\n\n".join(parts)


ALONE = "share_of_forward_alone"


def drop_in(result: Result) -> str:
    rows = ((row["drop_in"], f"**{row['ratio']:.2f} x**", f"{row['min_cosine']:.7f}") for row in result["rows"])
    return table(("replacement", "speedup", "min cosine to the original"), rows)


def server(result: Result) -> str:
    names = ("clients", "texts/s", "tokens/s", "p50, ms", "p99, ms", "share of engine.encode", "wrong vectors")
    rows = [(load, *(str(found.get(name, "")) for name in names)) for load, found in result["loads"].items()]
    sizes = [
        (load, size, str(found["requests"]), str(found["p50, ms"]), str(found["p99, ms"]))
        for load, by_size in ((load, found["by size"]) for load, found in result["loads"].items())
        for size, found in by_size.items()
    ]
    by_size = table(("load", "texts per request", "requests", "p50, ms", "p99, ms"), sizes)
    parts = [table(("load", *names), rows), by_size]
    if "relative to infinity" in result:
        ratio = result["relative to infinity"]
        parts.append(
            f"Relative to infinity: **{ratio['texts/s']:.2f} x** the texts/s, {ratio['p99, ms']:.2f} x the p99 latency."
        )
    return "\n\n".join(parts)


def loading(result: Result) -> str:
    rows = (
        (
            row["dtype"],
            row["way"],
            f"{row['seconds']:.2f} s",
            f"{row['resident']:.2f} x the file",
            f"{row['private']:.2f} x the file",
        )
        for row in result["rows"]
    )
    header = ("dtype", "way", "time", "peak resident memory", "peak private memory")
    return f"A file of {result['bytes'] / 1e6:.0f} MB in float32, loaded in each dtype.\n\n{table(header, rows)}"


def memory(result: Result) -> str:
    rows = ((f"{row['texts']} x 8192 tokens", f"{row['over_weights'] / 2**30:.2f} GiB") for row in result["rows"])
    return table(("texts in one call", "peak memory above the weights"), rows)


def ceilings(result: Result) -> str:
    rows = [(f"matmul, {name}", f"{rate / 1e12:.3g} TFLOP/s") for name, rate in result["flop_per_second"].items()]
    rows.append(("copy", f"{result['copy_bytes_per_second'] / 1e9:,.0f} GB/s"))
    return table(("operation", "rate"), rows)


def kernels(result: Result) -> str:
    infos = [row["extra_info"] for row in result["benchmarks"]]
    rows = ((info["kernel"], info["provider"], info["rate"], f"{info['share']:.0%}") for info in infos)
    return table(("kernel", "provider", "rate", "share of the ceiling"), rows)


def model(result: Result) -> str:
    baseline = {
        (row["workload"], row["dtype"]): row["tokens_per_second"]
        for row in result["rows"]
        if row["provider"] == "transformers, padded"
    }
    rows = []
    for row in result["rows"]:
        other = baseline.get((row["workload"], row["dtype"]))
        rows.append(row | {"speedup": other and row["tokens_per_second"] / other})
    parts = [
        f"NomicBERT with {result['layers']} layers. Each cell has tokens/s, the share of the rate of a large matmul on "
        "this machine, and the speedup over transformers with padded batches in the same dtype.",
        grid(rows, lambda row: f"{row['provider']}, {row['dtype']}"),
    ]
    if result["batch_invariant_cost"]:
        cost = ((workload, f"{share:.1%}") for workload, share in result["batch_invariant_cost"].items())
        parts.append(table(("workload", "tokens/s lost to batch_invariant"), cost))
    if result["latency"]:
        latency = ((name, f"{found['median'] * 1e3:.2f} ms") for name, found in result["latency"].items())
        parts.append(table(("one query of 32 tokens", "median latency"), latency))
    if result["not run"]:
        parts.append(table(("not run", "reason"), result["not run"].items()))
    return "\n\n".join(parts)


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
    kernels = f"CUDA kernels in addition to {', '.join(sorted(shared))}"
    header = ("family", "compared with", "texts", "maximum relative error, float32", kernels, "tests passed")
    return table(header, cells)


def grid(rows: list[Result], name: Callable[[Result], str]) -> str:
    """Return a table with one line per provider and one column per workload."""
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    lines: dict[str, dict[str, Result]] = {}
    for row in rows:
        lines.setdefault(name(row), {})[row["workload"]] = row

    def cell(row: Result | None) -> str:
        if row is None:
            return ""
        share = f", {row['share_of_matmul_rate']:.0%}" if row["share_of_matmul_rate"] else ""
        speedup = f", **{row['speedup']:.2f} x**" if row["speedup"] else ""
        return f"{row['tokens_per_second']:,.0f}{share}{speedup}"

    body = (
        (line, *(cell(found.get(w)) for w in workloads), f"{min(r['min_cosine'] for r in found.values()):.6f}")
        for line, found in lines.items()
    )
    return table(("", *workloads, "min cosine to float32"), body)


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot_throughput(result: Result) -> Figure:
    from unpadded.cli.benchmark.plots import bar_chart

    groups = {
        f"{model['model']}, {found['workload']}": {
            row["provider"]: row["speedup"] for row in found["rows"] if row["speedup"]
        }
        for model in result["models"]
        for found in model["workloads"]
    }
    return bar_chart("Text to vectors: speedup over sentence-transformers with its defaults", groups, "{:.2f} x")


def plot_model(result: Result) -> Figure:
    """Plot tokens/s of workloads whose texts all have one length."""
    from unpadded.cli.benchmark.plots import line_chart

    series: dict[str, list[tuple[float, float]]] = {}
    for row in result["rows"]:
        length = re.fullmatch(r"(?:\d+ x )?(\d+) tokens", row["workload"])
        if length:
            name = f"{row['provider']}, {row['dtype']}"
            series.setdefault(name, []).append((int(length[1]), row["tokens_per_second"]))
    return line_chart("Token ids to vectors", series, "tokens per text", "tokens/s")


def plot_kernels(result: Result) -> Figure:
    from unpadded.cli.benchmark.plots import bar_chart

    groups: dict[str, dict[str, float]] = {}
    for row in result["benchmarks"]:
        info = row["extra_info"]
        groups.setdefault(info["kernel"], {})[info["provider"]] = 100 * info["share"]
    return bar_chart("Share of the ceiling: a large copy, or a large matmul in 16 bits", groups, "{:.0f} %")


SECTIONS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "throughput": ("Text to vectors", throughput),
    "model": ("Token ids to vectors", model),
    "kernels": ("Kernels", kernels),
    "drop_in": ("Drop-in replacements", drop_in),
    "server": ("Server under load", server),
    "loading": ("Loading a checkpoint", loading),
    "memory": ("Peak memory", memory),
    "ceilings": ("Ceilings of the machine", ceilings),
    "families": ("Accuracy of each family", families),
}
PLOTS: dict[str, Callable[[Result], Figure]] = {
    "throughput": plot_throughput,
    "model": plot_model,
    "kernels": plot_kernels,
}


if __name__ == "__main__":
    main()
