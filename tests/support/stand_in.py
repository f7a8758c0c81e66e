"""A stand-in for CUDA devices, which tests what the engine does around its kernels on a machine without a GPU.

A tensor reports the device cuda:N and keeps its values on the CPU. The ops of unpadded_kernels run their CUDA
implementation, whose kernels run in Triton's interpreter. As on a GPU

- an operation or kernel rejects tensors of the host or of another device; a kernel is launched on the current device;
- the current device, the current streams and a capture belong to a thread;
- work on one stream is ordered with that on another, or with the host, only by events and synchronizations; accesses to
  the same memory of which no order is known raise Misuse, as does the reuse of memory that another stream still reads;
- a synchronization is an error in a capture and under `torch.cuda.set_sync_debug_mode("error")`;
- a copy to pinned memory completes no earlier than its event, and one from it reads it no later than its event;
- a capture runs nothing, and takes work of one stream only; a replay runs the captured operations on the present
  contents of memory, and no host code;
- graphs of a pool overwrite each other's memory; destroying a graph frees the cuBLAS workspace of its capture stream,
  which other graphs captured there use;
- new and freed memory is undefined: its bits are those of NaN, or -1;
- an error of a kernel (`torch._assert_async`) is reported by the next synchronization and each later call;
- a kernel is compiled once per specialization of its arguments: `CUDA.compiled`.

It does not model the arithmetic, speed or memory size of a GPU, copies between devices, events in a capture, or streams
that join one. It finds races between streams, but not between threads that submit work to the same stream.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
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
from support.stand_in_streams import (
    CUDA,
    DEVICES,
    CUDAGraph,
    Event,
    HostCopy,
    Memory,
    Misuse,
    Owner,
    Pool,
    Stream,
    capture,
    current_device,
    current_stream,
    indexed,
    on_stream,
)

CAPABILITY = (9, 0)
OPS = {op for op in vars(unpadded_kernels).values() if isinstance(op, torch._ops.OpOverload)}
CUDA_BODY = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
WAITS = ("_local_scalar_dense", "_unique2", "equal", "is_nonzero", "masked_select", "nonzero", "repeat_interleave")
EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
MATMULS = ("_scaled_mm", "addmm", "baddbmm", "bmm", "linear", "matmul", "mm")  # of cuBLAS


class OnDevice(Tensor):
    """A tensor that reports a CUDA device."""

    value: Tensor
    owner: Owner
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value: Tensor, owner: Owner) -> OnDevice:
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, **layout)
        tensor.value, tensor.owner = value, owner
        return tensor

    @property
    def memory(self) -> Memory:
        return self.owner.memory

    @property
    def device(self) -> torch.device:
        return self.memory.stream.device

    @property
    def is_cuda(self) -> bool:
        return True

    def record_stream(self, stream: Stream) -> None:
        self.memory.recorded.add(stream)

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, other: OnDevice) -> None:
        assert (self.shape, self.device) == (other.shape, other.device), (self, other)
        self.value, self.owner = other.value, other.owner

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def __repr__(self) -> str:
        return f"OnDevice({self.value!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name.split("::")[1]
        if function in OPS:
            with Placement():  # a mode is off while it handles a call
                return function.redispatch(CUDA_BODY, *args, **kwargs)
        with CUDA.lock:
            if name == "copy_" and not all(isinstance(tensor, OnDevice) for tensor in args[:2]):
                return copy_across(*args, **kwargs)
            return compute(function, name, args, kwargs)


def compute(function: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run or capture an operation on tensors of one device."""
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    inputs = [one for one in tensors if isinstance(one, OnDevice)]
    if len({one.device for one in inputs}) > 1 or any(one.dim() for one in tensors if not isinstance(one, OnDevice)):
        raise Misuse(f"{name} takes tensors of several devices: {[one.device for one in tensors]}")
    device = inputs[0].device
    stream = CUDA.submit_to(device, name)
    indices = tree_leaves(args[1:]) if name.startswith("index") else []
    if name in WAITS or any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices):
        stream.access(name, [one.memory for one in inputs], ())
        CUDA.wait(name, device, stream.clock)
    values = tree_map(unwrapped, (args, kwargs))
    if name == "_assert_async":
        if not values[0][0]:
            CUDA.failed.add(device.index)
        return None
    named = zip(function._schema.arguments, args, strict=False)  # an argument that is written to is positional or `out`
    written = [one for argument, one in named if argument.alias_info is not None and argument.alias_info.is_write]
    written += [kwargs["out"]] if "out" in kwargs else []
    return submit(name, stream, lambda: function(*values[0], **values[1]), inputs, written)


