"""Streams, events, memory and graphs of the stand-in for CUDA devices.

Work runs when it is submitted, except copies to the host and captured work. A vector clock per stream tells which
earlier work is complete. Two accesses to one block of memory without an order between them, of which one writes, raise
Misuse, whatever order they happened to run in.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

DEVICES = 2

Clock = dict["Stream", int]  # of each stream, how much of its work is complete
Step = Callable[["Stream"], object]  # captured work


class Misuse(AssertionError):
    """A use that fails on a GPU or has an undefined result."""


class Access(NamedTuple):
    stream: Stream
    number: int  # on the stream
    name: str

    def check(self, clock: Clock, use: str) -> None:
        if clock.get(self.stream, 0) < self.number:
            raise Misuse(f"{use}, which {self.name} on {self.stream} may still use; nothing waits for that")


class Memory:
    """A block of a device's memory and its latest accesses."""

    def __init__(self, storage: torch.UntypedStorage, stream: Stream, graph: CUDAGraph | None) -> None:
        self.storage = storage
        self.stream = stream  # on which it was allocated
        self.graph = weakref.ref(graph) if graph else None  # in whose capture it was allocated
        self.freed = False
        self.written: list[Access] = []  # the last write
        self.reads: dict[Stream, Access] = {}  # since then
        self.recorded: set[Stream] = set()  # by Tensor.record_stream

    def bytes(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8).set_(self.storage)

    def scramble(self) -> None:
        """Fill the block with bits that are NaN in every floating-point format."""
        self.storage.fill_(0xFF)

    def free(self) -> None:
        """Free the block, which the next allocation on its stream uses again."""
        if self.graph is None:
            self.freed = True
            self.scramble()
            self.stream.freed.append(self)
        elif self.graph() is CUDA.capture is not None:  # a later step of the graph uses it again
            CUDA.capture.steps.append(lambda stream: self.scramble())

    def accesses(self) -> list[Access]:
        return [*self.written, *self.reads.values()]


class Owner:
    """Shared by all tensors in a block of memory, so that the last of them frees it."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def __del__(self) -> None:
        self.memory.free()


class Stream:
    """A queue of work of a device."""

    def __init__(self, device: Any = None, **options: Any) -> None:
        self.device = indexed("cuda" if device is None else device)
        self.number = sum(stream.device == self.device for stream in CUDA.streams)
        self.clock: Clock = {}
        self.freed: list[Memory] = []
        self.workspace: Memory | None = None  # of cuBLAS
        self.graph: CUDAGraph | None = None  # whose capture is in progress
        CUDA.streams.append(self)

    def __repr__(self) -> str:
        return f"stream {self.number} of {self.device}"

    def access(self, name: str, reads: Iterable[Memory], writes: Iterable[Memory]) -> Access:
        """Submit work that reads and writes memory."""
        self.clock = merged(self.clock, CUDA.host)
        self.clock[self] = self.clock.get(self, 0) + 1
        access = Access(self, self.clock[self], name)
        reads, writes = list(reads), list(writes)
        if any(memory.freed for memory in (*reads, *writes)):
            raise Misuse(f"{name} uses memory that was freed after its capture")
        for memory in reads:
            for earlier in memory.written:
                earlier.check(self.clock, f"{name} on {self} reads memory")
            memory.reads[self] = access
        for memory in writes:
            for earlier in memory.accesses():
                if earlier is not access:
                    earlier.check(self.clock, f"{name} on {self} writes memory")
            memory.written, memory.reads = [access], {}
        return access

    def allocate(self, storage: torch.UntypedStorage) -> Memory:
        """Return new memory, which can be any that was freed on this stream."""
        for memory in self.freed:
            for earlier in memory.accesses():
                if earlier.stream not in memory.recorded:
                    earlier.check(merged(self.clock, CUDA.host), f"an allocation on {self} reuses freed memory")
        self.freed.clear()
        memory = Memory(storage, self, self.graph)
        if self.graph is not None:
            self.graph.memories.append(memory)
        return memory

    def cublas_workspace(self) -> Memory:
        if self.workspace is None:
            self.workspace = Memory(torch.UntypedStorage(0), self, None)
        return self.workspace

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: Event) -> None:
        self.clock = merged(self.clock, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """Return whether the host has waited for all work, since work is complete no earlier."""
        CUDA.raise_error(self.device)
        return self.record_event().query()

    def synchronize(self) -> None:
        CUDA.wait("Stream.synchronize", self.device, merged(self.clock))


class Event:
    """A point in the work of a stream."""

    def __init__(self, **options: Any) -> None:
        self.clock: Clock = {}
        self.device = indexed("cuda")

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current_stream()
        if stream.graph is not None or CUDA.thread.graph is not None:
            raise Misuse(f"the stand-in has no events in a capture: {stream}")
        self.clock, self.device = merged(stream.clock), stream.device

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        """Work is complete when the host has waited for it, no earlier."""
        return all(CUDA.host.get(stream, 0) >= number for stream, number in self.clock.items())

    def synchronize(self) -> None:
        CUDA.wait("Event.synchronize", self.device, self.clock)


class Thread(threading.local):
    """The state of a thread."""

    def __init__(self) -> None:
        self.device = 0
        self.streams: dict[int, Stream] = {}  # the current one of each device that has another one than the default
        self.graph: CUDAGraph | None = None  # whose capture is in progress


class HostCopy(NamedTuple):
    """A copy from or to pinned memory."""

    access: Access
    complete: Callable[[], object]


class Cuda:
    """The state of the devices."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.thread = Thread()
        self.streams: list[Stream] = []
        self.host: Clock = {}  # the work for which any thread has waited
        self.may_wait = True
        self.capture: CUDAGraph | None = None
        self.capture_stream: Stream | None = None  # of captures that name none
        self.copies: list[HostCopy] = []  # that may be in progress
        self.pinned: dict[int, Tensor] = {}  # by the address of the storage
        self.compiled: set[tuple[Any, ...]] = set()
        self.failed: set[int] = set()  # devices with an error
        self.broken: set[int] = set()  # devices whose error has been reported

    def submit_to(self, device: torch.device, name: str) -> Stream:
        """Return the current stream of a device, on which this thread may submit work."""
        self.raise_error(device)
        stream, graph = current_stream(device), self.thread.graph
        if graph is not None and stream is not graph.stream:
            raise Misuse(f"{name} runs on {stream} within a capture on {graph.stream}, and not in a replay")
        if graph is None and stream.graph is not None:
            raise Misuse(f"{name} runs on {stream}, on which another thread captures a graph")
        return stream

    @torch.inference_mode()
    def wait(self, operation: str, device: torch.device, clock: Clock | None = None) -> None:
        """Wait for work of a device: up to a clock, or for all of it."""
        streams = [stream for stream in self.streams if stream.device == device]
        implicit = not operation.endswith("synchronize")  # torch's error mode does not apply to explicit ones
        refused = implicit and not self.may_wait
        if refused or self.thread.graph is not None or (self.capture and self.capture.refuses_waits):
            raise Misuse(f"{operation} waits for the device")
        if any(stream.graph for stream in streams if clock is None):
            raise Misuse(f"{operation} waits for the device, on which another thread captures a graph")
        if device.index in self.failed:
            self.broken.add(device.index)
        self.raise_error(device)
        self.host = merged(self.host, *((stream.clock for stream in streams) if clock is None else (clock,)))
        for copy in list(self.copies):
            if self.host.get(copy.access.stream, 0) >= copy.access.number:
                self.copies.remove(copy)
                copy.complete()

    def raise_error(self, device: torch.device) -> None:
        if device.index in self.broken:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")


