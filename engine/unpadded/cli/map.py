"""`unpadded map`: the vectors of a Parquet output as a page with a map of them."""

from __future__ import annotations

import argparse
import sys

from unpadded.cli.load_flags import Commands

EPILOG = """\
examples:
  unpadded embed corpus/ -m ./model --carry text,topic -o vectors/
  unpadded map vectors/ --color-column topic -o map.html
"""


def add_command(commands: Commands) -> None:
    """The flags of `unpadded map`."""
    page = commands.add_parser(
        "map",
        help="draw a map of vectors",
        description="Write a self-contained HTML page with a point for each vector of a .parquet file or a folder of\n"
        "them. Near vectors lie near; a point shows its text, and a search box finds it. Needs the extra 'map'.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    page.set_defaults(command=run)
    page.add_argument("input", metavar="VECTORS", help="what unpadded embed wrote, or any Parquet with vectors")
    page.add_argument("-o", "--output", metavar="OUT", help="the page (default: the name of VECTORS, with .html)")
    page.add_argument("--text-column", metavar="NAME", help="shown of a point (default: text, or the first of strings)")
    page.add_argument("--color-column", metavar="NAME", help="colors the points: categories, numbers or days")
    page.add_argument("--vector-column", default="embedding", metavar="NAME", help="(default: embedding)")
    page.add_argument(
        "--sample", type=int, default=100_000, metavar="N", help="points, drawn at random (default: 100000)"
    )


def run(args: argparse.Namespace) -> None:
    """Write the page, and say on stderr of how many vectors."""
    from unpadded.cli.map_page import write_map

    drawn = write_map(
        args.input,
        args.output,
        vector_column=args.vector_column,
        text_column=args.text_column,
        color_column=args.color_column,
        sample=args.sample,
    )
    print(f"unpadded: {drawn.points:,} of {drawn.rows:,} vectors -> {drawn.path}", file=sys.stderr)
