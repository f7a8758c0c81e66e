"""`unpadded embed`: embed the texts of files into a file or a dataset."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from unpadded.cli.load_flags import Commands, add_flags, add_model_arguments, flag_values, load
from unpadded.errors import OptionError
from unpadded.options import EncodeOptions, LoadOptions

DESCRIPTION = """\
Embed the texts of files.

INPUT is a .jsonl, .csv or .parquet file, any other file (one text per line), a folder or a pattern of these, or - for
lines on standard input. All formats except Parquet can be gzipped (.gz). Several inputs are read in order.

OUT is an .npy, .jsonl or .parquet file, or a folder (vectors/) of Parquet parts, which --resume can continue after an
interruption. Without it, JSON lines are written to stdout.
"""
EPILOG = """\
examples:
  unpadded embed notes.txt -m nomic-ai/nomic-embed-text-v1.5 -t search_document -o notes.npy
  unpadded embed a.jsonl b.jsonl --column body -m ./model --dimensions 256 -o vectors.parquet
  unpadded embed corpus/ -m ./model --id-column doc --carry title,year --on-error skip -o vectors/ --resume
  echo "What is a vector?" | unpadded embed - -m ./model -t search_query
"""


def add_command(commands: Commands) -> None:
    """Add the command `unpadded embed`."""
    embed = commands.add_parser(
        "embed",
        help="embed the texts of files",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    embed.set_defaults(command=run)
    embed.add_argument("input", nargs="+", metavar="INPUT", help="a file, a folder, a pattern, or -")
    embed.add_argument("-m", "--model", required=True, help="a folder or a Hugging Face id")
    embed.add_argument("-o", "--output", metavar="OUT", help="a file or a folder")

    rows = embed.add_argument_group("reading and writing rows")
    rows.add_argument("--column", metavar="NAME", help="the column of the texts (default: text)")
    rows.add_argument(
        "--id-column", metavar="NAME", help="the column of the ids in a Parquet output (default: the row's number)"
    )
    rows.add_argument(
        "--carry",
        type=lambda names: names.split(","),
        default=[],
        metavar="NAME,...",
        help="columns to copy into a Parquet output: with their types from .parquet, as strings from other formats",
    )
    rows.add_argument(
        "--on-error",
        choices=["raise", "skip"],
        default="raise",
        help="what to do with an invalid row: raise stops, skip writes it to a file of rejected rows (default: raise)",
    )
    rows.add_argument("--part-rows", type=int, metavar="N", help="rows per Parquet part of a folder (default: 65536)")
    rows.add_argument("--resume", action="store_true", help="continue an interrupted job that writes to a folder")
    rows.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run on a Ray cluster: local, auto, or ray://HOST:PORT; INPUT and OUT are folders or buckets of Parquet",
    )
    add_model_arguments(embed)
    add_flags(embed.add_argument_group("embedding the texts"), EncodeOptions)


def run(args: argparse.Namespace) -> None:
    """Run the job and print a summary to stderr."""
    from unpadded import bulk

    options = flag_values(args, EncodeOptions)
    if args.ranges is not None:
        options["ranges"] = bulk.read_ranges(args.ranges)
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
    resumed = f" ({totals.resumed:,} embedded by earlier runs)" if args.resume else ""
    memory = bulk.peak_memory()
    print(
        f"unpadded: {totals.texts:,} texts{resumed}, {totals.tokens:,} tokens in {totals.seconds:.2f} s "
        f"({rate:,.0f} tokens/s), {totals.truncated:,} truncated -> {job.output_name}\n"
        f"unpadded: {totals.skipped:,} skipped, {totals.padding_avoided:.1%} padding avoided"
        + ("" if memory is None else f", peak memory {memory / 2**20:,.0f} MiB"),
        file=sys.stderr,
    )


def _run_on_ray(args: argparse.Namespace, options: dict[str, Any]) -> None:
    single_machine_flags = {
        "--resume": args.resume,
        "--part-rows": args.part_rows is not None,
        "--on-error skip": args.on_error == "skip",
    }
    for flag, is_set in single_machine_flags.items():
        if is_set:
            raise OptionError(f"{flag} is not supported with --ray {args.ray!r}; omit one of them")
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
        settings=flag_values(args, LoadOptions) | options,
    )
    print(
        f"unpadded: {totals.texts:,} texts, {totals.tokens:,} tokens in {totals.seconds:.2f} s including the start of "
        f"the actors, {totals.truncated:,} truncated -> {args.output}",
        file=sys.stderr,
    )
