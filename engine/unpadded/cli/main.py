"""The command `unpadded COMMAND`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import sys
from collections.abc import Callable, Sequence

import unpadded
from unpadded.cli import bench, embed, info, rerank, search, serve
from unpadded.cli import map as map_command
from unpadded.cli.flags import CommandParser
from unpadded.cli.terminal import Stopped, discard_unwritten_output, log_messages, print_error, stop_signals
from unpadded.errors import UnpaddedError

COMMANDS = (embed, search, rerank, map_command, serve, info, bench)

EPILOG = 'For completion in a shell: pip install argcomplete, then eval "$(register-python-argcomplete unpadded)"'
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                with contextlib.suppress(OSError):  # a pipe that replaced a file cannot be reconfigured
                    stream.reconfigure(errors="backslashreplace")  # file names need not be valid Unicode
        parser = _parser()
        with contextlib.suppress(ImportError):  # completion by a shell; returns at once unless a shell asks
            importlib.import_module("argcomplete").autocomplete(parser)
        return _run(parser.parse_args(argv))
    finally:
        discard_unwritten_output(sys.stdout)
        discard_unwritten_output(sys.stderr)


def _run(args: argparse.Namespace) -> int:
    command: Callable[[argparse.Namespace], None] = args.command
    try:
        with log_messages(logging.WARNING if args.quiet else logging.INFO), stop_signals():
            command(args)
            sys.stdout.flush()
    except UnpaddedError as error:
        print_error(f"error: {error}")
        return EXIT_ERROR
    except KeyboardInterrupt as error:
        print_error("; ".join(["interrupted", *getattr(error, "__notes__", [])]))
        return EXIT_INTERRUPTED
    except Stopped as error:
        print_error("; ".join([f"stopped by {error.name}", *getattr(error, "__notes__", [])]))
        return error.exit_status
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except OSError as error:  # of files that only a command's own code opens
        name = "a file" if error.filename is None else repr(error.filename)
        print_error(f"error: {name} cannot be used: {error.strerror or error}; check it and the free disk space")
        return EXIT_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="unpadded", description="Turn text into embeddings, without padding.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"unpadded {unpadded.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_command(commands)
    for subparser in commands.choices.values():
        subparser.add_argument("--quiet", action="store_true", help="print only warnings, errors and results")
    return parser
