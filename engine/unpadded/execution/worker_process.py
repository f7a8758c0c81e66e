"""One device's process: reads batches from stdin and writes vectors to stdout, as pickled messages.

`worker_pool` starts it. It exits when its stdin is closed, and so whenever the parent exits; it ignores the signals
that stop the parent.
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

# A runner's method ("launch" or "hidden_states"), concatenated ids [total_tokens] int32, lengths, keyword arguments.
Job: TypeAlias = tuple[str, np.ndarray, list[int], dict[str, Any]]
Outcome: TypeAlias = tuple[str, Any]  # "done" and a result, or "failed" and an exception
Send: TypeAlias = Callable[[str, Any], None]

# For `python -c`. Ignores signals first: Ctrl-C reaches every process of a terminal.
BOOTSTRAP = """
import pickle, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.path[:] = pickle.load(sys.stdin.buffer)
from unpadded.execution.worker_process import main
main()
"""


def main() -> None:
    """Make the runner that the first message describes, send "ready", then answer every job in order."""
    results = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # so that a library's prints do not corrupt the messages
    writing = threading.Lock()

    def send(kind: str, value: Any) -> None:
        with writing:
            pickle.dump((kind, value), results, protocol=5)
            results.flush()

    logging.getLogger("unpadded").addHandler(_Forward(send))
    logging.getLogger("unpadded").propagate = False
    make, device, threads = pickle.load(sys.stdin.buffer)
    jobs: SimpleQueue[Job] = SimpleQueue()
    threading.Thread(target=_read_jobs, args=(jobs,), daemon=True).start()
    if threads is not None:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    kind, runner = _attempt(partial(make, device), device)
    if kind == "failed":
        send("not loaded", runner)
        os._exit(1)
    send("ready", (runner.dimensions, runner.describe(), runner.max_batch_tokens()))
    _run_jobs(runner, device, jobs, send)


def _read_jobs(jobs: SimpleQueue[Job]) -> None:
    """Queue jobs from stdin; exit when it is closed. Runs in a thread, so that the parent never waits to send a job."""
    while True:
        try:
            jobs.put(pickle.load(sys.stdin.buffer))
        except (EOFError, pickle.UnpicklingError):
            os._exit(0)


def _run_jobs(runner: Runner, device: torch.device, jobs: SimpleQueue[Job], send: Send) -> None:
    """Run jobs in order; if the device works asynchronously, launch a batch before waiting for the previous one."""
    previous: Outcome | None = None
    while True:
        launched = None
        if previous is None or (runner.depth > 1 and not jobs.empty()):
            method, ids, lengths, options = jobs.get()
            sequences = np.split(ids, np.cumsum(lengths)[:-1])
            launched = _attempt(partial(getattr(runner, method), sequences, **options), device)
        if previous is not None:
            pending = previous[1]
            send(*(_attempt(pending.wait, device) if isinstance(pending, PendingVectors) else previous))
        previous = launched


def _attempt(run: Callable[[], Any], device: torch.device) -> Outcome:
    try:
        return "done", run()
    except Exception as error:  # any error is raised in the caller's thread
        error.add_note(f"in the worker on {device}:\n{traceback.format_exc()}")
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # pickling an exception may raise anything
            return "failed", RuntimeError(f"{error!r}\n{error.__notes__[-1]}")
        return "failed", error


class _Forward(logging.Handler):
    """Sends log messages to the parent."""

    def __init__(self, send: Send) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send("log", (record.levelno, record.getMessage()))
