"""`unpadded serve`: serve a model over HTTP."""

from __future__ import annotations

import argparse
import time

from unpadded.cli.load_flags import Commands, add_model_arguments, load
from unpadded.errors import OptionError
from unpadded.server.options import DESCRIPTION, EPILOG, add_flags, read_flags


def add_command(commands: Commands) -> None:
    """Add the command and its flags."""
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.set_defaults(command=run)
    serve.add_argument("model", metavar="MODEL", help="a folder or a Hugging Face id")
    add_flags(serve)
    add_model_arguments(serve)


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    started = time.perf_counter()
    try:
        from unpadded.server.serve import serve
    except ModuleNotFoundError as error:
        raise OptionError(f"serving needs more packages: {error}; pip install 'unpadded[server]'") from error
    options = read_flags(args)
    serve(load(args), options, started)
