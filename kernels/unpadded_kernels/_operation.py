"""Operations of PyTorch's dispatcher, each made of its reference and of bodies for single devices.

`torch.library.custom_op` gives the same, but the first call of one on a CPU imports torch._dynamo, which took 1.3 s and
80 MB, and every call takes longer (3.7 us instead of 2.0, EPYC, 2026-11).
"""

from collections.abc import Callable
from typing import Any

import torch

from unpadded_kernels._triton import device_guard

LIBRARY = torch.library.Library("unpadded", "FRAGMENT")


def operation(
    reference: Callable[..., Any],
    *,
    fake: Callable[..., Any] | None = None,
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    mutates_args: tuple[str, ...] = (),
    schema: str = "",
) -> torch._ops.OpOverload:
    """Return the operation that a function named <operation>_reference defines and computes where there is no body.

    fake: returns results of the right shape and dtype without reading values, by default the reference. cuda: launches
    a kernel. mutates_args: arguments that change; the name then ends in an underscore. schema: by default the
    reference's.
    """
    name = reference.__name__.removesuffix("_reference") + ("_" if mutates_args else "")
    LIBRARY.define(name + (schema or torch.library.infer_schema(reference, mutates_args=mutates_args)))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if cpu is not None:
        LIBRARY.impl(name, cpu, "CPU")
    if cuda is not None:
        LIBRARY.impl(name, device_guard(cuda), "CUDA")
    torch.library.register_fake(f"unpadded::{name}", fake or reference, lib=LIBRARY)
    found: torch._ops.OpOverload = getattr(torch.ops.unpadded, name).default
    return found
