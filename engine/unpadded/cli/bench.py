"""`unpadded bench`: a model's speed on this machine, beside what people use today."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from unpadded.cli.load_flags import Commands, add_model_arguments, load
from unpadded.errors import InputError, OptionError

WORKLOADS = ("queries", "paragraphs", "passages", "documents")


def add_command(commands: Commands) -> None:
    """The flags of `unpadded bench`."""
    bench = commands.add_parser(
        "bench",
        help="measure a model's speed",
        description="Embed the same texts with unpadded and, in turns, with what is installed of "
        "sentence-transformers, sentence-transformers-best (in 16 bits), transformers, fastembed and infinity. The "
        "texts are English cut to each workload's lengths: queries of 8 to 32 tokens, paragraphs of about 40, passages "
        "of 512, documents of up to 8192; or those of INPUT.",
    )
    bench.set_defaults(command=run)
    bench.add_argument("model", metavar="MODEL", help="a folder or a Hugging Face id")
    bench.add_argument(
        "input", nargs="*", metavar="INPUT", help="files of your own texts, as `unpadded embed` takes them"
    )
    bench.add_argument("--column", default="text", metavar="NAME", help="the text column of INPUT (default: text)")
    bench.add_argument("--workloads", type=_names, metavar="NAME,...", help=f"default: {','.join(WORKLOADS)}")
    bench.add_argument("--texts", type=int, metavar="N", help="of each workload, or of INPUT at most")
    bench.add_argument("--against", type=_names, metavar="NAME,...", help="some of those above (default: all)")
    bench.add_argument("--also", action="append", default=[], metavar="DTYPE", help="run ours in this dtype, too")
    bench.add_argument("--rounds", type=int, default=3, help="of which the median counts (default: 3)")
    bench.add_argument(
        "--scaling", type=_numbers, default=[], metavar="N,...", help="also embed so many paragraphs each"
    )
    bench.add_argument("--out", type=Path, metavar="FILE", help="write every sample as JSON")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw tokens/s as SVG")
    add_model_arguments(bench)


def run(args: argparse.Namespace) -> None:
    """Measure, print tables, write what was asked for."""
    from unpadded.cli import benchmark

    for flag, given, offered in (
        ("--workloads", args.workloads, WORKLOADS),
        ("--against", args.against, tuple(benchmark.PROVIDERS)),
    ):
        unknown = [name for name in given or () if name not in offered]
        if unknown:
            raise OptionError(f"{flag} is unknown: {', '.join(unknown)}; use some of {', '.join(offered)}")
    own = {"your texts": _texts(args)} if args.input else {}
    workloads = own | dict.fromkeys(args.workloads or (() if own else WORKLOADS), args.texts)
    engines = {}
    for dtype in (args.dtype, *args.also):
        engine = load(argparse.Namespace(**{**vars(args), "dtype": dtype}))
        engines[engine.runner.describe()["dtype"]] = engine
    against = benchmark.PROVIDERS if args.against is None else args.against
    result = {"machine": benchmark.card()} | benchmark.measure(
        args.model, engines, workloads, against=tuple(against), rounds=args.rounds, scaling=args.scaling
    )
    if args.out:
        args.out.write_text(json.dumps(result) + "\n")
    if args.plot:
        args.plot.write_text(benchmark.chart(result))


def _texts(args: argparse.Namespace) -> list[str]:
    from unpadded.bulk.readers import Broken, expand_inputs, read_rows

    texts: list[str] = []
    for row in read_rows(expand_inputs(args.input), args.column):
        if isinstance(row, Broken):
            raise InputError(f"{row.source}, row {row.row}: {row.error}; measure with sound files")
        texts.append(row.text)
        if len(texts) == args.texts:
            break
    if not texts:
        raise InputError(f"there are no texts in {', '.join(args.input)}; give files with some")
    return texts


def _names(value: str) -> list[str]:
    return [name.strip() for name in value.split(",")]


def _numbers(value: str) -> list[int]:
    return [int(number) for number in value.split(",")]
