"""`unpadded embed`: the texts of files to the vectors of a file or a dataset."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from unpadded.cli.load_flags import Commands, add_model_arguments, load, settings
from unpadded.errors import OptionError

EPILOG = """\
examples:
  unpadded embed notes.txt -m nomic-ai/nomic-embed-text-v1.5 -t search_document -o notes.npy
  unpadded embed a.jsonl b.jsonl --column body -m ./model --dimensions 256 -o vectors.parquet
  unpadded embed corpus/ -m ./model --id-column doc --carry title,year --on-error skip -o vectors/ --resume
  echo "What is a vector?" | unpadded embed - -m ./model -t search_query
"""


def add_command(commands: Commands) -> None:
    """The flags of `unpadded embed`."""
    embed = commands.add_parser(
        "embed",
        help="embed the texts of files",
        description="Embed texts. INPUT is a text file (a text per line), .jsonl, .csv, .parquet, all but the "
        "last also .gz, a folder or pattern of them, or - for lines on stdin; several follow one another. OUT is .npy, "
        ".jsonl, .parquet, or a folder (vectors/) of Parquet parts; without it JSON lines go to stdout.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    embed.set_defaults(command=run)
    embed.add_argument("input", nargs="+", metavar="INPUT")
    embed.add_argument("-m", "--model", required=True, help="a folder or a Hugging Face id")
    embed.add_argument("-o", "--output", metavar="OUT", help="where the vectors go; its ending says how")
    embed.add_argument("--column", metavar="NAME", help="the text column of .jsonl, .csv and .parquet (default: text)")

    bulk = embed.add_argument_group("the rows")
    bulk.add_argument("--id-column", metavar="NAME", help="the ids of a Parquet output (default: the row's number)")
    bulk.add_argument(
        "--carry",
        type=lambda names: names.split(","),
        default=[],
        metavar="NAME,...",
        help="columns carried into a Parquet output: typed from .parquet, else as strings",
    )
    bulk.add_argument("--on-error", choices=["raise", "skip"], default="raise", help="of a broken row (default: raise)")
    bulk.add_argument("--part-rows", type=int, metavar="N", help="rows of a part of a folder (default: 65536)")
    bulk.add_argument("--resume", action="store_true", help="go on with a folder where a run was interrupted")
    bulk.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run on a Ray cluster: local, auto, or ray://HOST:PORT; INPUT and OUT are folders or buckets of Parquet",
    )

    add_model_arguments(embed)

    text = embed.add_argument_group("the texts")
    text.add_argument("-t", "--task", metavar="T", help="search_query, search_document ... or a prompt of the model")
    text.add_argument("--prompt", metavar="P", help="a prefix, literally")
    text.add_argument("--truncation", choices=["right", "left", "error"], default="right")
    text.add_argument("--long-text", choices=["truncate", "mean"], default="truncate")

    vectors = embed.add_argument_group("the vectors")
    vectors.add_argument("--dimensions", type=int, metavar="N", help="cut to N dimensions, then normalize")
    vectors.add_argument("--normalize", action=argparse.BooleanOptionalAction, help="default: what the model says")
    precisions = ["float32", "float16", "int8", "uint8", "binary", "ubinary"]
    vectors.add_argument("--precision", choices=precisions, default="float32")

    vectors.add_argument("--ranges", metavar="NPY", help="[2, N], lowest and highest of each, for int8 and uint8")


def run(args: argparse.Namespace) -> None:
    """Embed, and print a summary to stderr."""
    from unpadded import bulk

    options = {
        "task": args.task,
        "prompt": args.prompt,
        "dimensions": args.dimensions,
        "normalize": args.normalize,
        "precision": args.precision,
        "ranges": bulk.read_ranges(args.ranges) if args.ranges else None,
        "truncation": args.truncation,
        "long_text": args.long_text,
    }
    if args.ray is not None:
        _run_on_ray(args, options)
        return
    job = bulk.make_job(
        args.input,
        output=args.output,
        column=args.column,
        id_column=args.id_column,
        carried_columns=args.carry,
        on_error=args.on_error,
        part_rows=args.part_rows,
        resume=args.resume,
    )
    totals = bulk.run_job(job, lambda: load(args), **options)
    rate = totals.tokens / totals.seconds if totals.seconds else 0
    resumed = f" after {totals.resumed:,} done before" if args.resume else ""
    memory = bulk.peak_memory()
    print(
        f"unpadded: {totals.texts:,} texts{resumed}, {totals.tokens:,} tokens in {totals.seconds:.2f} s "
        f"({rate:,.0f} tokens/s), {totals.truncated:,} truncated -> {args.output or 'stdout'}\n"
        f"unpadded: {totals.skipped:,} skipped, {totals.padding_avoided:.1%} padding avoided"
        + ("" if memory is None else f", peak memory {memory / 2**20:,.0f} MiB"),
        file=sys.stderr,
    )


def _run_on_ray(args: argparse.Namespace, options: dict[str, Any]) -> None:
    refused = {
        "--resume": args.resume,
        "--part-rows": args.part_rows is not None,
        "--on-error skip": args.on_error == "skip",
    }
    for flag, given in refused.items():
        if given:
            raise OptionError(f"{flag} is for jobs on one machine, not for --ray {args.ray!r}; leave one of them out")
    try:
        from unpadded.integrations.ray_job import run_on_ray
    except ModuleNotFoundError as error:
        raise OptionError(f"--ray needs more packages: {error}; pip install 'unpadded[ray]'") from error
    totals = run_on_ray(
        args.ray,
        args.input,
        args.output,
        args.model,
        column=args.column,
        id_column=args.id_column,
        carried_columns=args.carry,
        settings=settings(args) | options,
    )
    print(
        f"unpadded: {totals.texts:,} texts, {totals.tokens:,} tokens in {totals.seconds:.2f} s with the start of the "
        f"actors, {totals.truncated:,} truncated -> {args.output}",
        file=sys.stderr,
    )
