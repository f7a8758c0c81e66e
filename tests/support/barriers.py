"""A simulation of Gluon kernels for sm_90: the partitions of a program, TMA and wgmmas run in a random order.

    result = simulate(lambda: launcher(...), seed)      the launcher's own result, from the kernel's own source

Gluon has no interpreter. Here the source of a kernel runs on CPU tensors, one step at a time: each call in it is a
point at which another partition may run or a TMA transfer may complete. `SimulationError` is raised for

- a deadlock, or a barrier that receives too many arrivals or bytes;
- a write to shared memory that a wgmma still reads, or a read of memory whose load has not completed;
- generic writes that asynchronous reads may not see yet: without fence_async_shared and then a barrier;
- an accumulator that is used while its wgmma runs;
- an access outside of a tensor.

A stale tile shows as a wrong result. Memory is tracked by slot, the first index of an allocation. Not simulated:
layouts of registers, the time that anything takes, and memory that different programs share.
"""

from __future__ import annotations

import ast
import functools
import inspect
import random
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Generator
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton import language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.runtime.jit import JITFunction

Slot = tuple[int, int]
# How much likelier one partition, or the transfers, may run than another.
WEIGHTS = (1, 5, 40)


class SimulationError(AssertionError):
    """A fault of the kernel."""


def simulate(call: Callable[[], Tensor], seed: int, change: Callable[[str], str] = str) -> Tensor:
    """Return the result of `call`, whose launches of Gluon kernels are simulated; change: applied to their source."""

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = kernel.arg_names
        values = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
        values = {name: argument(value) for name, value in values.items()}
        for program in range(grid[0]):
            simulation = Simulation(random.Random(f"{seed} {program}"), program, grid[0], change)
            simulation.run(kernel, values)

    original, JITFunction.run = JITFunction.run, run
    try:
        return call()
    finally:
        JITFunction.run = original


def argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer(value)
    return Descriptor(value) if hasattr(value, "block_shape") else value


class Pointer:
    """A tensor's address, or a block of addresses."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, offset
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + offset)

    def elements(self, mask: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return the flat tensor, the offsets and the mask."""
        if not self.tensor.is_contiguous():
            raise SimulationError("a pointer of a strided tensor is not simulated")
        flat, offset = self.tensor.view(-1), torch.as_tensor(self.offset)
        mask = torch.as_tensor(True if mask is None else mask).broadcast_to(offset.shape)
        if bool((mask & ((offset < 0) | (offset >= len(flat)))).any()):
            raise SimulationError(f"an access outside of a tensor of {tuple(self.tensor.shape)}")
        return flat, offset.long(), mask


