"""One model on several devices: one process per device (`worker_process`), used like a single `Runner`.

A batch goes to the process with the fewest pending tokens. If a process crashes, it is restarted, and its batches are
run again one at a time, so that a batch that crashes two workers is identified.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import IO, Any, TypeAlias

import numpy as np
import torch

from unpadded.errors import WorkerError
from unpadded.execution.backend import PendingVectors
from unpadded.execution.runner import Runner
from unpadded.execution.worker_process import BOOTSTRAP, Job
from unpadded.options import VectorOptions

logger = logging.getLogger("unpadded")

MakeRunner: TypeAlias = Callable[[torch.device], Runner]  # pickled and called in each process
Loaded: TypeAlias = tuple[int, dict[str, str], int | None]  # a runner's dimensions, description and max_batch_tokens

QUEUED_BATCHES = 2  # per process: one runs while the next is already there
MAX_CRASHES_PER_BATCH = 2
MAX_CRASHES_PER_WORKER = 3  # in a row, without a finished batch in between
EXIT_SECONDS = 10


class WorkerPool:
    """A `Backend` of several devices. Any thread may call it."""

    def __init__(self, make_runner: MakeRunner, devices: Sequence[torch.device]) -> None:
        """Start all processes and wait until each has loaded the model; raise what one of them raises."""
        self._pool = pool = _Pool(make_runner, devices)
        self._finalizer = weakref.finalize(self, pool.close)  # runs once: by close, when collected, or at exit
        self.parallelism = len(devices)
        self.depth = QUEUED_BATCHES * len(devices)
        loaded = pool.start()
        self.dimensions, self._description, _ = loaded[0]
        self._max_batch_tokens = [tokens for _, _, tokens in loaded if tokens is not None]

    def close(self) -> None:
        """Stop the processes; pending batches raise WorkerError."""
        self._finalizer()

    @property
    def ready_devices(self) -> int:
        return sum(worker.ready for worker in self._pool.workers)

    @property
    def process_ids(self) -> list[int]:
        return [worker.process.pid for worker in self._pool.workers if worker.process is not None]

    def describe(self) -> dict[str, str]:
        return self._description | {"device": ",".join(str(worker.device) for worker in self._pool.workers)}

    def max_batch_tokens(self) -> int | None:
        sharing = self.parallelism if self._pool.workers[0].device.type == "cpu" else 1  # one memory for all
        return max(1, min(self._max_batch_tokens) // sharing) if self._max_batch_tokens else None

    def launch(self, sequences: Sequence[np.ndarray], options: VectorOptions) -> PendingVectors:
        return PendingVectors(self._pool.submit("launch", sequences, {"options": options}).result)

    def hidden_states(self, sequences: Sequence[np.ndarray], *, adapter: str | None = None) -> list[np.ndarray]:
        rows: list[np.ndarray] = self._pool.submit("hidden_states", sequences, {"adapter": adapter}).result()
        return rows


@dataclass(eq=False)
class _Batch:
    job: Job
    future: Future[Any] = field(default_factory=Future)
    crashes: list[str] = field(default_factory=list)  # descriptions of the processes that crashed with it

    @property
    def tokens(self) -> int:
        return len(self.job[1])

    def __str__(self) -> str:
        return f"a batch of {len(self.job[2])} texts and {self.tokens} tokens"


@dataclass(eq=False)
class _Worker:
    device: torch.device
    process: subprocess.Popen[bytes] | None = None  # set by each start
    ready: bool = False  # the process has loaded the model and runs
    given_up: bool = False  # the process is not restarted
    crashes: int = 0  # since the last finished batch
    batches: deque[_Batch] = field(default_factory=deque)  # sent to the process, which answers in this order
    loaded: Future[Loaded] = field(default_factory=Future)  # set by the first start

    def accepts(self, batch: _Batch) -> bool:
        """Whether the batch can be sent now; a batch that was with a crashed process runs alone."""
        if batch.crashes:
            return self.ready and not self.batches
        return self.ready and len(self.batches) < QUEUED_BATCHES and not any(other.crashes for other in self.batches)

    def send(self, message: Any) -> None:
        """Write a message. Ignores broken pipes: the thread that reads from the process handles its exit."""
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # a broken pipe; a closed file
            pickle.dump(message, self.process.stdin, protocol=5)
            self.process.stdin.flush()


class _Pool:
    """The processes, the batches that wait for one, and one thread per process that starts it and reads its answers.

    Separate from `WorkerPool` so that these threads do not keep that from being garbage-collected.
    """

    def __init__(self, make_runner: MakeRunner, devices: Sequence[torch.device]) -> None:
        self.workers = [_Worker(device) for device in devices]
        self._make_runner = make_runner
        self._folder = os.getcwd()  # for the checkpoint's relative paths, because a process can start at any time
        on_cpu = sum(device.type == "cpu" for device in devices)
        self._threads = max(1, torch.get_num_threads() // on_cpu) if on_cpu else None  # the processes share the cores
        self._lock = threading.RLock()  # garbage collection may call close in a thread that holds it
        self._waiting: deque[_Batch] = deque()
        self._closed = False

    def start(self) -> list[Loaded]:
        """Start the processes and wait until all have loaded the model."""
        for index, worker in enumerate(self.workers):
            name = f"unpadded-worker-{index}"
            threading.Thread(target=self._supervise, args=(worker,), name=name, daemon=True).start()
        try:
            return [worker.loaded.result() for worker in self.workers]
        except BaseException:
            self.close()
            raise

    def submit(self, method: str, sequences: Sequence[np.ndarray], options: dict[str, Any]) -> Future[Any]:
        """Queue a batch; the future returns what the runner's method returns."""
        batch = _Batch((method, np.concatenate(sequences), [len(ids) for ids in sequences], options))
        with self._lock:
            if self._closed:
                raise WorkerError(f"the engine is closed: {batch} was submitted after close(); load the model again")
            self._waiting.append(batch)
            self._distribute()
        return batch.future

    def close(self) -> None:
        """Stop every process; pending batches raise WorkerError."""
        with self._lock:
            self._closed = True
            dropped = [*self._waiting, *(batch for worker in self.workers for batch in worker.batches)]
            self._waiting.clear()
            for worker in self.workers:
                worker.ready = False
                worker.batches.clear()
        processes = [worker.process for worker in self.workers if worker.process is not None]
        for process in processes:
            _close(process.stdin)  # makes the process exit
        for process in processes:
            try:
                process.wait(EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        for batch in dropped:
            batch.future.set_exception(WorkerError(f"the engine was closed: {batch} was dropped; load the model again"))

    def _distribute(self) -> None:
        """Send waiting batches to workers. The caller holds the lock."""
        if all(worker.given_up for worker in self.workers):
            devices = ", ".join(str(worker.device) for worker in self.workers)
            for batch in self._waiting:
                error = f"no worker is left for {batch}: {devices} crashed {MAX_CRASHES_PER_WORKER} times in a row"
                batch.future.set_exception(WorkerError(f"{error}; free memory and load the model again"))
            self._waiting.clear()
        while self._waiting:
            accepting = [worker for worker in self.workers if worker.accepts(self._waiting[0])]
            if not accepting:
                return
            worker = min(accepting, key=lambda worker: sum(batch.tokens for batch in worker.batches))
            worker.batches.append(self._waiting.popleft())
            worker.send(worker.batches[-1].job)

    def _supervise(self, worker: _Worker) -> None:
        """Start a process, read its answers until it exits, and repeat."""
        while not worker.given_up:
            with self._lock:
                if self._closed:
                    return
                command, pipe = [sys.executable, "-c", BOOTSTRAP], subprocess.PIPE
                try:
                    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=self._folder)
                except OSError as error:
                    self._handle_exit(worker, f"{worker.device} (not started: {error})")
                    continue
                worker.process = process
            worker.send(sys.path)
            worker.send((self._make_runner, worker.device, self._threads))
            self._read(worker, process)
            code = process.wait()
            with self._lock:
                _close(process.stdin)
                _close(process.stdout)
                if not self._closed:
                    self._handle_exit(worker, f"{worker.device} (process {process.pid}, exit code {code})")

    def _read(self, worker: _Worker, process: subprocess.Popen[bytes]) -> None:
        """Handle the messages of a process until it exits."""
        assert process.stdout is not None
        while True:
            try:
                kind, value = pickle.load(process.stdout)
            except Exception:  # unpickling may raise anything; usually it is the EOFError of a process that exited
                process.kill()
                return
            if kind == "log":
                logger.log(*value)
            elif kind == "ready":
                with self._lock:
                    worker.ready = not self._closed
                    self._distribute()
                if not worker.loaded.done():
                    worker.loaded.set_result(value)
            elif kind != "not loaded":
                self._finish_batch(worker, kind, value)
            elif not worker.loaded.done():
                worker.loaded.set_exception(value)
            else:
                logger.warning("the model could not be loaded again on %s: %s", worker.device, value)

    def _finish_batch(self, worker: _Worker, kind: str, value: Any) -> None:
        with self._lock:
            if self._closed:
                return
            batch = worker.batches.popleft()
            worker.crashes = 0
            self._distribute()
        if kind == "done":
            batch.future.set_result(value)
        else:
            batch.future.set_exception(value)

    def _handle_exit(self, worker: _Worker, crash: str) -> None:
        """Log a crash; queue the worker's batches again, except those that crashed another. The caller holds the lock.

        crash: the device, the process and its exit code.
        """
        if not worker.loaded.done():
            error = f"a worker exited while it loaded the model: {crash}; see its output on stderr"
            worker.loaded.set_exception(WorkerError(error))
        if worker.loaded.exception() is not None:  # `start` raises it
            worker.given_up = True
            return
        worker.ready = False
        worker.crashes += 1
        worker.given_up = worker.crashes == MAX_CRASHES_PER_WORKER
        logger.warning(
            "a worker crashed: %s; %d of its batches run again, and it is %srestarted",
            crash,
            len(worker.batches),
            "not " if worker.given_up else "",
        )
        batches = list(worker.batches)
        worker.batches.clear()
        for batch in batches:
            batch.crashes.append(crash)
            if len(batch.crashes) == MAX_CRASHES_PER_BATCH:
                error = f"{batch} crashed {MAX_CRASHES_PER_BATCH} workers in a row: {', '.join(batch.crashes)}"
                batch.future.set_exception(WorkerError(f"{error}; lower token_budget or omit its texts"))
        self._waiting.extendleft(batch for batch in reversed(batches) if len(batch.crashes) < MAX_CRASHES_PER_BATCH)
        self._distribute()


def _close(pipe: IO[bytes] | None) -> None:
    with contextlib.suppress(OSError):  # unsent data for a process that exited
        assert pipe is not None
        pipe.close()
