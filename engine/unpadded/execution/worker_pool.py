"""One model on several devices: a process for each (`worker`), and one that stands in for their runners.

Batches go to the process with the fewest tokens under way. A process that dies is reported, started again, and its
batches run on whichever is free, each alone, so that one which kills is known by the second time it does.
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

Make: TypeAlias = Callable[[torch.device], Runner]  # pickled: runs in each process
Loaded: TypeAlias = tuple[int, dict[str, str], int | None]  # dimensions, description, fitting tokens of a runner

AHEAD = 2  # batches with one process: one runs, the next lies there already
DEATHS_OF_A_BATCH = 2
DEATHS_OF_A_WORKER = 3  # in a row, without a batch between
SECONDS_TO_END = 10


class WorkerPool:
    """What a `Runner` offers, on several devices at once. Any thread may call it."""

    def __init__(self, make: Make, devices: Sequence[torch.device]) -> None:
        """Start them all and wait until each has loaded; what one of them raises is raised here, with its type."""
        crew = _Crew(make, devices)
        self._crew = crew
        self._finalizer = weakref.finalize(self, crew.close)  # runs once: by close, when collected, or at exit
        self.parallelism = len(devices)
        self.depth = AHEAD * len(devices)
        loaded = crew.start()
        self.dimensions, self._described, _ = loaded[0]
        self._fitting = [tokens for _, _, tokens in loaded if tokens is not None]

    def close(self) -> None:
        """Stop the processes; pending batches raise WorkerError."""
        self._finalizer()

    @property
    def ready_devices(self) -> int:
        return sum(worker.ready for worker in self._crew.workers)

    def describe(self) -> dict[str, str]:
        """Where and how it runs, in plain values; devices as `load` takes them."""
        return self._described | {"device": ",".join(str(worker.device) for worker in self._crew.workers)}

    def max_batch_tokens(self) -> int | None:
        """As `Runner.max_batch_tokens`, on each device; processes on the CPU share its memory."""
        sharing = self.parallelism if self._crew.workers[0].device.type == "cpu" else 1
        return max(1, min(self._fitting) // sharing) if self._fitting else None

    def launch(self, sequences: Sequence[np.ndarray], options: VectorOptions) -> PendingVectors:
        return PendingVectors(self._crew.submit("launch", sequences, {"options": options}).result)

    def hidden_states(self, sequences: Sequence[np.ndarray], *, adapter: str | None = None) -> list[np.ndarray]:
        rows: list[np.ndarray] = self._crew.submit("hidden_states", sequences, {"adapter": adapter}).result()
        return rows


@dataclass(eq=False)
class _Batch:
    job: Job
    future: Future[Any] = field(default_factory=Future)
    deaths: list[str] = field(default_factory=list)  # of the processes that had it

    @property
    def tokens(self) -> int:
        return len(self.job[1])

    def __str__(self) -> str:
        return f"a batch of {len(self.job[2])} texts and {self.tokens} tokens"


@dataclass(eq=False)
class _Worker:
    device: torch.device
    process: subprocess.Popen[bytes] | None = None  # set by each start
    ready: bool = False  # it has loaded and lives
    lost: bool = False  # it is not started again
    deaths: int = 0  # since its last batch
    batches: deque[_Batch] = field(default_factory=deque)  # under way, in the order of their answers
    loaded: Future[Loaded] = field(default_factory=Future)  # set by the first start

    def takes(self, batch: _Batch) -> bool:
        """A batch that was with a process that died runs alone."""
        if batch.deaths:
            return self.ready and not self.batches
        return self.ready and len(self.batches) < AHEAD and not any(other.deaths for other in self.batches)

    def send(self, message: Any) -> None:
        """What a process that ended does not take is dealt with by the thread that reads it."""
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # a broken pipe; a closed file
            pickle.dump(message, self.process.stdin, protocol=5)
            self.process.stdin.flush()


class _Crew:
    """The processes, the batches that wait for one, and for each process a thread that reads what it says."""

    def __init__(self, make: Make, devices: Sequence[torch.device]) -> None:
        self.workers = [_Worker(device) for device in devices]
        self._make = make
        self._folder = os.getcwd()  # a checkpoint's paths may be relative, and a process is started at any time
        on_cpu = sum(device.type == "cpu" for device in devices)
        self._threads = max(1, torch.get_num_threads() // on_cpu) if on_cpu else None  # they share the cores
        self._lock = threading.RLock()  # garbage collection may close the crew in a thread that holds it
        self._waiting: deque[_Batch] = deque()
        self._closed = False

    def start(self) -> list[Loaded]:
        """What each says of its runner, once all are ready."""
        for index, worker in enumerate(self.workers):
            threading.Thread(target=self._keep, args=(worker,), name=f"unpadded-worker-{index}", daemon=True).start()
        try:
            return [worker.loaded.result() for worker in self.workers]
        except BaseException:
            self.close()
            raise

    def submit(self, method: str, sequences: Sequence[np.ndarray], options: dict[str, Any]) -> Future[Any]:
        """Queue a batch; its future gives what the runner's method gives."""
        batch = _Batch((method, np.concatenate(sequences), [len(ids) for ids in sequences], options))
        with self._lock:
            if self._closed:
                raise WorkerError(f"the engine is closed: {batch} came after close(); load the model again")
            self._waiting.append(batch)
            self._hand_out()
        return batch.future

    def close(self) -> None:
        """End every process; whoever waits for a batch gets a WorkerError."""
        with self._lock:
            self._closed = True
            dropped = [*self._waiting, *(batch for worker in self.workers for batch in worker.batches)]
            self._waiting.clear()
            for worker in self.workers:
                worker.ready = False
                worker.batches.clear()
        processes = [worker.process for worker in self.workers if worker.process is not None]
        for process in processes:
            _close(process.stdin)  # it ends with it
        for process in processes:
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
        for batch in dropped:
            batch.future.set_exception(WorkerError(f"the engine was closed: {batch} was dropped; load the model again"))

    def _hand_out(self) -> None:
        """Under the lock."""
        if all(worker.lost for worker in self.workers):
            devices = ", ".join(str(worker.device) for worker in self.workers)
            for batch in self._waiting:
                error = f"no worker is left for {batch}: {devices} died {DEATHS_OF_A_WORKER} times in a row"
                batch.future.set_exception(WorkerError(f"{error}; free memory, and load the model again"))
            self._waiting.clear()
        while self._waiting:
            free = [worker for worker in self.workers if worker.takes(self._waiting[0])]
            if not free:
                return
            worker = min(free, key=lambda worker: sum(batch.tokens for batch in worker.batches))
            worker.batches.append(self._waiting.popleft())
            worker.send(worker.batches[-1].job)

    def _keep(self, worker: _Worker) -> None:
        """Start a process and listen to it until it ends, again and again."""
        while not worker.lost:
            with self._lock:
                if self._closed:
                    return
                command, pipe = [sys.executable, "-c", BOOTSTRAP], subprocess.PIPE
                try:
                    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=self._folder)
                except OSError as error:
                    self._bury(worker, f"{worker.device} (not started: {error})")
                    continue
                worker.process = process
            worker.send(sys.path)
            worker.send((self._make, worker.device, self._threads))
            self._listen(worker, process)
            code = process.wait()
            with self._lock:
                _close(process.stdin)
                _close(process.stdout)
                if not self._closed:
                    self._bury(worker, f"{worker.device} (process {process.pid}, exit code {code})")

    def _listen(self, worker: _Worker, process: subprocess.Popen[bytes]) -> None:
        """Take what a process says until it has ended."""
        assert process.stdout is not None
        while True:
            try:
                kind, value = pickle.load(process.stdout)
            except Exception:  # unpickling may raise anything; the EOFError of a process that ended is the usual
                process.kill()
                return
            if kind == "log":
                logger.log(*value)
            elif kind == "ready":
                with self._lock:
                    worker.ready = not self._closed
                    self._hand_out()
                if not worker.loaded.done():
                    worker.loaded.set_result(value)
            elif kind != "not loaded":
                self._answer(worker, kind, value)
            elif not worker.loaded.done():
                worker.loaded.set_exception(value)
            else:
                logger.warning("the model could not be loaded again on %s: %s", worker.device, value)

    def _answer(self, worker: _Worker, kind: str, value: Any) -> None:
        with self._lock:
            if self._closed:
                return
            batch = worker.batches.popleft()
            worker.deaths = 0
            self._hand_out()
        if kind == "done":
            batch.future.set_result(value)
        else:
            batch.future.set_exception(value)

    def _bury(self, worker: _Worker, death: str) -> None:
        """Under the lock. Report a process that ended, and queue again those of its batches that ended no other."""
        if not worker.loaded.done():
            error = f"a worker ended as it loaded the model: {death}; its output on stderr may say why"
            worker.loaded.set_exception(WorkerError(error))
        if worker.loaded.exception() is not None:  # `start` raises it
            worker.lost = True
            return
        worker.ready = False
        worker.deaths += 1
        worker.lost = worker.deaths == DEATHS_OF_A_WORKER
        logger.warning(
            "a worker died: %s; %d of its batches run on another, and it is %sstarted again",
            death,
            len(worker.batches),
            "not " if worker.lost else "",
        )
        batches = list(worker.batches)
        worker.batches.clear()
        for batch in batches:
            batch.deaths.append(death)
            if len(batch.deaths) == DEATHS_OF_A_BATCH:
                error = f"{batch} ended {DEATHS_OF_A_BATCH} workers in a row: {', '.join(batch.deaths)}"
                batch.future.set_exception(WorkerError(f"{error}; lower token_budget, or leave out its texts"))
        self._waiting.extendleft(batch for batch in reversed(batches) if len(batch.deaths) < DEATHS_OF_A_BATCH)
        self._hand_out()


def _close(pipe: IO[bytes] | None) -> None:
    with contextlib.suppress(OSError):  # what a process that ended did not take
        assert pipe is not None
        pipe.close()
