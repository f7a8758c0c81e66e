"""One model on several devices: one process per device (`worker_process`), used like a single `Runner`.

A job, which is a batch or texts to tokenize and embed, goes to the process with the fewest pending tokens. If a process
crashes, it is restarted, and its jobs are run again one at a time, so that one that crashes two workers is identified.
A process that hangs is killed.
"""

import contextlib
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import IO, Any, TypeAlias

import torch

from unpadded.errors import WorkerError, forked_error
from unpadded.execution.transfer import Wait
from unpadded.execution.worker_process import BOOTSTRAP, Call
from unpadded.model.batch import Ids
from unpadded.options import Plan, VectorOptions
from unpadded.tokenization.windows import TextGroup

logger = logging.getLogger("unpadded")

MakePipeline: TypeAlias = Callable[[torch.device], Any]  # returns an EmbeddingPipeline, pickled, called in each process
# A runner's dimensions, depth, description and max_batch_tokens.
Loaded: TypeAlias = tuple[int, int, dict[str, str], int | None]

MAX_CRASHES_PER_JOB = 2
MAX_CRASHES_PER_WORKER = 3  # in a row, without a finished job in between
EXIT_SECONDS = 10
SILENT_SECONDS = 10  # without a message; a process sends one per second, also while it runs a job
START_SECONDS = 600  # without a message until the model is loaded
JOB_SECONDS = {"cpu": 4 * 3600, "cuda": 300}  # for one job, which may compile kernels


