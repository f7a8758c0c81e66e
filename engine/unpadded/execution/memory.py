"""How many tokens of a batch fit a device: what the encoder holds for each of them, and what is free.

A layer is at its fullest in the MLP, between its two products, or where attention's library wants q, k and v apart:

    held  = attended, its projection, x, residual; with a pre-norm the x and the residual of the half before, too
    bytes = itemsize * max(held + up_rows + intermediate, x + qkv + its copy + attended + its copy) + rotary tables
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from unpadded.checkpoint.spec import EncoderSpec

SHARE = 0.5  # of what is free; the rest is for workspaces of libraries, captured graphs and fragments
MEMINFO = Path("/proc/meminfo")


def max_batch_tokens(spec: EncoderSpec, itemsize: int, device: torch.device) -> int | None:
    """Tokens whose activations, of `itemsize` bytes a value, take half of what is free; None where that is unknown."""
    free = free_bytes(device)
    return None if free is None else max(1, int(SHARE * free) // bytes_per_token(spec, itemsize))


def bytes_per_token(spec: EncoderSpec, itemsize: int) -> int:
    """Of all that the encoder holds for a token where it holds most."""
    mlp = spec.up_rows + spec.intermediate
    if spec.experts is not None:  # a token is copied for each of its experts, and their sum is in fp32
        mlp = spec.experts.top_k * (mlp + 2 * spec.hidden) + 2 * spec.hidden * 4 // itemsize
    held = (6 if spec.prenorm else 4) * spec.hidden
    attention = (10 if spec.prenorm else 9) * spec.hidden
    tables = 4 * spec.head_dim * len(spec.rotary_embeddings)
    return itemsize * max(held + mlp, attention) + tables


def free_bytes(device: torch.device) -> int | None:
    """What this process may still take of the device, with what torch has put by."""
    if device.type == "cuda":
        put_by = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + put_by
    found = re.search(r"MemAvailable: +(\d+) kB", MEMINFO.read_text()) if MEMINFO.exists() else None
    return int(found[1]) * 1024 if found else None
