"""Tables from results: every figure in the README comes out of here, none is typed.

    python bench/report.py bench/results --readme README.md    # rewrite the README's tables
    python bench/report.py DIR --write summary.md              # a run's own summary

DIR holds the JSON that the benches write, each under its own name; those that are absent are left out.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- made by bench/report.py -->", "<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--readme", type=Path, metavar="FILE")
    args = parser.parse_args()
    text = report(args.folder)
    if args.readme:
        args.readme.write_text(with_tables(args.readme.read_text(), text))
    if args.write:
        args.write.write_text(text)
    if not args.readme and not args.write:
        print(text)


def report(folder: Path) -> str:
    """Every result of a folder as Markdown."""
    parts = []
    for name, section in SECTIONS.items():
        path = folder / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            parts.append(f"{section(result)}\n\n{provenance(result, path)}")
    return "\n\n".join(parts) + "\n"


def with_tables(readme: str, tables: str) -> str:
    """The README with its tables replaced; what stands between the two marks is ours."""
    replaced, found = re.subn(
        f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n\n{tables}\n{END}", readme, flags=re.DOTALL
    )
    if found != 1:
        raise SystemExit(f"the README has {found} places between {BEGIN} and {END}; it needs one")
    return replaced


def provenance(result: dict[str, Any], path: Path) -> str:
    card = result.get("machine") or result["machine_info"]["card"]
    where = card.get("gpu") or f"{card['cpu']}, {card['threads']} threads"
    packages = ", ".join(f"{name} {version}" for name, version in card["packages"].items() if version)
    return f"<sub>{where}; {packages}; commit {card['commit']}; `bench/results/{path.name}`</sub>"


def throughput(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        (_, ours), (other, theirs) = row["tokens_per_second"].items()
        rows.append(
            (
                row["workload"],
                row["dtype"],
                f"{ours:,.0f}",
                f"{theirs:,.0f} ({other})",
                f"**{row['ratio']:.2f} x**",
                f"{row['share_of_product_rate']:.0%}",
            )
        )
    header = ("workload", "dtype", "unpadded, tokens/s", "other, tokens/s", "ratio", "of the matrix-product rate")
    return table(header, rows)


def drop_in(result: dict[str, Any]) -> str:
    rows = ((row["drop_in"], f"**{row['ratio']:.2f} x**", f"{row['least_cosine']:.7f}") for row in result["rows"])
    return table(("one line changed", "speed", "least cosine to the original"), rows)


def server(result: dict[str, Any]) -> str:
    steady, overload = result["steady"], result["overload"]
    names = ("clients", "p50, ms", "p99, ms", "tokens/s", "share of engine.encode", "wrong answers")
    rows = [
        ("steady", *(str(steady[name]) for name in names)),
        ("overload", *(str(overload.get(name, "")) for name in names)),
    ]
    return table(("server load", *names), rows)


def loading(result: dict[str, Any]) -> str:
    rows = (
        (
            row["dtype"],
            f"{row['read_and_cast_s']:.2f} s",
            f"{row['load_s']:.2f} s",
            f"{row['times_bound']:.2f}",
            f"{row['memory']:.2f} x the file",
        )
        for row in result["rows"]
    )
    megabytes = f"{result['bytes'] / 1e6:.0f} MB of fp32 loaded as"
    return table((megabytes, "read the file + cast", "load", "ratio", "peak memory"), rows)


def memory(result: dict[str, Any]) -> str:
    rows = ((f"{row['texts']} x 8192 tokens", f"{row['over_weights'] / 2**30:.2f} GiB") for row in result["rows"])
    return table(("embedded at once", "peak memory over the weights"), rows)


def ceilings(result: dict[str, Any]) -> str:
    rows = [
        (f"matrix product, {name}", f"{rate / 1e12:.3g} TFLOP/s") for name, rate in result["flop_per_second"].items()
    ]
    rows.append(("copy", f"{result['copy_bytes_per_second'] / 1e9:,.0f} GB/s"))
    return table(("ceiling", "measured"), rows)


def kernels(result: dict[str, Any]) -> str:
    rows = []
    for row in result["benchmarks"]:
        info = row["extra_info"]
        rows.append((row["name"].removeprefix("test_"), info["provider"], info["rate"], f"{info['share']:.0%}"))
    return table(("kernel", "provider", "rate", "of the ceiling"), rows)


def model(result: dict[str, Any]) -> str:
    rows = (
        (
            row["workload"],
            row["provider"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['flop_per_second'] / 1e12:.3g}",
            f"{row['share_of_floor']:.0%}",
            f"{row['least_cosine']:.6f}",
        )
        for row in result["rows"]
    )
    header = ("workload", "provider", "tokens/s", "TFLOP/s", "of the floor", "least cosine to fp32")
    query = result["latency"]
    return f"{table(header, rows)}\n\nOne query of 32 tokens: {query['median'] * 1e3:.2f} ms, ids to vector."


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "throughput": throughput,
    "drop_in": drop_in,
    "server": server,
    "loading": loading,
    "memory": memory,
    "ceilings": ceilings,
    "model": model,
    "kernels": kernels,
}


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
