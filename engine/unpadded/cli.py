"""The command line: `unpadded embed`, `serve` and `info`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from unpadded.errors import OptionError, OutputError, UnpaddedError
from unpadded.server.options import DESCRIPTION, EPILOG, add_arguments, read_options

if TYPE_CHECKING:
    from unpadded import Engine

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
STDOUT = 1  # the file descriptor

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
VALUE_COLUMN = 22  # of what `info` prints

_EMBED_EPILOG = """\
examples:
  unpadded embed notes.txt -m nomic-ai/nomic-embed-text-v1.5 -t search_document -o notes.npy
  unpadded embed a.jsonl b.jsonl --column body -m ./model --dimensions 256 -o vectors.parquet
  unpadded embed corpus/ -m ./model --id-column doc --carry title,year --on-error skip -o vectors/ --resume
  echo "What is a vector?" | unpadded embed - -m ./model -t search_query
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    args = _parser().parse_args(argv)
    logging.basicConfig(format="unpadded: %(message)s")
    command: Callable[[argparse.Namespace], None] = args.command
    try:
        command(args)
        sys.stdout.flush()
    except UnpaddedError as error:
        print(f"unpadded: error: {error}", file=sys.stderr)
        if isinstance(error, OutputError) and args.command is _embed and args.output is None:
            _abandon_stdout()
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("unpadded: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _abandon_stdout()
        return EXIT_BROKEN_PIPE
    return 0


def _abandon_stdout() -> None:
    """Without it the interpreter flushes what stdout could not take once more as it exits, and complains."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), STDOUT)


def _embed(args: argparse.Namespace) -> None:
    from unpadded import bulk

    job = bulk.make_job(
        args.input,
        output=args.output,
        column=args.column,
        id_column=args.id_column,
        carry=args.carry,
        on_error=args.on_error,
        part_rows=args.part_rows,
        resume=args.resume,
    )
    totals = bulk.run_job(
        job,
        lambda: _load(args),
        task=args.task,
        prompt=args.prompt,
        dimensions=args.dimensions,
        normalize=args.normalize,
        precision=args.precision,
        ranges=bulk.read_ranges(args.ranges) if args.ranges else None,
        truncation=args.truncation,
        long_text=args.long_text,
    )
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


def _load(args: argparse.Namespace) -> Engine:
    import unpadded

    return unpadded.load(
        args.model,
        device=args.device,
        dtype=args.dtype,
        attention=args.attention,
        rotary_scaling_factor=args.rotary_scaling_factor,
        max_length=args.max_length,
        token_budget=args.token_budget,
        batch_invariant=args.batch_invariant,
        revision=args.revision,
    )


def _serve(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    try:
        from unpadded.server.lifecycle import serve
    except ModuleNotFoundError as error:
        raise OptionError(f"serving needs more packages: {error}; pip install 'unpadded[server]'") from error
    options = read_options(args)
    serve(_load(args), options, started)


def _info(args: argparse.Namespace) -> None:
    from unpadded.checkpoint import open_checkpoint
    from unpadded.families import FAMILIES

    checkpoint = open_checkpoint(args.model, revision=args.revision)
    slots = FAMILIES[checkpoint.spec.family].slots(checkpoint.spec)
    parameters = sum(math.prod(slot.shape) for slot in slots.values())
    memory = {dtype: parameters * item_bytes for dtype, item_bytes in ITEM_BYTES.items()}
    description = {**checkpoint.describe(), "parameters": parameters, "memory": memory}
    if args.json:
        print(json.dumps(description, indent=2))
    else:
        mebibytes = {dtype: f"{size / 2**20:,.1f} MiB" for dtype, size in memory.items()}
        _print_nested({**description, "parameters": f"{parameters:,}", "memory": mebibytes})


def _print_nested(values: dict[str, Any], indent: str = "") -> None:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            print(f"{indent}{name}")
            _print_nested(value, indent + "  ")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            print(f"{indent}{name}".ljust(VALUE_COLUMN) + str("none" if shown in (None, "", {}) else shown))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="unpadded", description="Text to embeddings, without padding.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    embed = commands.add_parser(
        "embed",
        help="embed the texts of files",
        description="Embed texts. INPUT is a text file (a text per line), .jsonl, .csv, .parquet, all but the "
        "last also .gz, a folder or pattern of them, or - for lines on stdin; several follow one another. OUT is .npy, "
        ".jsonl, .parquet, or a folder (vectors/) of Parquet parts; without it JSON lines go to stdout.",
        epilog=_EMBED_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    embed.set_defaults(command=_embed)
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

    _add_model_arguments(embed)

    text = embed.add_argument_group("the texts")
    text.add_argument("-t", "--task", metavar="T", help="search_query, search_document ... or a prompt of the model")
    text.add_argument("--prompt", metavar="P", help="a prefix, literally")
    text.add_argument("--truncation", choices=["right", "left", "error"], default="right")
    text.add_argument("--long-text", choices=["truncate", "mean"], default="truncate")

    vectors = embed.add_argument_group("the vectors")
    vectors.add_argument("--dimensions", type=int, metavar="N", help="cut to N dimensions, then normalise")
    vectors.add_argument("--normalize", action=argparse.BooleanOptionalAction, help="default: what the model says")
    precisions = ["float32", "float16", "int8", "uint8", "binary", "ubinary"]
    vectors.add_argument("--precision", choices=precisions, default="float32")

    vectors.add_argument("--ranges", metavar="NPY", help="[2, N], lowest and highest of each, for int8 and uint8")

    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.set_defaults(command=_serve)
    serve.add_argument("model", metavar="MODEL", help="a folder or a Hugging Face id")
    add_arguments(serve)
    _add_model_arguments(serve)

    info = commands.add_parser("info", help="describe a model", description="Describe a model without loading it.")
    info.set_defaults(command=_info)
    info.add_argument("model", metavar="MODEL", help="a folder or a Hugging Face id")
    info.add_argument("--revision", help="a branch, tag or commit of a Hugging Face id")
    info.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the model")
    model.add_argument("--revision", help="a branch, tag or commit of a Hugging Face id")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    model.add_argument("--dtype", default="auto", help="auto, float32, float16, bfloat16 (default: auto)")
    model.add_argument("--attention", default="auto", help="the attention backend (default: auto)")
    model.add_argument(
        "--rotary-scaling-factor",
        type=_scaling_factor,
        default="config",
        metavar="F",
        help="config, none, or a number such as 2 (default: config)",
    )
    model.add_argument("--max-length", type=int, metavar="N", help="tokens kept of a text (default: the model's)")
    model.add_argument("--token-budget", type=int, metavar="N", help="tokens of a batch; it bounds memory")
    model.add_argument("--batch-invariant", action="store_true", help="the same bits in any batch on CUDA too, slower")


def _scaling_factor(value: str) -> str | float | None:
    if value == "config":
        return value
    if value == "none":
        return None
    try:
        return float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not config, none or a number: {value!r}") from None