class Descriptor:
    def __init__(self, real: Any) -> None:
        self.tensor = real.base.as_strided(real.shape, real.strides)
        self.block_shape, self.layout, self.dtype = real.block_shape, real.layout, real.base.dtype

    def box(self, start: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return the part of the tensor that a block at `start` covers, and the same part of the block."""
        pairs = list(zip(start, self.block_shape, self.tensor.shape, strict=True))
        if any(first < 0 for first in start):
            raise SimulationError(f"a block starts at {start}")
        ends = [max(0, min(length, size - first)) for first, length, size in pairs]
        inside = tuple(slice(first, first + end) for (first, _, _), end in zip(pairs, ends, strict=True))
        return inside, tuple(slice(0, end) for end in ends)

    def load(self, start: list[int]) -> Tensor:
        block = torch.zeros(tuple(self.block_shape), dtype=self.dtype)
        inside, part = self.box(start)
        block[part] = self.tensor[inside]
        return block


class Barrier:
    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, count: int = 1, expected: int = 0) -> None:
        self.bytes += expected
        self.pending -= count
        if self.pending < 0:
            raise SimulationError("a barrier receives more arrivals than its count")
        self.flip()

    def complete(self, count: int) -> None:
        self.bytes -= count
        if self.bytes < 0:
            raise SimulationError("a barrier receives more bytes than it expects")
        self.flip()

    def flip(self) -> None:
        if self.pending == self.bytes == 0:
            self.phase, self.pending = self.phase ^ 1, self.count


class Shared:
    """A view of shared memory, or of barriers."""

    def __init__(self, simulation: Simulation, values: Any, slot: Slot, indexed: bool = False) -> None:
        self.simulation, self.values, self.slot, self.indexed = simulation, values, slot, indexed

    @property
    def barrier(self) -> Barrier:
        return self.values if isinstance(self.values, Barrier) else self.values[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def shape(self) -> Any:
        return self.values.shape

    def index(self, at: int) -> Shared:
        if not 0 <= at < len(self.values):
            raise SimulationError(f"index {at} of {len(self.values)} slots")
        return Shared(self.simulation, self.values[at], self.slot if self.indexed else (self.slot[0], at), True)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.simulation, self.values.permute(*order), self.slot, True)

    def load(self, layout: Any = None) -> Tensor:
        self.simulation.check_loaded(self.slot)
        return self.values.clone()

    def store(self, values: Tensor) -> None:
        if values.dtype != self.dtype or values.shape != self.shape:
            raise SimulationError(f"a store of {values.dtype} {values.shape} to {self.dtype} {self.shape}")
        self.simulation.write(self, values)


class Accumulator:
    """The result of a wgmma that may not have completed."""

    def __init__(self, values: Tensor, wgmma: object = None) -> None:
        self.values, self.wgmma = values, wgmma

    def used(self, *_: Any) -> Any:
        raise SimulationError("an accumulator is used before warpgroup_mma_wait")

    __getattr__ = __add__ = __iadd__ = __sub__ = __mul__ = __rmul__ = used


class Step:
    """The result of a primitive at which other partitions may run; it continues once `ready`."""

    def __init__(self, value: Any = None, ready: Callable[[], bool] = lambda: True) -> None:
        self.value, self.ready = value, ready


class Simulation:
    """One program."""

    def __init__(self, chance: random.Random, program: int, programs: int, change: Callable[[str], str]) -> None:
        self.chance, self.change = chance, change
        self.partition = -1  # the one that runs; -1 before warp specialization
        self.allocations = 0
        self.transfers: list[Callable[[], None]] = []
        self.loading: Counter[Slot] = Counter()  # TMA loads that have not completed
        self.readers: Counter[Slot] = Counter()  # wgmmas that have not completed
        self.wgmmas: dict[int, list[tuple[object, list[Slot]]]] = defaultdict(list)  # by partition, oldest first
        # by slot and partition: dirty, fenced or visible. Two may write the same bits.
        self.written: dict[tuple[Slot, int], str] = {}
        self.functions: dict[FunctionType, FunctionType] = {}  # of a kernel -> translated
        self.program, self.programs = program, programs
        self.fakes = {id(real): fake for real, fake in self.replacements()}

    def run(self, kernel: Any, values: dict[str, Any]) -> None:
        self.schedule([self.function(kernel)(**values)])

    # scheduling

    def schedule(self, generators: list[Generator[Step, None, None]]) -> None:
        """Run partitions and transfers in a random order until all have ended."""
        outer = self.partition
        waiting = dict.fromkeys(range(len(generators)), Step())
        weights = [self.chance.choice(WEIGHTS) for _ in generators]
        transfer_weight = self.chance.choice(WEIGHTS)
        while waiting:
            ready = [one for one, step in waiting.items() if step.ready()]
            if not ready and not self.transfers:
                raise SimulationError(f"deadlock: partitions {sorted(waiting)} of {len(generators)} wait")
            if self.transfers and not (
                ready
                and self.chance.random() * (transfer_weight + sum(weights[one] for one in ready)) > transfer_weight
            ):
                self.transfers.pop(self.chance.randrange(len(self.transfers)))()
                continue
            (one,) = self.chance.choices(ready, [weights[one] for one in ready])
            self.partition = one if len(generators) > 1 else -1
            try:
                waiting[one] = next(generators[one])
            except StopIteration:
                del waiting[one]
                if self.wgmmas[self.partition]:
                    raise SimulationError(f"partition {one} ends before its wgmmas") from None
        self.partition = outer

    # translation of a kernel's source

    def function(self, kernel: Any) -> FunctionType:
        """Return the kernel, or a function that it calls, as a generator function of simulated values."""
        original = kernel.fn
        if original not in self.functions:
            code = translated(original, self.change)
            scope = {name: self.replace(value) for name, value in original.__globals__.items()} | {"_step": self.step}
            exec(code, scope)
            self.functions[original] = scope[original.__name__]
        return self.functions[original]

    def replace(self, value: Any) -> Any:
        value = getattr(value, "value", value) if isinstance(value, tl.constexpr) else value
        return self.fakes.get(id(value), value)

    def step(self, function: Any, *args: Any, **kwargs: Any) -> Generator[Step, None, Any]:
        """Call a function of a kernel's source."""
        if hasattr(function, "fn") and hasattr(function.fn, "__code__"):
            function = self.function(function)
        result = function(*args, **kwargs)
        if inspect.isgenerator(result):
            result = yield from result
        if isinstance(result, Step):
            yield result
            result = result.value
        return result

    # primitives

    def replacements(self) -> list[tuple[Any, Any]]:
        language = {
            "abs": torch.abs,
            "exp2": torch.exp2,
            "where": lambda mask, a, b: torch.where(mask, torch.as_tensor(a), torch.as_tensor(b)),
            "maximum": lambda a, b: torch.maximum(a, torch.as_tensor(b).to(a)) if isinstance(a, Tensor) else max(a, b),
            "minimum": lambda a, b: torch.minimum(a, torch.as_tensor(b).to(a)) if isinstance(a, Tensor) else min(a, b),
            "max": lambda x, axis: x.amax(axis),
            "sum": lambda x, axis: x.sum(axis),
            "arange": lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32),
            "full": lambda shape, value, dtype, layout=None: torch.full(tuple(shape), value, dtype=dtype),
            "zeros_like": torch.zeros_like,
            "zeros": lambda shape, dtype, layout=None: torch.zeros(tuple(shape), dtype=dtype),
            "convert_layout": lambda x, layout: x,
            "load": self.load,
            "store": self.store,
            "program_id": lambda axis: self.program,
            "num_programs": lambda axis: self.programs,
            "allocate_shared_memory": self.allocate,
            "warp_specialize": self.warp_specialize,
            "static_range": range,
            "float32": torch.float32,
            "int64": torch.int64,
        }
        barriers = Namespace(
            hopper.mbarrier,
            init=lambda shared, count: shared.barrier.init(count),
            wait=lambda shared, phase, pred=True: Step(ready=lambda: not pred or shared.barrier.phase != int(phase)),
            arrive=lambda shared, count: Step(shared.barrier.arrive(count)),
            expect=lambda shared, count: Step(shared.barrier.arrive(1, count)),
        )
        tma_load = "async_load" if hasattr(hopper.tma, "async_load") else "async_copy_global_to_shared"
        names = (self.fence_async_shared, self.warpgroup_mma, self.warpgroup_mma_wait)
        return [
            (gl, Namespace(gl, **language)),
            (hopper.mbarrier, barriers),
            *((getattr(hopper, method.__name__), method) for method in names),
            (getattr(hopper.tma, tma_load), self.tma_load),
            *((getattr(gl, name), self.thread_barrier) for name in ("barrier", "thread_barrier") if hasattr(gl, name)),
        ]

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        self.allocations += 1
        if isinstance(layout, hopper.mbarrier.MBarrierLayout):
            values: Any = [Barrier() for _ in range(shape[0])]
        else:
            values = torch.full(tuple(shape), float("nan")).to(dtype)
        return Shared(self, values, (self.allocations, 0))

    def warp_specialize(self, partitions: list[Any], warps: list[int], registers: list[int]) -> None:
        self.schedule([self.step(function, *args) for function, args in partitions])

    def load(self, pointer: Pointer, mask: Any = None, other: Any = 0.0) -> Any:
        flat, offset, mask = pointer.elements(mask)
        values = torch.where(mask, flat[offset.where(mask, torch.zeros_like(offset))], torch.as_tensor(other).to(flat))
        return values if values.dim() else values.item()

    def store(self, pointer: Pointer, values: Any, mask: Any = None) -> None:
        flat, offset, mask = pointer.elements(mask)
        flat[offset[mask]] = torch.as_tensor(values).broadcast_to(offset.shape)[mask].to(flat.dtype)

    def check_loaded(self, slot: Slot) -> None:
        if self.loading[slot]:
            raise SimulationError(f"a read of {slot}, whose load has not completed")

    def write(self, shared: Shared, values: Tensor) -> None:
        slot, changes = shared.slot, not torch.equal(as_bits(shared.values), as_bits(values))
        if changes and self.readers[slot]:
            raise SimulationError(f"a write to {slot}, which is still read")
        self.check_loaded(slot)
        shared.values.copy_(values)
        self.written[slot, self.partition] = "dirty"

    def states(self, slot: Slot) -> dict[int, str]:
        """Return the states of a slot by the partition that wrote it."""
        return {partition: state for (written, partition), state in self.written.items() if written == slot}

    def advance(self, before: str, after: str) -> None:
        """Change the state of what this partition has written."""
        for (slot, partition), state in self.written.items():
            if (partition, state) == (self.partition, before):
                self.written[slot, partition] = after

    def fence_async_shared(self) -> Step:
        self.advance("dirty", "fenced")
        return Step()

    def thread_barrier(self) -> Step:
        """Synchronize the threads of a partition."""
        self.advance("fenced", "visible")
        return Step()

    def check_visible(self, slot: Slot) -> None:
        self.check_loaded(slot)
        states = self.states(slot)
        # after this partition's own write, if visible, others may write the same bits
        relevant = {states[self.partition]} if self.partition in states else set(states.values())
        if relevant - {"visible"}:
            raise SimulationError(f"an asynchronous read of {slot}, which is {', '.join(states.values())}")

    def tma_load(self, descriptor: Descriptor, start: list[int], barrier: Shared, target: Shared) -> Step:
        slot, block = target.slot, descriptor.load(start)
        states = self.states(slot)
        if self.readers[slot] or set(states.values()) - {"visible"}:
            raise SimulationError(f"a load to {slot}, which is still read or written")
        for partition in states:
            del self.written[slot, partition]
        self.loading[slot] += 1

        def complete() -> None:
            target.values.copy_(block)
            self.loading[slot] -= 1
            barrier.barrier.complete(block.nbytes)

        self.transfers.append(complete)
        return Step()

    def warpgroup_mma(self, a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Step:
        operands = [operand for operand in (a, b) if isinstance(operand, Shared)]
        for operand in operands:
            self.check_visible(operand.slot)
        a, b = (operand.values if isinstance(operand, Shared) else operand for operand in (a, b))
        values = a.float() @ b.float()
        if use_acc:
            values = values + (acc.values if isinstance(acc, Accumulator) else acc)
        if not is_async:
            return Step(values)
        wgmma = object()
        slots = [operand.slot for operand in operands]
        self.readers.update(slots)
        self.wgmmas[self.partition].append((wgmma, slots))
        return Step(Accumulator(values, wgmma))

    def warpgroup_mma_wait(self, num_outstanding: int = 0, deps: tuple[Any, ...] = ()) -> Step:
        running = self.wgmmas[self.partition]
        while len(running) > num_outstanding:
            self.readers.subtract(running.pop(0)[1])
        left = [wgmma for wgmma, _ in running]
        values = [
            one.values if isinstance(one, Accumulator) and not any(one.wgmma is wgmma for wgmma in left) else one
            for one in deps
        ]
        return Step(values[0] if len(values) == 1 else tuple(values))


@functools.cache
def translated(function: FunctionType, change: Callable[[str], str]) -> CodeType:
    """Return the code of a kernel's function as a generator function."""
    (definition,) = ast.parse(change(textwrap.dedent(inspect.getsource(function)))).body
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list, definition.returns = [], None
    for parameter in definition.args.args:
        parameter.annotation = None
    module = ast.Module(body=[Steps().visit(definition)], type_ignores=[])
    return compile(ast.fix_missing_locations(module), inspect.getsourcefile(function) or "", "exec")


class Steps(ast.NodeTransformer):
    """Turn each call into a step."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        call = ast.Call(func=ast.Name("_step", ast.Load()), args=[node.func, *node.args], keywords=node.keywords)
        return ast.YieldFrom(value=call)


class Namespace:
    """A module with some names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def as_bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)
