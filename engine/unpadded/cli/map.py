"""`unpadded map`: write an HTML page that shows a corpus as points, grouped by topic."""

from __future__ import annotations

import argparse
from pathlib import Path

from unpadded.cli.flags import Commands
from unpadded.cli.terminal import say
from unpadded.errors import OptionError

MAX_POINTS = 100_000  # a browser still pans and zooms this many smoothly
EPILOG = """\
examples:
  unpadded embed corpus/ -m ./model --carry text,year -o vectors/
  unpadded map vectors/ -o map.html
  unpadded map vectors/ --color-column year --title "Our corpus" -o map.html
"""


def add_command(commands: Commands) -> None:
    """Add the flags of `unpadded map`."""
    parser = commands.add_parser(
        "map",
        help="draw a map of the texts",
        description="Write one self-contained HTML page with a point for each text. Similar texts are close together,\n"
        "clusters are named by their most characteristic words, and a point shows its text. Needs the extra 'map'.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    parser.add_argument("input", metavar="VECTORS", help="a .parquet file or a folder of them, as embed writes them")
    parser.add_argument("-o", "--output", metavar="OUT", help="the page (default: the name of VECTORS, with .html)")
    parser.add_argument("--title", help="the heading of the page (default: the name of VECTORS)")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="the texts (default: text)")
    parser.add_argument("--color-column", metavar="NAME", help="color by this column instead of by cluster")
    parser.add_argument("--vector-column", default="embedding", metavar="NAME", help="the vectors (default: embedding)")
    parser.add_argument(
        "--sample",
        type=int,
        default=MAX_POINTS,
        metavar="N",
        help="draw at most N points, chosen at random (%(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Write the page and report the number of points on stderr."""
    from unpadded.bulk.atomic_files import atomic_file
    from unpadded.cli import topic_map

    name = Path(args.input).resolve().name.removesuffix(".parquet")
    path = Path(args.output or Path(args.input).parent / f"{name}.html")
    if path.suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"the map is an HTML page: {str(path)!r}; use a name that ends in .html")
    if args.sample < 1:
        raise OptionError(f"--sample is not positive: {args.sample}; pass the maximum number of points")
    topic_map.import_umap()
    points = topic_map.read_points(args.input, args.vector_column, args.text_column, args.color_column, args.sample)
    say(f"placing {len(points.texts):,} texts (minutes for 100,000)")
    page = topic_map.draw(points, args.title or name, args.color_column)
    final = path.resolve()
    with atomic_file(final, final.with_name(f".{final.name}.tmp"), str(path)) as file:
        file.write(page.encode())
    say(f"{len(points.texts):,} of {points.total_rows:,} texts -> {path}")
