"""The command `unpadded COMMAND`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from unpadded.cli import bench, embed, info, serve
from unpadded.cli import map as map_command
from unpadded.errors import UnpaddedError

COMMANDS = (embed, map_command, serve, info, bench)

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


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
        _discard_unwritten_output()
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("unpadded: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_unwritten_output()
        return EXIT_BROKEN_PIPE
    return 0


def _discard_unwritten_output() -> None:
    """Discard what stdout cannot write; otherwise the interpreter flushes it again at exit and prints a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="unpadded", description="Turn text into embeddings, without padding.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_command(commands)
    return parser
