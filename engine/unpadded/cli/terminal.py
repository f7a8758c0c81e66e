"""Messages on stderr, and the signals that stop a command."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn, TextIO

logger = logging.getLogger("unpadded")

WAIT_SECONDS = 5.0
STOP_SIGNALS = ("SIGTERM", "SIGHUP")  # SIGHUP: the terminal was closed; it does not exist on Windows


class Stopped(BaseException):
    """A signal asked the process to exit. Raised so that what is not finished is cleaned up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name, self.exit_status = signal.Signals(number).name, 128 + number


def count(number: int, noun: str) -> str:
    """Return "1 text" or "2 texts"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def print_error(message: str) -> None:
    """Print a message to stderr. A terminal that is closed or a log on a full disk does not stop the command."""
    with contextlib.suppress(OSError):
        print(f"unpadded: {message}", file=sys.stderr, flush=True)


def say(message: str) -> None:
    """Print a message that --quiet suppresses, with escapes for bytes of file names that are not UTF-8."""
    logger.info("%s", message.encode(errors="backslashreplace").decode())


class _StderrHandler(logging.Handler):
    """Prints messages to the stderr of the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print_error(record.getMessage())


@contextlib.contextmanager
def log_messages(level: int) -> Iterator[None]:
    """Print the messages of unpadded from this level on, and the warnings of other packages, to stderr."""
    handler, root, previous = _StderrHandler(), logging.getLogger(), logger.level
    root.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        root.removeHandler(handler)
        logger.setLevel(previous)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is awaited if the block takes long."""
    timer = threading.Timer(WAIT_SECONDS, say, [what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Raise Stopped for the signals that stop a process, except for those that it ignores, as under nohup."""
    previous = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        for number in (getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)):
            if signal.getsignal(number) is signal.SIG_DFL:
                previous[number] = signal.signal(number, _raise_stopped)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _raise_stopped(number: int, frame: Any) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
    raise Stopped(number)


def discard_unwritten_output(stream: TextIO) -> None:
    """Discard what a stream cannot write; otherwise the interpreter writes it at exit, and its status becomes 120."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), stream.fileno())
