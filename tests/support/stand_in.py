"""A stand-in for CUDA devices: what the engine does around its kernels, where there is no GPU.

Tensors say that they lie on cuda:N and keep their values on the CPU. Our ops run what is registered for CUDA, whose
kernels run in Triton's interpreter. As on a GPU

- an operation or a kernel takes no tensor of the host or of another device; a kernel is launched on the current one;
- what waits for the device is an error in a capture and where `torch.cuda.set_sync_debug_mode("error")` forbids it;
- a copy to pinned memory has arrived when its event says so;
- a capture runs nothing, and each replay runs what was captured over what then lies in memory: host code not at all;
- new memory holds anything: here, NaN;
- a kernel is compiled anew for what its arguments are specialized by: `CUDA.compiled`.

It says nothing of a GPU's arithmetic, speed or amount of memory.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import unpadded_kernels

DEVICES, CAPABILITY = 2, (9, 0)
OPS = {op._opoverload: op for op in vars(unpadded_kernels).values() if isinstance(op, torch.library.CustomOpDef)}
WAITS = ("_local_scalar_dense", "_unique2", "equal", "is_nonzero", "masked_select", "nonzero", "repeat_interleave")
EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

Step = Callable[[], object]


class Misuse(AssertionError):
    """What a GPU would refuse, or answer with anything."""


class OnDevice(Tensor):
    """A tensor that says it lies on a CUDA device."""

    value: Tensor
    index: int
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value: Tensor, index: int) -> OnDevice:
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset()}
        found = Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, **layout)
        found.value, found.index = value, index
        return found

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    @property
    def is_cuda(self) -> bool:
        return True

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def __repr__(self) -> str:
        return f"OnDevice({self.value!r}, {self.index})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name.split("::")[1]
        if function in OPS:
            op = OPS[function]
            with Placement():  # which is off while it handles a call
                return op._backend_fns.get("cuda", op._init_fn)(*args, **kwargs)
        if name == "copy_" and not all(isinstance(tensor, OnDevice) for tensor in args[:2]):
            return CUDA.cross(*args, **kwargs)
        places = tree_leaves(args[1:]) if name.startswith("index") else []
        if name in WAITS or any(isinstance(one, Tensor) and one.dtype == torch.bool for one in places):
            CUDA.wait(name)
        return CUDA.compute(function, name, args, kwargs)


class Cuda:
    """What the devices are at."""

    def __init__(self) -> None:
        self.current = 0
        self.may_wait = True
        self.captured: list[Step] | None = None
        self.made: list[Tensor] = []  # by the capture under way
        self.under_way: list[Step] = []  # copies to pinned memory
        self.pinned: dict[int, Tensor] = {}  # by the address of its storage
        self.compiled: set[tuple[Any, ...]] = set()

    def wait(self, why: str) -> None:
        if self.captured is not None or not self.may_wait:
            raise Misuse(f"{why} waits for the device")
        self.arrive(list(self.under_way))

    @torch.inference_mode()
    def arrive(self, copies: list[Step]) -> None:
        for copy in copies:
            if copy in self.under_way:
                self.under_way.remove(copy)
                copy()

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def cross(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """copy_ between the host and a device."""
        if self.captured is not None:
            raise Misuse("a copy that crosses within a capture would be of the same host memory ever after")
        host = source if isinstance(target, OnDevice) else target
        asynchronous = non_blocking and host.untyped_storage().data_ptr() in self.pinned
        if not asynchronous:
            self.wait("a copy that crosses")
        values = unwrapped(source).clone()
        if isinstance(target, OnDevice) or not asynchronous:
            unwrapped(target).copy_(values)
        else:
            scramble(target)
            self.under_way.append(lambda: target.copy_(values))
        return target

    def compute(self, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        """An operation on tensors of one device."""
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        own = {id(one.value): one for one in tensors if isinstance(one, OnDevice)}
        index = {one.index for one in own.values()}
        if len(index) > 1 or any(one.dim() for one in tensors if not isinstance(one, OnDevice)):
            raise Misuse(f"{name} takes tensors of several devices: {[one.device for one in tensors]}")
        (index,) = index
        args, kwargs = tree_map(unwrapped, (args, kwargs))
        found = function(*args, **kwargs)
        writes = function._schema.is_mutable
        fresh = not writes and all(returned.alias_info is None for returned in function._schema.returns)
        if fresh:
            self.record(name, lambda: function(*args, **kwargs), found)
        elif writes and self.captured is not None:
            self.captured.append(lambda: function(*args, **kwargs))
        first = next(iter(own.values()))
        # a view of what was made outside inference mode is of its kind within
        with contextlib.nullcontext() if fresh or writes else torch.inference_mode(first.is_inference()):
            return tree_map(lambda one: own[id(one)] if id(one) in own else wrapped(one, index), found)

    def record(self, name: str, make: Step, found: Any) -> None:
        """Keep for replays what made new tensors, which hold nothing yet where that is all it did."""
        outputs = [one for one in tree_leaves(found) if isinstance(one, Tensor)]
        if name in EMPTY:
            scramble(*outputs)
        elif self.captured is not None:

            def again() -> None:
                for output, value in zip(outputs, tree_leaves(make()), strict=True):
                    output.copy_(value)

            scramble(*outputs)
            self.captured.append(again)
        if self.captured is not None:
            self.made += outputs

    def launch(self, kernel: str, tensors: list[Tensor], run: Step) -> None:
        if {tensor.device for tensor in tensors} != {torch.device("cuda", self.current)}:
            found = [str(tensor.device) for tensor in tensors]
            raise Misuse(f"{kernel} is launched on cuda:{self.current} with tensors of {', '.join(found)}")
        run() if self.captured is None else self.captured.append(run)


CUDA = Cuda()


def specialized(kernel: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> tuple[Any, ...]:
    """What Triton compiles a kernel by: types, constants, and of a number whether it is 1 and whether 16 divides it."""
    parameters = inspect.signature(kernel.fn).parameters
    key: list[Any] = [kernel.__name__]
    for name, value in (dict(zip(parameters, args, strict=False)) | kwargs).items():
        counted = isinstance(value, int) and name in parameters and parameters[name].annotation is not tl.constexpr
        if isinstance(value, TensorDescriptor):
            key.append((name, value.base.dtype, *value.block_shape))
        elif isinstance(value, Tensor):
            key.append((name, value.dtype, value.data_ptr() % 16 == 0))
        elif counted and name in (kernel.kwargs["do_not_specialize"] or ()):
            key.append(name)
        else:
            key.append((name, value == 1, value % 16 == 0) if counted else (name, value))
    return tuple(key)


def wrapped(value: Any, index: int) -> Any:
    return OnDevice(value, index) if isinstance(value, Tensor) else value


def unwrapped(value: Any) -> Any:
    if isinstance(value, TensorDescriptor):
        return TensorDescriptor(unwrapped(value.base), value.shape, value.strides, value.block_shape, value.padding)
    return value.value if isinstance(value, OnDevice) else value


def scramble(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.itemsize > 1:
            tensor.fill_(float("nan"))


class Placement(TorchFunctionMode):
    """Makes and moves tensors where a device is named."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name == "pin_memory":
            return CUDA.pin(args[0].clone())
        if kwargs.pop("pin_memory", False):
            return CUDA.pin(function(*args, **kwargs))
        if name in ("cpu", "cuda", "to"):
            return self.moved(function, *args, **kwargs)
        if name in ("item", "numpy", "tolist") and isinstance(args[0], OnDevice):
            if name == "numpy":
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            CUDA.wait(name)
            return function(args[0].value)
        where = placed(kwargs.get("device"))
        if where is None or where.type != "cuda":
            return function(*args, **kwargs)
        if name == "tensor":
            CUDA.wait("a tensor of the host's values")
        kwargs["device"] = "cpu"
        made = function(*map(unwrapped, args), **kwargs)
        CUDA.record(name, lambda: function(*map(unwrapped, args), **kwargs), made)
        return OnDevice(made, where.index)

    def moved(self, function: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tensor.to, .cuda and .cpu."""
        given = [*args, *kwargs.values()]
        default = None if function is Tensor.to else function.__name__
        where = placed(next((one for one in given if isinstance(one, str | torch.device)), default))
        if where is None or "cuda" not in (where.type, tensor.device.type):
            return function(tensor, *args, **kwargs)
        tensor = Tensor.to(tensor, *(one for one in given if isinstance(one, torch.dtype)))
        if where == tensor.device:
            return tensor
        target = torch.empty(tensor.shape, dtype=tensor.dtype)
        target = target if where.type == "cpu" else OnDevice(target, where.index)
        return target.copy_(tensor, non_blocking=kwargs.get("non_blocking", True in args[:3]))


def placed(device: Any) -> torch.device | None:
    """The device of that name; of CUDA without an index, the current one."""
    if device is None:
        return None
    found = torch.device(device)
    return torch.device("cuda", CUDA.current) if found.type == "cuda" and found.index is None else found


class Stream:
    """All that is launched runs at once, in order."""

    def wait_stream(self, other: Stream) -> None: ...


class Event:
    def __init__(self, **options: Any) -> None:
        self.copies: list[Step] = []

    def record(self) -> None:
        self.copies = list(CUDA.under_way)

    def synchronize(self) -> None:
        CUDA.arrive(self.copies)


class CUDAGraph:
    """Captured steps, and what they make; a replay leaves nothing of what the other graphs of its pool made."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.made: list[Tensor] = []
        self.pool: list[CUDAGraph] = []

    def replay(self) -> None:
        for other in self.pool:
            scramble(*other.made)
        for step in self.steps:
            step()


@contextlib.contextmanager
def capture(graph: CUDAGraph, pool: list[CUDAGraph] | None = None, **options: Any) -> Iterator[None]:
    pool = [] if pool is None else pool
    pool.append(graph)
    graph.pool, CUDA.captured, CUDA.made = pool, graph.steps, graph.made
    try:
        yield
    finally:
        CUDA.captured = None


@contextlib.contextmanager
def current(device: torch.device) -> Iterator[None]:
    before, CUDA.current = CUDA.current, placed(device).index
    try:
        yield
    finally:
        CUDA.current = before


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """torch.cuda is the stand-in within."""
    stream = Stream()
    replaced = {
        "is_available": lambda: True,
        "device_count": lambda: DEVICES,
        "current_device": lambda: CUDA.current,
        "device": current,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: SimpleNamespace(multi_processor_count=3),
        "mem_get_info": lambda device=None: (2**34, 2**34),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "synchronize": lambda device=None: CUDA.wait("synchronize"),
        "set_sync_debug_mode": lambda mode: setattr(CUDA, "may_wait", mode == "default"),
        "Event": Event,
        "Stream": Stream,
        "current_stream": lambda: stream,
        "stream": contextlib.nullcontext,
        "CUDAGraph": CUDAGraph,
        "graph": capture,
        "graph_pool_handle": list,
    }
    interpret, matmul = InterpretedFunction.run, np.matmul

    def run(kernel: InterpretedFunction, *args: Any, **kwargs: Any) -> None:
        given = [one.base if isinstance(one, TensorDescriptor) else one for one in (*args, *kwargs.values())]
        values = [unwrapped(one) for one in args], {name: unwrapped(one) for name, one in kwargs.items()}
        tensors = [one for one in given if isinstance(one, Tensor)]
        CUDA.compiled.add(specialized(kernel, *args, **kwargs))

        def step() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of NaNs: tokens of no text compute with anything
                interpret(kernel, *values[0], **values[1])

        CUDA.launch(kernel.__name__, tensors, step)

    def exact(*args: Any, dtype: Any, **kwargs: Any) -> Any:
        return matmul(*args, dtype=np.float64, **kwargs).astype(dtype)

    with pytest.MonkeyPatch.context() as patch, Placement():
        for name, value in replaced.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(InterpretedFunction, "run", run)
        # tl.dot; of fp16, exact in fp64, a row's bits do not depend on its place in a tile
        patch.setattr(np, "matmul", exact)
        # Module.to exchanges its parameters, not their contents only: one on a device is of another class
        patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
        CUDA.__init__()
        yield
