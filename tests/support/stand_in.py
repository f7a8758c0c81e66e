"""A stand-in for CUDA devices, which tests what the engine does around its kernels on a machine without a GPU.

A tensor reports the device cuda:N and keeps its values on the CPU. The ops of unpadded_kernels run their CUDA
implementation, whose kernels run in Triton's interpreter. As on a GPU

- an operation or kernel rejects tensors of the host or of another device; a kernel is launched on the current device;
- a synchronization is an error in a capture and under `torch.cuda.set_sync_debug_mode("error")`;
- a copy to pinned memory completes no earlier than its event;
- a capture runs nothing; a replay runs the captured operations on the present contents of memory, and no host code;
- new memory is undefined: here, NaN;
- a kernel is compiled once per specialization of its arguments: `CUDA.compiled`.

It does not model the arithmetic, speed or memory size of a GPU.
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
    """A use that fails on a GPU or has an undefined result."""


class OnDevice(Tensor):
    """A tensor that reports a CUDA device."""

    value: Tensor
    index: int
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value: Tensor, index: int) -> OnDevice:
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, **layout)
        tensor.value, tensor.index = value, index
        return tensor

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
            with Placement():  # a mode is off while it handles a call
                return op._backend_fns.get("cuda", op._init_fn)(*args, **kwargs)
        if name == "copy_" and not all(isinstance(tensor, OnDevice) for tensor in args[:2]):
            return CUDA.copy_across(*args, **kwargs)
        indices = tree_leaves(args[1:]) if name.startswith("index") else []
        if name in WAITS or any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices):
            CUDA.wait(name)
        return CUDA.compute(function, name, args, kwargs)


class Cuda:
    """The state of the devices."""

    def __init__(self) -> None:
        self.current = 0
        self.may_wait = True
        self.captured: list[Step] | None = None
        self.outputs: list[Tensor] = []  # of the capture in progress
        self.pending: list[Step] = []  # copies to pinned memory
        self.pinned: dict[int, Tensor] = {}  # by the address of the storage
        self.compiled: set[tuple[Any, ...]] = set()

    def wait(self, operation: str) -> None:
        if self.captured is not None or not self.may_wait:
            raise Misuse(f"{operation} waits for the device")
        self.complete(list(self.pending))

    @torch.inference_mode()
    def complete(self, copies: list[Step]) -> None:
        for copy in copies:
            if copy in self.pending:
                self.pending.remove(copy)
                copy()

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def copy_across(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """Copy between the host and a device."""
        if self.captured is not None:
            raise Misuse("a copy to or from the host within a capture would use the same host memory in every replay")
        host = source if isinstance(target, OnDevice) else target
        asynchronous = non_blocking and host.untyped_storage().data_ptr() in self.pinned
        if not asynchronous:
            self.wait("a blocking copy")
        values = unwrapped(source).clone()
        if isinstance(target, OnDevice) or not asynchronous:
            unwrapped(target).copy_(values)
        else:
            scramble(target)
            self.pending.append(lambda: target.copy_(values))
        return target

    def compute(self, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Run an operation on tensors of one device."""
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        by_value = {id(one.value): one for one in tensors if isinstance(one, OnDevice)}
        index = {one.index for one in by_value.values()}
        if len(index) > 1 or any(one.dim() for one in tensors if not isinstance(one, OnDevice)):
            raise Misuse(f"{name} takes tensors of several devices: {[one.device for one in tensors]}")
        (index,) = index
        args, kwargs = tree_map(unwrapped, (args, kwargs))
        result = function(*args, **kwargs)
        writes = function._schema.is_mutable
        fresh = not writes and all(returned.alias_info is None for returned in function._schema.returns)
        if fresh:
            self.record(name, lambda: function(*args, **kwargs), result)
        elif writes and self.captured is not None:
            self.captured.append(lambda: function(*args, **kwargs))
        first = next(iter(by_value.values()))
        # a view inherits whether its base is an inference tensor
        with contextlib.nullcontext() if fresh or writes else torch.inference_mode(first.is_inference()):
            return tree_map(lambda one: by_value[id(one)] if id(one) in by_value else wrapped(one, index), result)

    def record(self, name: str, make: Step, result: Any) -> None:
        """Record an operation that returned new tensors for replays; in a capture their contents are undefined."""
        outputs = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        if name in EMPTY:
            scramble(*outputs)
        elif self.captured is not None:

            def again() -> None:
                for output, value in zip(outputs, tree_leaves(make()), strict=True):
                    output.copy_(value)

            scramble(*outputs)
            self.captured.append(again)
        if self.captured is not None:
            self.outputs += outputs

    def launch(self, kernel: str, tensors: list[Tensor], run: Step) -> None:
        if {tensor.device for tensor in tensors} != {torch.device("cuda", self.current)}:
            devices = [str(tensor.device) for tensor in tensors]
            raise Misuse(f"{kernel} is launched on cuda:{self.current} with tensors of {', '.join(devices)}")
        run() if self.captured is None else self.captured.append(run)


CUDA = Cuda()