class WorkerPool:
    """Runs batches on several devices, with the methods of `Runner`. Any thread may call it."""

    def __init__(self, make_pipeline: MakePipeline, devices: Sequence[torch.device]) -> None:
        """Start all processes and wait until each has loaded the model; raise what one of them raises."""
        self._pool = pool = _Pool(make_pipeline, devices)
        # Stops the processes; pending jobs raise WorkerError. Runs once: if called, when collected, or at exit.
        self.close = weakref.finalize(self, pool.close)
        self.devices = len(devices)
        loaded = pool.start()
        self.dimensions, self.depth, self._description, _ = loaded[0]
        self._max_batch_tokens = [tokens for *_, tokens in loaded if tokens is not None]

    @property
    def ready_devices(self) -> int:
        """Devices that accept batches; less than `devices` while a crashed process restarts."""
        return sum(worker.ready for worker in self._pool.workers)

    def describe(self) -> dict[str, str]:
        return self._description | {"device": ",".join(str(worker.device) for worker in self._pool.workers)}

    def max_batch_tokens(self) -> int | None:
        sharing = self.devices if self._pool.workers[0].device.type == "cpu" else 1  # one memory for all
        return max(1, min(self._max_batch_tokens) // sharing) if self._max_batch_tokens else None

    def embed(self, group: TextGroup, plan: Plan, token_budget: int) -> Callable[[], Any]:
        """Start computing the `Embeddings` of texts, in fp32."""
        texts = len(group.texts)
        name = f"a batch of {texts} texts ({group.first_index} to {group.first_index + texts - 1})"
        return self._pool.submit(name, group.tokens, (group, {"plan": plan, "token_budget": token_budget})).result

    def launch(self, sequences: Sequence[Ids], options: VectorOptions) -> Wait:
        tokens = sum(map(len, sequences))
        name = f"a batch of {len(sequences)} texts and {tokens} tokens"
        return self._pool.submit(name, tokens, (list(sequences), {"options": options})).result


@dataclass(eq=False)
class _Job:
    name: str  # in errors
    tokens: int  # of texts, an estimate
    call: Call
    future: Future[Any] = field(default_factory=Future)
    crashes: list[str] = field(default_factory=list)  # descriptions of the processes that crashed with it


@dataclass(eq=False)
class _Worker:
    device: torch.device
    process: subprocess.Popen[bytes] | None = None  # set by each start
    ready: bool = False  # the process has loaded the model and runs
    given_up: bool = False  # the process is not restarted
    crashes: int = 0  # since the last finished job
    depth: int = 1  # set when the process is ready
    jobs: dict[int, _Job] = field(default_factory=dict)  # sent to the process, by id, in this order
    loaded: Future[Loaded] = field(default_factory=Future)  # set by the first start
    outbox: SimpleQueue[Any] = field(default_factory=SimpleQueue)  # messages to the process; None ends them
    silent: int = 0  # seconds since the last message from the process
    running: int = 0  # seconds for which the first of `jobs` runs
    hang: str = ""  # why the process was killed

    def accepts(self, job: _Job) -> bool:
        """Whether the job can be sent now; one that was with a crashed process runs alone."""
        if job.crashes:
            return self.ready and not self.jobs
        # One more than the device has in flight, whose texts are tokenized in the meantime.
        return self.ready and len(self.jobs) <= self.depth and not any(other.crashes for other in self.jobs.values())


class _Pool:
    """The processes, the jobs that wait for one, and the threads that start, read, write and watch the processes.

    Separate from `WorkerPool` so that these threads do not keep that from being garbage-collected. Pipes are written
    without the lock, because a process that hangs does not read.
    """

    def __init__(self, make_pipeline: MakePipeline, devices: Sequence[torch.device]) -> None:
        self.workers = [_Worker(device) for device in devices]
        self._make_pipeline = make_pipeline
        self._folder = os.getcwd()  # for the checkpoint's relative paths, because a process can start at any time
        on_cpu = sum(device.type == "cpu" for device in devices)
        self._threads = max(1, torch.get_num_threads() // on_cpu) if on_cpu else 1  # the processes share the cores
        self._lock = threading.RLock()  # garbage collection may call close in a thread that holds it
        self._waiting: deque[_Job] = deque()
        self._warnings: dict[str, Any] = {}  # the first of each, by its message before the arguments are filled in
        self._closed = False
        self._process_id = os.getpid()

    def start(self) -> list[Loaded]:
        """Start the processes and wait until all have loaded the model."""
        for index, worker in enumerate(self.workers):
            name = f"unpadded-worker-{index}"
            threading.Thread(target=self._supervise, args=(worker,), name=name, daemon=True).start()
        threading.Thread(target=self._watch, name="unpadded-watch", daemon=True).start()
        try:
            return [worker.loaded.result() for worker in self.workers]
        except BaseException:
            self.close()
            raise

    def submit(self, name: str, tokens: int, call: Call) -> Future[Any]:
        """Queue a job; the future returns its result in the process."""
        if os.getpid() != self._process_id:
            raise forked_error("the worker processes")
        with self._lock:
            if self._closed:
                raise WorkerError(f"the engine is closed: {name} was submitted after close(); load the model again")
            self._waiting.append(job := _Job(name, tokens, call))
            self._distribute()
        return job.future

    def close(self) -> None:
        """Stop every process; pending jobs raise WorkerError."""
        if os.getpid() != self._process_id:
            return
        with self._lock:
            self._closed = True
            dropped = [*self._waiting, *(job for worker in self.workers for job in worker.jobs.values())]
            self._waiting.clear()
            for worker in self.workers:
                worker.ready = False
                worker.jobs.clear()
                worker.outbox.put(None)
        processes = [worker.process for worker in self.workers if worker.process is not None]
        end = time.monotonic() + EXIT_SECONDS
        for process in processes:
            try:
                process.wait(max(0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        for job in dropped:
            error = f"the engine was closed: {job.name} was dropped; load the model again"
            job.future.set_exception(WorkerError(error))

    def _watch(self) -> None:
        """Kill processes that hang. Counts seconds, of which a pause of this process is one, and reads no clock."""
        while not self._closed:
            time.sleep(1)
            for worker in self.workers:
                with self._lock:
                    worker.silent += 1
                    worker.running = worker.running + 1 if worker.jobs else 0
                    if not worker.hang and worker.silent > (SILENT_SECONDS if worker.ready else START_SECONDS):
                        worker.hang = f"killed after {worker.silent} s without an answer"
                    elif not worker.hang and worker.running > JOB_SECONDS[worker.device.type]:
                        name = next(iter(worker.jobs.values())).name
                        worker.hang = f"killed after {worker.running} s in {name}"
                    if worker.hang and worker.process is not None:
                        worker.process.kill()  # the thread that reads from it handles its exit

    def _distribute(self) -> None:
        """Send waiting jobs to workers. The caller holds the lock."""
        if all(worker.given_up for worker in self.workers):
            devices = ", ".join(str(worker.device) for worker in self.workers)
            for job in self._waiting:
                error = f"no worker is left for {job.name}: {devices} crashed {MAX_CRASHES_PER_WORKER} times in a row"
                job.future.set_exception(WorkerError(f"{error}; free memory and load the model again"))
            self._waiting.clear()
        while self._waiting:
            accepting = [worker for worker in self.workers if worker.accepts(self._waiting[0])]
            if not accepting:
                return
            worker = min(accepting, key=lambda worker: sum(job.tokens for job in worker.jobs.values()))
            job = self._waiting.popleft()
            worker.jobs[id(job)] = job
            worker.outbox.put((id(job), job.call))

    def _supervise(self, worker: _Worker) -> None:
        """Start a process, read its answers until it exits, and repeat."""
        while not worker.given_up:
            with self._lock:
                if self._closed:
                    return
                command, pipe = [sys.executable, "-c", BOOTSTRAP, *sys.path], subprocess.PIPE
                tokenizer_threads = max(1, (os.cpu_count() or 1) // len(self.workers))
                environment = {"RAYON_NUM_THREADS": str(tokenizer_threads), **os.environ}
                try:
                    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=self._folder, env=environment)
                except OSError as error:
                    self._handle_exit(worker, f"{worker.device} (not started: {error})")
                    continue
                worker.process, worker.outbox, worker.silent, worker.hang = process, SimpleQueue(), 0, ""
                worker.outbox.put((self._make_pipeline, worker.device, self._threads))
            threading.Thread(target=_write, args=(process.stdin, worker.outbox), daemon=True).start()
            self._read(worker, process)
            code = process.wait()
            worker.outbox.put(None)
            with self._lock:
                if not self._closed:
                    end = worker.hang or f"exit code {code}"
                    self._handle_exit(worker, f"{worker.device} (process {process.pid}, {end})")

    def _read(self, worker: _Worker, process: subprocess.Popen[bytes]) -> None:
        """Handle the messages of a process until it exits."""
        assert process.stdout is not None
        while True:
            try:
                kind, value = pickle.load(process.stdout)
            except Exception:  # unpickling may raise anything; usually it is the EOFError of a process that exited
                process.kill()
                process.stdout.close()
                return
            worker.silent = 0
            if kind == "log":
                level, message, text = value
                # Every process may give the same warning, at the same time; setdefault is atomic.
                if level != logging.WARNING or self._warnings.setdefault(message, value) is value:
                    logger.log(level, "%s", text)
            elif kind == "ready":
                with self._lock:
                    worker.ready, worker.depth = not self._closed, value[1]
                    self._distribute()
                if not worker.loaded.done():
                    worker.loaded.set_result(value)
            elif kind in ("done", "failed"):
                self._finish_job(worker, kind, *value)
            elif kind == "not loaded" and not worker.loaded.done():
                worker.loaded.set_exception(value)
            elif kind == "not loaded":
                logger.warning("the model could not be loaded again on %s: %s", worker.device, value)

    def _finish_job(self, worker: _Worker, kind: str, job_id: int, value: Any) -> None:
        with self._lock:
            if self._closed:
                return
            if job_id == next(iter(worker.jobs)):  # the others may finish while it hangs
                worker.running = 0
            job = worker.jobs.pop(job_id)
            worker.crashes = 0
            self._distribute()
        settle = job.future.set_result if kind == "done" else job.future.set_exception
        settle(value)

    def _handle_exit(self, worker: _Worker, crash: str) -> None:
        """Log a crash, as described; queue again the jobs that crashed no other. The caller holds the lock."""
        if not worker.loaded.done():
            error = f"a worker exited while it loaded the model: {crash}; see its output on stderr"
            worker.loaded.set_exception(WorkerError(error))
        if worker.loaded.exception() is not None:  # `start` raises it
            worker.given_up = True
            return
        worker.ready = False
        worker.crashes += 1
        worker.given_up = worker.crashes == MAX_CRASHES_PER_WORKER
        message = "a worker crashed: %s; %d of its jobs run again, and it is %srestarted"
        logger.warning(message, crash, len(worker.jobs), "not " if worker.given_up else "")
        while worker.jobs:
            _, job = worker.jobs.popitem()  # the last one first
            job.crashes.append(crash)
            if len(job.crashes) < MAX_CRASHES_PER_JOB:
                self._waiting.appendleft(job)
            else:
                error = f"{job.name} crashed {MAX_CRASHES_PER_JOB} workers in a row: {', '.join(job.crashes)}"
                job.future.set_exception(WorkerError(f"{error}; lower token_budget or omit its texts"))
        self._distribute()


def _write(pipe: IO[bytes], outbox: SimpleQueue[Any]) -> None:
    """Write messages up to None. Ignores broken pipes: the thread that reads from the process handles its exit."""
    message: Any = ...
    with contextlib.suppress(OSError), pipe:
        while message is not None:
            message = outbox.get()
            data = memoryview(pickle.dumps(message, protocol=5))
            while data:  # without the pipe's buffer, of which a fork would write its copy again
                data = data[os.write(pipe.fileno(), data) :]
