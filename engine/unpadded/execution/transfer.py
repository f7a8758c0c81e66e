"""Copies between the host and a device: one copy per batch in each direction."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from unpadded.model.batch import PackedBatch

Wait: TypeAlias = Callable[[], np.ndarray]  # blocks until the rows that a device computes are on the host
HostCopy: TypeAlias = tuple[Tensor, torch.cuda.Event | None]  # recorded when the copy is complete


def to_words(batch: PackedBatch) -> Tensor:
    """Copy a batch's tensors on the host into new pinned memory, as 32-bit words.

    torch does not use the memory again before copies from it are complete. Each tensor is aligned to 16 bytes, for the
    widest loads.
    """
    pieces: list[np.ndarray] = []
    for tensor in vars(batch).values():
        if isinstance(tensor, Tensor):
            part = tensor.numpy().reshape(-1).view(np.int32)
            pieces += [part, np.zeros(-len(part) % 4, np.int32)]
    words = torch.empty(sum(map(len, pieces)), dtype=torch.int32, pin_memory=True)
    np.concatenate(pieces, out=words.numpy())
    return words


def from_words(words: Tensor, like: PackedBatch) -> PackedBatch:
    """Return a batch whose tensors are views of `words`, which `to_words` made of a batch with the shapes of `like`."""
    tensors: dict[str, Any] = {}
    start = 0
    for name, tensor in vars(like).items():
        if isinstance(tensor, Tensor):
            size = math.prod(tensor.shape)
            tensors[name] = words[start : start + size].view(tensor.dtype).view(tensor.shape)
            start += size + -size % 4
    return replace(like, **tensors)


def copy_to_host(rows: Tensor) -> HostCopy:
    """Start copying rows from a device; does not wait."""
    if not rows.is_cuda:
        return rows, None
    pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    pinned.copy_(rows, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)  # its waiting thread leaves the core to others
    copied.record()
    return pinned, copied


def wait_for(copies: list[HostCopy]) -> np.ndarray:
    """Wait until the copies are complete and concatenate them, outside of pinned memory."""
    for _, copied in copies:
        if copied is not None:
            copied.synchronize()
    return np.concatenate([rows.numpy() for rows, _ in copies])


def wait_for_terms(copies: list[HostCopy]) -> np.ndarray:
    """Wait for the copies; return indices, [n] int32, and values, [n] fp32, of what is not zero in each row: [rows]."""
    rows = wait_for(copies)
    terms = np.empty(len(rows), object)
    for index, row in enumerate(rows):
        ids = np.flatnonzero(row != 0)  # of a bool array, which takes less time
        terms[index] = ids.astype(np.int32), row[ids]
    return terms