CUDA = Cuda()


def merged(*clocks: Clock) -> Clock:
    """Return the latest of the clocks per stream."""
    latest: Clock = {}
    for clock in clocks:
        for stream, number in clock.items():
            latest[stream] = max(number, latest.get(stream, 0))
    return latest


def indexed(name: Any) -> torch.device | None:
    """Return the device of that name; "cuda" is the current one."""
    if name is None:
        return None
    device = torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
    return torch.device("cuda", CUDA.thread.device) if device.type == "cuda" and device.index is None else device


def current_stream(device: Any = None) -> Stream:
    index = indexed("cuda" if device is None else device).index
    return CUDA.thread.streams.get(index, CUDA.streams[index])


@contextlib.contextmanager
def current_device(device: Any) -> Iterator[None]:
    before, CUDA.thread.device = CUDA.thread.device, indexed(device).index
    try:
        yield
    finally:
        CUDA.thread.device = before


@contextlib.contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    """Make a stream the current one of its device, and its device the current one."""
    if stream is None:
        yield
        return
    before = current_stream(stream.device)
    with current_device(stream.device):
        CUDA.thread.streams[stream.device.index] = stream
        try:
            yield
        finally:
            CUDA.thread.streams[stream.device.index] = before


class Pool:
    """The memory of graphs, any of which overwrites that of the others."""

    def __init__(self) -> None:
        self.graphs: weakref.WeakSet[CUDAGraph] = weakref.WeakSet()
        self.used = False


class CUDAGraph:
    """Captured work. Its memory belongs to it, but not that of tensors from before the capture."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.memories: list[Memory] = []
        self.pool = Pool()
        self.stream: Stream | None = None
        self.refuses_waits = False  # of other threads during its capture

    @torch.inference_mode()
    def replay(self) -> None:
        with CUDA.lock:
            if CUDA.thread.graph is not None:
                raise Misuse("a replay within a capture")
            stream = CUDA.submit_to(self.stream.device, "a replay")
            stream.access("a replay", (), [memory for graph in self.pool.graphs for memory in graph.memories])
            for graph in self.pool.graphs - {self}:
                for memory in graph.memories:
                    memory.scramble()
            for step in self.steps:
                step(stream)

    def __del__(self) -> None:
        """Free the workspace of cuBLAS on the stream of the capture, as torch does."""
        if self.stream is not None and self.stream.workspace is not None:
            self.stream.workspace.freed = True
            self.stream.workspace = None


@contextlib.contextmanager
def capture(
    graph: CUDAGraph,
    pool: Pool | None = None,
    stream: Stream | None = None,
    capture_error_mode: str = "global",
) -> Iterator[None]:
    if CUDA.capture is not None:
        raise Misuse("torch supports one capture at a time per process")
    CUDA.wait("a capture", indexed("cuda"))
    CUDA.capture_stream = CUDA.capture_stream or Stream()
    graph.pool, graph.stream = pool or graph.pool, stream or CUDA.capture_stream
    if graph.stream in CUDA.streams[:DEVICES]:
        raise Misuse("a capture on the default stream")
    if graph.pool.used and not graph.pool.graphs:
        raise Misuse("all graphs of the pool are destroyed, so torch rejects its handle")
    graph.pool.graphs.add(graph)
    graph.pool.used = True
    graph.refuses_waits = capture_error_mode == "global"
    with on_stream(graph.stream):
        CUDA.capture = CUDA.thread.graph = graph.stream.graph = graph
        try:
            yield
        finally:
            CUDA.capture = CUDA.thread.graph = graph.stream.graph = None
