"""`unpadded embed`: embed the texts of files into a file or a dataset."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from unpadded.cli.flags import Commands, add_flags, add_model, add_model_arguments, flag_values, load
from unpadded.cli.terminal import Stopped, count, say
from unpadded.errors import OptionError, install_command
from unpadded.options import EncodeOptions, LoadOptions, describe

if TYPE_CHECKING:
    from unpadded.bulk import Totals

WORTH_MENTIONING = 1.05  # times the work of padded batches

DESCRIPTION = """\
Embed the texts of files.

INPUT is a .txt file (one text per line), a .jsonl, .ndjson, .json (an array or lines), .csv, .tsv or .parquet file, a
folder or a pattern of these, or - for lines on standard input. All formats except Parquet can be compressed (.gz, .bz2,
.xz, .zst). Several inputs are read in order. Blank lines are not rows, in any format. Text is UTF-8.

OUT is an .npy, .jsonl or .parquet file, or a folder (vectors/) of Parquet parts, which --resume can continue after an
interruption. Without it, or with -, JSON lines are written to stdout.
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
    add_model(embed, "-m", "--model")
    embed.add_argument("-o", "--output", metavar="OUT", help="a file, a folder, or - for stdout")

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
    rows.add_argument("--overwrite", action="store_true", help="replace the file OUT if it exists")
    rows.add_argument("--resume", action="store_true", help="continue an interrupted job that writes to a folder")
    rows.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run on a Ray cluster: local, auto, or ray://HOST:PORT; INPUT and OUT are folders or buckets of Parquet",
    )
    add_model_arguments(embed)
    add_flags(embed.add_argument_group("embedding the texts"), describe(EncodeOptions))


def run(args: argparse.Namespace) -> None:
    """Run the job and print a summary to stderr."""
    from unpadded import bulk
    from unpadded.bulk.formats import STDIN

    options = flag_values(args, describe(EncodeOptions))
    if args.ranges is not None:
        options["ranges"] = bulk.read_ranges(args.ranges)
    if args.ray is not None:
        totals = _run_on_ray(args, options)
        say(_summary(totals, args.output))
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
        overwrite=args.overwrite,
    )
    try:
        totals = bulk.run_job(job, lambda: load(args), show_progress=False if args.quiet else None, **options)
    except (KeyboardInterrupt, Stopped) as error:
        if job.writes_dataset and STDIN not in job.inputs:
            error.add_note("finished parts are kept; run the same command with --resume to continue")
        raise
    say(_summary(totals, job.output_name))


def _summary(totals: Totals, output: str) -> str:
    from unpadded.bulk.job import PADDED_BATCH_TEXTS

    rate = "" if totals.tokens_per_second is None else f" ({totals.tokens_per_second:,.0f} tokens/s)"
    optional = {
        f"{totals.resumed:,} embedded by earlier runs": totals.resumed,
        f"{totals.truncated:,} truncated": totals.truncated,
        f"{totals.skipped:,} skipped": totals.skipped,
        f"{count(totals.blank_lines, 'blank line')} left out": totals.blank_lines,
        f"{totals.padding_factor:.1f}x less work than padded batches of {PADDED_BATCH_TEXTS}": (
            totals.padding_factor >= WORTH_MENTIONING
        ),
    }
    parts = [
        count(totals.texts, "text"),
        f"{count(totals.tokens, 'token')} in {totals.seconds:.2f} s{rate}",
        *(words for words, is_set in optional.items() if is_set),
    ]
    return f"{', '.join(parts)} -> {output}"


def _run_on_ray(args: argparse.Namespace, options: dict[str, Any]) -> Totals:
    single_machine_flags = {
        "--resume": args.resume,
        "--overwrite": args.overwrite,
        "--part-rows": args.part_rows is not None,
        "--on-error skip": args.on_error == "skip",
    }
    for flag, is_set in single_machine_flags.items():
        if is_set:
            raise OptionError(f"{flag} is not supported with --ray {args.ray!r}; omit one of them")
    try:
        from unpadded.integrations.ray_job import run_on_ray
    except ModuleNotFoundError as error:
        raise OptionError(f"--ray needs more packages: {error}; {install_command('ray')}") from error
    return run_on_ray(
        args.ray,
        args.input,
        args.output,
        args.model,
        column=args.column,
        id_column=args.id_column,
        carried_columns=args.carry,
        settings=flag_values(args, describe(LoadOptions)) | options,
    )
