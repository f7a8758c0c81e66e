"""One device's process: reads texts or batches from stdin and writes vectors to stdout, as pickled messages.

It exits when it receives None and when its parent exits, and ignores the signals that stop the parent.
"""

import contextlib
import logging
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeAlias

import torch

from unpadded.errors import UnpaddedError
from unpadded.model.batch import Ids
from unpadded.tokenization.windows import TextGroup

# The pipeline's `embed_group` with texts, or the runner's `launch` with sequences; keyword arguments.
Call: TypeAlias = tuple[TextGroup | list[Ids], dict[str, Any]]
Job: TypeAlias = tuple[int, Call]  # with its id
Send: TypeAlias = Callable[[str, Any], None]

# For `python -c`. Ignores signals first: Ctrl-C reaches every process of a terminal.
BOOTSTRAP = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.path[:] = sys.argv[1:]
from unpadded.execution.worker_process import main
main()
"""


def main() -> None:
    """Make the pipeline that the first message describes, send "ready", then answer every job, in any order."""
    results = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # so that a library's prints do not corrupt the messages
    writing = threading.Lock()

    def send(kind: str, value: Any) -> None:
        with writing:
            pickle.dump((kind, value), results, protocol=5)
            results.flush()

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            send("log", (record.levelno, record.msg, record.getMessage()))

    logging.getLogger("unpadded").addHandler(Forward())
    logging.getLogger("unpadded").propagate = False
    threading.Thread(target=_send_alive, args=(send, os.getppid()), daemon=True).start()
    make, device, threads = pickle.load(sys.stdin.buffer)
    jobs: SimpleQueue[Job] = SimpleQueue()
    threading.Thread(target=_read_jobs, args=(jobs,), daemon=True).start()
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    kind, pipeline = _attempt(partial(make, device), device)
    if kind == "failed":
        send("not loaded", pipeline)
        os._exit(1)
    runner = pipeline.backend
    send("ready", (runner.dimensions, runner.depth, runner.describe(), runner.max_batch_tokens()))
    _run_jobs(pipeline, device, jobs, send)


def _send_alive(send: Send, parent: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        while os.getppid() == parent:  # a fork of the parent may keep stdin open
            send("alive", None)
            time.sleep(1)
    os._exit(0)


def _read_jobs(jobs: SimpleQueue[Job]) -> None:
    """Queue jobs from stdin; exit when it is closed. Runs in a thread, so that the parent never waits to send a job."""
    with contextlib.suppress(EOFError, pickle.UnpicklingError):
        while (job := pickle.load(sys.stdin.buffer)) is not None:
            jobs.put(job)
    os._exit(0)


def _run_jobs(pipeline: Any, device: torch.device, jobs: SimpleQueue[Job], send: Send) -> None:
    """Start jobs in order and wait for them in threads: texts are tokenized while the device computes others."""

    def answer(number: int, start: Callable[[], Any]) -> None:
        kind, value = _attempt(start, device)
        if callable(value):
            threads.submit(answer, number, value)
        else:
            send(kind, (number, value))

    threads = ThreadPoolExecutor(pipeline.backend.depth)
    while True:
        number, (inputs, options) = jobs.get()
        run = pipeline.embed_group if isinstance(inputs, TextGroup) else pipeline.backend.launch
        answer(number, partial(run, inputs, **options))


def _attempt(run: Callable[[], Any], device: torch.device) -> tuple[str, Any]:
    """Return "done" and a result, or "failed" and an exception."""
    try:
        return "done", run()
    except Exception as error:  # any error is raised in the caller's thread
        if device.type == "cuda":
            try:
                # Raises an error again that has broken the CUDA context; a capture forbids to synchronize.
                torch.cuda.current_stream(device).query()
            except RuntimeError:  # every later batch would fail; the parent starts another process
                logging.getLogger("unpadded").error("%s cannot be used any longer by this process: %s", device, error)
                os._exit(1)
        note = f"in the worker on {device}:\n{traceback.format_exc()}"
        if not isinstance(error, UnpaddedError):
            error.add_note(note)
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # pickling an exception may raise anything
            return "failed", RuntimeError(f"{error!r}\n{note}")
        return "failed", error
