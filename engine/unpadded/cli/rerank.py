"""`unpadded rerank`: sort the texts of files by their scores for a query."""

from __future__ import annotations

import argparse
import json
from typing import get_args

from unpadded.cli.flags import Commands, add_flags, add_model, add_model_arguments, flag_values, load
from unpadded.errors import InputError, OptionError
from unpadded.options import EncodeOptions, ScoreActivation, describe

EPILOG = """\
examples:
  unpadded rerank -m BAAI/bge-reranker-base --query "How do tides form?" notes.txt --top-k 3
  unpadded rerank -m ./reranker --query "flour" a.jsonl b.parquet --column body
"""
OPTIONS = [option for option in describe(EncodeOptions) if option.name == "prompt"]


def add_command(commands: Commands) -> None:
    """Add the command `unpadded rerank`."""
    rerank = commands.add_parser(
        "rerank",
        help="sort the texts of files for a query",
        description="Score texts for a query with a reranker and print JSON lines, best first: the index among the\n"
        "rows of all inputs, from 0, the score and the text. INPUT is as in unpadded embed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rerank.set_defaults(command=run)
    rerank.add_argument("input", nargs="+", metavar="INPUT", help="a file, a folder, a pattern, or - for stdin")
    add_model(rerank, "-m", "--model")
    rerank.add_argument("--query", required=True, metavar="TEXT", help="the first text of every pair")
    rerank.add_argument("--top-k", type=int, metavar="N", help="number of texts to print (default: all)")
    rerank.add_argument("--column", metavar="NAME", help="the column of the texts (default: text)")
    scores = rerank.add_argument_group("scoring the texts")
    activation = "function of the scores; auto is the checkpoint's (default: auto)"
    scores.add_argument("--activation", choices=get_args(ScoreActivation), default="auto", help=activation)
    add_flags(scores, OPTIONS)
    add_model_arguments(rerank)


def run(args: argparse.Namespace) -> None:
    """Print the texts, best first."""
    from unpadded import bulk

    if args.top_k is not None and args.top_k < 1:
        raise OptionError(f"--top-k is not positive: {args.top_k}; pass the number of texts to print")
    job = bulk.make_job(args.input, column=args.column)
    texts = []
    for row in bulk.read_rows(job.inputs, job.column):
        if isinstance(row, bulk.RejectedRow):
            raise InputError(f"{row.error}; remove the row")
        texts.append(row.text)
    options = flag_values(args, OPTIONS) | {"show_progress": False if args.quiet else None}
    for one in load(args).rank(args.query, texts, top_k=args.top_k, activation=args.activation, **options):
        print(json.dumps({"index": one.index, "score": one.score, "text": texts[one.index]}))
