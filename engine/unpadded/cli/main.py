"""The command line, `unpadded COMMAND`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from unpadded.cli import bench, embed, info, serve
from unpadded.cli import map as map_command
from unpadded.errors import OutputError, UnpaddedError

COMMANDS = (embed, map_command, serve, info, bench)

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
STDOUT = 1  # the file descriptor


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
        if isinstance(error, OutputError) and args.command is embed.run and args.output is None:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="unpadded", description="Text to embeddings, without padding.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_command(commands)
    return parser
