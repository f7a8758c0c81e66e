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

# Flags of the results that are not one vector per text -> the options of encoding that they accept, and their own ones
# with defaults.
RESULTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "spans": (("task", "prompt", "dimensions", "normalize"), {"span_tokens": 256, "overlap": 0}),
    "sparse": (("task", "prompt", "truncation"), {"top_k": None}),
    "tokens": (("prompt", "truncation"), {"kind": "document", "pool_factor": 1.0}),
}

WORTH_MENTIONING = 1.05  # times the work of padded batches

DESCRIPTION = """\
Embed the texts of files.

INPUT is a .txt file (one text per line), a .jsonl, .ndjson, .json (an array or lines), .csv, .tsv or .parquet file, a
folder or a pattern of these, or - for lines on standard input. All formats except Parquet can be compressed (.gz, .bz2,
.xz, .zst). Several inputs are read in order. Blank lines are not rows, in any format. Text is UTF-8.

OUT is an .npy, .jsonl or .parquet file, or a folder (vectors/) of Parquet parts, which --resume can continue after an
interruption. Without it, or with -, JSON lines are written to stdout. --spans, --sparse and --tokens need
a Parquet output.
"""
EPILOG = """\
examples:
  unpadded embed notes.txt -m nomic-ai/nomic-embed-text-v1.5 -t search_document -o notes.npy
  unpadded embed a.jsonl b.jsonl --column body -m ./model --dimensions 256 -o vectors.parquet
  unpadded embed corpus/ -m ./model --id-column doc --carry title,year --on-error skip -o vectors/ --resume
  unpadded embed corpus/ -m ./model --spans --span-tokens 200 --carry title -o spans/
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
    group = embed.add_argument_group("other results than one vector per text, in Parquet")
    results = group.add_mutually_exclusive_group()
    for flag, text in (
        ("--spans", "one vector per span of a text, computed with the whole text as context, in a row of its own"),
        ("--sparse", "weights of vocabulary entries (SPLADE, bge-m3)"),
        ("--tokens", "one vector per token, for late interaction (ColBERT)"),
    ):
        results.add_argument(flag, action="store_const", const=flag[2:], dest="result", help=text)
    for flag, kind, metavar, text in (
        ("--span-tokens", int, "N", "with --spans: maximum number of tokens of a span (default: 256)"),
        ("--overlap", int, "N", "with --spans: maximum number of tokens that consecutive spans share (default: 0)"),
        ("--top-k", int, "N", "with --sparse: keep the N heaviest weights of each text"),
        ("--pool-factor", float, "X", "with --tokens: keep about one vector in X of a document, means of clusters"),
    ):
        group.add_argument(flag, type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--kind", choices=["document", "query"], help="with --tokens: what the texts are (default: document)"
    )


def run(args: argparse.Namespace) -> None:
    """Run the job and print a summary to stderr."""
    from unpadded import bulk
    from unpadded.bulk.formats import STDIN

    options = _options(args)
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
        result=args.result or "vectors",
    )
    try:
        totals = bulk.run_job(job, lambda: load(args), show_progress=False if args.quiet else None, **options)
    except (KeyboardInterrupt, Stopped) as error:
        if job.writes_dataset and STDIN not in job.inputs:
            error.add_note("finished parts are kept; run the same command with --resume to continue")
        raise
    say(_summary(totals, job.output_name))


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the result. OptionError for a flag that does not apply to it."""
    options = flag_values(args, describe(EncodeOptions))
    for result, (_, own) in RESULTS.items():
        for name in own:
            if result != args.result and (value := getattr(args, name)) is not None:
                raise OptionError(f"{_flag(name)} needs --{result}: {value!r}; add it, or omit {_flag(name)}")
    if args.result is None:
        return options
    accepted, own = RESULTS[args.result]
    for option in describe(EncodeOptions):
        if option.name not in accepted and (value := options.pop(option.name)) != option.default:
            raise OptionError(f"{_flag(option.name)} is not supported with --{args.result}: {value!r}; omit it")
    if args.top_k is not None and args.top_k < 1:
        raise OptionError(f"--top-k is not positive: {args.top_k}; pass the maximum number of weights per text")
    given = {name: getattr(args, name) for name in own}
    return options | {name: own[name] if value is None else value for name, value in given.items()}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
        f"--{args.result}": args.result is not None,
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
