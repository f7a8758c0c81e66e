"""`unpadded serve`: a model over HTTP."""

from __future__ import annotations

import argparse
import time

from unpadded.cli.load_flags import Commands, add_model_arguments, load
from unpadded.errors import OptionError
from unpadded.server.options import DESCRIPTION, EPILOG, add_arguments, read_options


def add_command(commands: Commands) -> None:
    """The flags of `unpadded serve`."""
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.set_defaults(command=run)
    serve.add_argument("model", metavar="MODEL", help="a folder or a Hugging Face id")
    add_arguments(serve)
    add_model_arguments(serve)


def run(args: argparse.Namespace) -> None:
    """Serve until a signal."""
    started = time.perf_counter()
    try:
        from unpadded.server.serve import serve
    except ModuleNotFoundError as error:
        raise OptionError(f"serving needs more packages: {error}; pip install 'unpadded[server]'") from error
    options = read_options(args)
    serve(load(args), options, started)