def submit(name: str, stream: Stream, run: Callable[[], Any], inputs: list[OnDevice], written: list[OnDevice]) -> Any:
    """Run or capture an operation, and return its result on the stream's device."""
    by_value = {id(one.value): one for one in inputs}
    owners = {one.value.untyped_storage()._cdata: one.owner for one in inputs}
    reads, writes = [one.memory for one in inputs], [one.memory for one in written]
    if name in MATMULS:
        writes.append(stream.cublas_workspace())
    if stream.graph is not None and written:
        stream.graph.steps.append(lambda stream: (stream.access(name, reads, writes), run()))
        return written[0]
    result = run()
    new = [one for one in tensors_of(result) if one.untyped_storage()._cdata not in owners]
    for value in new:
        owners[value.untyped_storage()._cdata] = Owner(stream.allocate(value.untyped_storage()))
    allocated = [owners[value.untyped_storage()._cdata].memory for value in new]
    if name in EMPTY:
        for memory in allocated:
            memory.scramble()
    elif stream.graph is not None and new:
        places = [at for at, one in enumerate(tensors_of(result)) if any(one is value for value in new)]
        undefine(*new)

        def again(stream: Stream) -> None:
            stream.access(name, reads, writes + allocated)
            for at, value in zip(places, new, strict=True):
                value.copy_(tensors_of(run())[at])

        stream.graph.steps.append(again)
    elif new or written:
        stream.access(name, reads, writes + allocated)

    def wrapped(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        return by_value[id(one)] if id(one) in by_value else OnDevice(one, owners[one.untyped_storage()._cdata])

    # a view inherits whether its base is an inference tensor
    with contextlib.nullcontext() if new or written else torch.inference_mode(inputs[0].is_inference()):
        return tree_map(wrapped, result)


def launch(kernel: str, tensors: list[OnDevice], run: Callable[[], object]) -> None:
    """Run or capture a kernel."""
    current = indexed("cuda")
    if {tensor.device for tensor in tensors} != {current}:
        devices = [str(tensor.device) for tensor in tensors]
        raise Misuse(f"{kernel} is launched on {current} with tensors of {', '.join(devices)}")
    memories = list(dict.fromkeys(tensor.memory for tensor in tensors))

    def step(stream: Stream) -> None:
        before = [memory.bytes().clone() for memory in memories]
        run()
        changed = zip(memories, before, strict=True)
        stream.access(kernel, memories, [one for one, old in changed if not torch.equal(one.bytes(), old)])

    stream = CUDA.submit_to(current, kernel)
    step(stream) if stream.graph is None else stream.graph.steps.append(step)


def copy_across(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between the host and a device."""
    to_device = isinstance(target, OnDevice)
    host, on_device = (source, target) if to_device else (target, source)
    stream = CUDA.submit_to(on_device.device, "a copy")
    if stream.graph is not None:
        raise Misuse("a copy to or from the host within a capture would use the same host memory in every replay")
    values = unwrapped(source).clone()
    access = stream.access("a copy", [] if to_device else [source.memory], [target.memory] if to_device else [])
    asynchronous = non_blocking and host.untyped_storage().data_ptr() in CUDA.pinned

    def unchanged() -> None:
        if not torch.equal(source.nan_to_num(), values.nan_to_num()):
            raise Misuse("pinned memory was written to while a copy from it was in progress")

    if not asynchronous:
        CUDA.wait("a blocking copy", on_device.device, stream.clock)
        unwrapped(target).copy_(values)
    elif to_device:
        target.value.copy_(values)
        CUDA.copies.append(HostCopy(access, unchanged))
    else:
        undefine(target)
        CUDA.copies.append(HostCopy(access, lambda: target.copy_(values)))
    return target


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


def unwrapped(value: Any) -> Any:
    if isinstance(value, TensorDescriptor):
        return TensorDescriptor(unwrapped(value.base), value.shape, value.strides, value.block_shape, value.padding)
    return value.value if isinstance(value, OnDevice) else value


def tensors_of(result: Any) -> list[Tensor]:
    return [one for one in tree_leaves(result) if isinstance(one, Tensor)]


def undefine(*tensors: Tensor) -> None:
    """Fill tensors with NaN, except those of integers, which may be indices."""
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.itemsize > 1:
            tensor.fill_(float("nan"))


def pin(tensor: Tensor) -> Tensor:
    CUDA.pinned[tensor.untyped_storage().data_ptr()] = tensor
    return tensor


class Placement(TorchFunctionMode):
    """Creates tensors on the named device and moves tensors to it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name == "pin_memory":
            return pin(args[0].clone())
        if kwargs.pop("pin_memory", False):
            pinned = pin(function(*args, **kwargs))
            if name in EMPTY:
                pinned.untyped_storage().fill_(0xFF)
            return pinned
        if name in ("cpu", "cuda", "to"):
            return self.move(function, *args, **kwargs)
        if name in ("item", "numpy", "tolist") and isinstance(args[0], OnDevice):
            return self.read(function, args[0])
        device = indexed(kwargs.get("device"))
        if device is None or device.type != "cuda":
            return function(*args, **kwargs)
        kwargs["device"] = "cpu"
        with CUDA.lock:
            stream = CUDA.submit_to(device, name)
            if name == "tensor":
                CUDA.wait("a tensor of host values", device, stream.clock)
            return submit(name, stream, lambda: function(*map(unwrapped, args), **kwargs), [], [])

    def read(self, function: Any, tensor: OnDevice) -> Any:
        """Run Tensor.item or .tolist."""
        if function is Tensor.numpy:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        with CUDA.lock:
            stream = CUDA.submit_to(tensor.device, function.__name__)
            stream.access(function.__name__, [tensor.memory], ())
            CUDA.wait(function.__name__, tensor.device, stream.clock)
            return function(tensor.value)

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
        non_blocking = kwargs.get("non_blocking", True in args[:3])
        with self:
            target = torch.empty(
                tensor.shape, dtype=tensor.dtype, device=device, pin_memory=non_blocking and device.type == "cpu"
            )
        return target.copy_(tensor, non_blocking=non_blocking)


def in_thread(run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """Return Thread.run with a mode of its own, since modes belong to a thread."""

    def placed(thread: threading.Thread) -> None:
        with Placement():
            run(thread)

    return placed


def synchronize(device: Any = None) -> None:
    CUDA.wait("synchronize", indexed("cuda" if device is None else device))


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Replace torch.cuda by the stand-in."""
    replaced = {
        "is_available": lambda: True,
        "empty_cache": lambda: None,
        "device_count": lambda: DEVICES,
        "current_device": lambda: CUDA.thread.device,
        "set_device": lambda device: setattr(CUDA.thread, "device", indexed(device).index),
        "device": current_device,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: SimpleNamespace(multi_processor_count=3),
        "mem_get_info": lambda device=None: (2**34, 2**34),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "synchronize": synchronize,
        "set_sync_debug_mode": lambda mode: setattr(CUDA, "may_wait", mode == "default"),
        "Event": Event,
        "Stream": Stream,
        "current_stream": current_stream,
        "stream": on_stream,
        "CUDAGraph": CUDAGraph,
        "graph": capture,
        "graph_pool_handle": Pool,
        "is_current_stream_capturing": lambda: CUDA.thread.graph is not None,
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

        with CUDA.lock:
            launch(kernel.__name__, tensors, step)

    def exact(*args: Any, dtype: Any, **kwargs: Any) -> Any:
        return matmul(*args, dtype=np.float64, **kwargs).astype(dtype)

    with pytest.MonkeyPatch.context() as patch, Placement():
        for name, value in replaced.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(threading.Thread, "run", in_thread(threading.Thread.run))
        patch.setattr(InterpretedFunction, "run", run)
        # tl.dot in fp64, exact for fp16, so that the bits of a row do not depend on its position in a tile
        patch.setattr(np, "matmul", exact)
        # Module.to replaces its parameters, not only their data, since OnDevice is another class
        patch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
        CUDA.__init__()
        for index in range(DEVICES):
            Stream(index)
        yield
