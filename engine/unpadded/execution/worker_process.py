"""One device's process: batches come in on stdin, vectors go out on stdout, pickled, one message after another.

`workers` starts it. It ends with its stdin, so whenever the parent does, and leaves signals to the parent.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeAlias

import numpy as np
import torch

from unpadded.execution.backend import PendingVectors
from unpadded.execution.runner import Runner

# A runner's method ("launch", "hidden_states"), ids end to end [total_tokens] int32, the length of each text, keywords.
Job: TypeAlias = tuple[str, np.ndarray, list[int], dict[str, Any]]
Outcome: TypeAlias = tuple[str, Any]  # "done" and a result, or "failed" and an exception
Send: TypeAlias = Callable[[str, Any], None]

# For `python -c`. Signals are ignored first: Ctrl-C reaches every process of a terminal.
BOOTSTRAP = """
import pickle, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.path[:] = pickle.load(sys.stdin.buffer)
from unpadded.execution.worker_process import main
main()
"""


def main() -> None:
    """Make the runner that the first message describes, say "ready", then answer every job in order."""
    results = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not stand between messages
    writing = threading.Lock()

    def send(kind: str, value: Any) -> None:
        with writing:
            pickle.dump((kind, value), results, protocol=5)
            results.flush()

    logging.getLogger("unpadded").addHandler(_Forward(send))
    logging.getLogger("unpadded").propagate = False
    make, device, threads = pickle.load(sys.stdin.buffer)
    jobs: SimpleQueue[Job] = SimpleQueue()
    threading.Thread(target=_read, args=(jobs,), daemon=True).start()
    if threads is not None:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    kind, runner = _attempt(partial(make, device), device)
    if kind == "failed":
        send("not loaded", runner)
        os._exit(1)
    send("ready", (runner.dimensions, runner.describe(), runner.max_batch_tokens()))
    _work(runner, device, jobs, send)


def _read(jobs: SimpleQueue[Job]) -> None:
    """In a thread of its own: the parent never waits to hand out a batch, and its end is seen at once."""
    while True:
        try:
            jobs.put(pickle.load(sys.stdin.buffer))
        except (EOFError, pickle.UnpicklingError):
            os._exit(0)


def _work(runner: Runner, device: torch.device, jobs: SimpleQueue[Job], send: Send) -> None:
    """Launch a batch before the one behind it is waited for, where the device lets the host go on meanwhile."""
    behind: Outcome | None = None
    while True:
        ahead = None
        if behind is None or (runner.depth > 1 and not jobs.empty()):
            method, ids, lengths, options = jobs.get()
            sequences = np.split(ids, np.cumsum(lengths)[:-1])
            ahead = _attempt(partial(getattr(runner, method), sequences, **options), device)
        if behind is not None:
            launched = behind[1]
            send(*(_attempt(launched.wait, device) if isinstance(launched, PendingVectors) else behind))
        behind = ahead


def _attempt(run: Callable[[], Any], device: torch.device) -> Outcome:
    try:
        return "done", run()
    except Exception as error:  # whatever it is, it is raised in the caller's thread
        error.add_note(f"in the worker on {device}:\n{traceback.format_exc()}")
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # neither is it ours to say what an exception's pickling may raise
            return "failed", RuntimeError(f"{error!r}\n{error.__notes__[-1]}")
        return "failed", error


class _Forward(logging.Handler):
    """Log lines are the parent's to write."""

    def __init__(self, send: Send) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send("log", (record.levelno, record.getMessage()))