def specialized(kernel: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> tuple[Any, ...]:
    """Return the key of Triton's compilation: types, constants, and for a number whether it is 1 or divisible by 16."""
    parameters = inspect.signature(kernel.fn).parameters
    key: list[Any] = [kernel.__name__]
    for name, value in (dict(zip(parameters, args, strict=False)) | kwargs).items():
        is_number = isinstance(value, int) and name in parameters and parameters[name].annotation is not tl.constexpr
        if isinstance(value, TensorDescriptor):
            key.append((name, value.base.dtype, *value.block_shape))
        elif isinstance(value, Tensor):
            key.append((name, value.dtype, value.data_ptr() % 16 == 0))
        elif is_number and name in (kernel.kwargs["do_not_specialize"] or ()):
            key.append(name)
        else:
            key.append((name, value == 1, value % 16 == 0) if is_number else (name, value))
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
    """Creates tensors on the named device and moves tensors to it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name == "pin_memory":
            return CUDA.pin(args[0].clone())
        if kwargs.pop("pin_memory", False):
            return CUDA.pin(function(*args, **kwargs))
        if name in ("cpu", "cuda", "to"):
            return self.move(function, *args, **kwargs)
        if name in ("item", "numpy", "tolist") and isinstance(args[0], OnDevice):
            if name == "numpy":
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            CUDA.wait(name)
            return function(args[0].value)
        device = indexed(kwargs.get("device"))
        if device is None or device.type != "cuda":
            return function(*args, **kwargs)
        if name == "tensor":
            CUDA.wait("a tensor of host values")
        kwargs["device"] = "cpu"
        value = function(*map(unwrapped, args), **kwargs)
        CUDA.record(name, lambda: function(*map(unwrapped, args), **kwargs), value)
        return OnDevice(value, device.index)

    def move(self, function: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run Tensor.to, .cuda or .cpu."""
        arguments = [*args, *kwargs.values()]
        default = None if function is Tensor.to else function.__name__
        device = indexed(next((one for one in arguments if isinstance(one, str | torch.device)), default))
        if device is None or "cuda" not in (device.type, tensor.device.type):
            return function(tensor, *args, **kwargs)
        tensor = Tensor.to(tensor, *(one for one in arguments if isinstance(one, torch.dtype)))
        if device == tensor.device:
            return tensor
        target = torch.empty(tensor.shape, dtype=tensor.dtype)
        target = target if device.type == "cpu" else OnDevice(target, device.index)
        return target.copy_(tensor, non_blocking=kwargs.get("non_blocking", True in args[:3]))


def indexed(name: Any) -> torch.device | None:
    """Return the device of that name; "cuda" is the current one."""
    if name is None:
        return None
    device = torch.device(name)
    return torch.device("cuda", CUDA.current) if device.type == "cuda" and device.index is None else device


class Stream:
    """Launches run immediately, in order."""

    def wait_stream(self, other: Stream) -> None: ...


class Event:
    def __init__(self, **options: Any) -> None:
        self.copies: list[Step] = []

    def record(self) -> None:
        self.copies = list(CUDA.pending)

    def synchronize(self) -> None:
        CUDA.complete(self.copies)


class CUDAGraph:
    """Captured steps and their outputs; a replay overwrites the outputs of the other graphs of its pool."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.outputs: list[Tensor] = []
        self.pool: list[CUDAGraph] = []

    def replay(self) -> None:
        for other in self.pool:
            scramble(*other.outputs)
        for step in self.steps:
            step()


@contextlib.contextmanager
def capture(graph: CUDAGraph, pool: list[CUDAGraph] | None = None, **options: Any) -> Iterator[None]:
    pool = [] if pool is None else pool
    pool.append(graph)
    graph.pool, CUDA.captured, CUDA.outputs = pool, graph.steps, graph.outputs
    try:
        yield
    finally:
        CUDA.captured = None


@contextlib.contextmanager
def current(device: torch.device) -> Iterator[None]:
    before, CUDA.current = CUDA.current, indexed(device).index
    try:
        yield
    finally:
        CUDA.current = before


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Replace torch.cuda by the stand-in."""
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
        arguments = [one.base if isinstance(one, TensorDescriptor) else one for one in (*args, *kwargs.values())]
        values = [unwrapped(one) for one in args], {name: unwrapped(one) for name, one in kwargs.items()}
        tensors = [one for one in arguments if isinstance(one, Tensor)]
        CUDA.compiled.add(specialized(kernel, *args, **kwargs))

        def step() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # padding tokens of a graph compute with NaN
                interpret(kernel, *values[0], **values[1])

        CUDA.launch(kernel.__name__, tensors, step)

    def exact(*args: Any, dtype: Any, **kwargs: Any) -> Any:
        return matmul(*args, dtype=np.float64, **kwargs).astype(dtype)

    with pytest.MonkeyPatch.context() as patch, Placement():
        for name, value in replaced.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(InterpretedFunction, "run", run)
        # tl.dot in fp64, exact for fp16, so that the bits of a row do not depend on its position in a tile
        patch.setattr(np, "matmul", exact)
        # Module.to replaces its parameters, not only their data, since OnDevice is another class
        patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
        CUDA.__init__()
        yield
