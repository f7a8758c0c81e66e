"""`unpadded bench`: measure a model's speed on this machine and compare it with other libraries."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from unpadded.cli.flags import Commands, add_model_arguments, load
from unpadded.errors import InputError, OptionError

WORKLOADS = ("queries", "paragraphs", "passages", "documents")


def add_command(commands: Commands) -> None:
    """Add the `bench` command and its flags."""
    bench = commands.add_parser(
        "bench",
        help="measure a model's speed",
        description="Embed the same texts with unpadded and with each of these that is installed: "
        "sentence-transformers, sentence-transformers-best (in 16 bits), sentence-transformers-onnx and -openvino (its "
        "other backends) and transformers. The rounds are interleaved. The texts are English "
        "samples of a workload's lengths: queries of 8 to 32 tokens, paragraphs of about 40, passages of 512, "
        "documents of up to 8192; or the texts of INPUT.",
    )
    bench.set_defaults(command=run)
    bench.add_argument("model", metavar="MODEL", help="a folder or a Hugging Face id")
    bench.add_argument(
        "input", nargs="*", metavar="INPUT", help="files of your own texts, in the formats of `unpadded embed`"
    )
    bench.add_argument("--column", default="text", metavar="NAME", help="the text column of INPUT (default: text)")
    bench.add_argument("--workloads", type=_names, metavar="NAME,...", help=f"default: {','.join(WORKLOADS)}")
    bench.add_argument("--texts", type=int, metavar="N", help="texts per workload, or the maximum read from INPUT")
    bench.add_argument("--against", type=_names, metavar="NAME,...", help="which to compare with (default: all)")
    bench.add_argument("--also", action="append", default=[], metavar="DTYPE", help="also run unpadded in this dtype")
    bench.add_argument("--rounds", type=int, default=3, help="rounds, whose median is reported (default: 3)")
    bench.add_argument("--out", type=Path, metavar="FILE", help="write every measurement as JSON")
    add_model_arguments(bench)


def run(args: argparse.Namespace) -> None:
    """Measure, print tables, and write the result if a file was requested."""
    from unpadded.cli import benchmark

    _check_names("--workloads", args.workloads, WORKLOADS)
    _check_names("--against", args.against, tuple(benchmark.PROVIDERS))
    own = {"your texts": _texts(args)} if args.input else {}
    workloads = own | dict.fromkeys(args.workloads or (() if own else WORKLOADS), args.texts)
    engines = {}
    for dtype in (args.dtype, *args.also):
        engine = load(argparse.Namespace(**{**vars(args), "dtype": dtype}))
        engines[engine._pipeline.runner.describe()["dtype"]] = engine
    against = benchmark.PROVIDERS if args.against is None else args.against
    result = {"machine": benchmark.card()} | benchmark.measure(
        args.model, engines, workloads, against=tuple(against), rounds=args.rounds
    )
    print(f"\n{benchmark.conclusion(result)}")
    if args.out:
        args.out.write_text(json.dumps(result) + "\n")


def _check_names(flag: str, names: list[str] | None, known: tuple[str, ...]) -> None:
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise OptionError(f"{flag} is unknown: {', '.join(unknown)}; use some of {', '.join(known)}")


def _texts(args: argparse.Namespace) -> list[str]:
    from unpadded.bulk.formats import expand_inputs
    from unpadded.bulk.readers import read_rows
    from unpadded.bulk.rows import RejectedRow

    texts: list[str] = []
    for row in read_rows(expand_inputs(args.input), args.column):
        if isinstance(row, RejectedRow):
            raise InputError(f"{row.file}, row {row.row}: {row.error}; fix the row or pass other files")
        texts.append(row.text)
        if len(texts) == args.texts:
            break
    if not texts:
        raise InputError(f"there are no texts in {', '.join(args.input)}; pass files that have some")
    return texts


def _names(value: str) -> list[str]:
    return [name.strip() for name in value.split(",")]
