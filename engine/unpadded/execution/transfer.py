"""Copies between the host and a device: one copy per batch in each direction."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded.model.batch import PackedBatch

TENSORS = ("input_ids", "positions", "token_types", "cu_seqlens", "inv_freq", "tile_map")  # of a PackedBatch
HostCopy: TypeAlias = tuple[Tensor, torch.cuda.Event | None]  # recorded when the copy is complete


def to_words(batch: PackedBatch) -> Tensor:
    """Concatenate a batch's tensors as 32-bit words. Each is aligned to 16 bytes, for the widest loads."""
    parts = [getattr(batch, name).view(torch.int32).flatten() for name in TENSORS if getattr(batch, name) is not None]
    return torch.cat([F.pad(part, (0, -len(part) % 4)) for part in parts])


def from_words(words: Tensor, like: PackedBatch) -> PackedBatch:
    """Return a batch whose tensors are views of `words`, which `to_words` made of a batch with the shapes of `like`."""
    tensors: dict[str, Any] = {}
    start = 0
    for name in TENSORS:
        tensor = getattr(like, name)
        if tensor is not None:
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
    copied = torch.cuda.Event()
    copied.record()
    return pinned, copied


def wait_for(copies: list[HostCopy]) -> np.ndarray:
    """Wait until the copies are complete and concatenate them."""
    for _, copied in copies:
        if copied is not None:
            copied.synchronize()
    parts = [rows.numpy() for rows, _ in copies]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
