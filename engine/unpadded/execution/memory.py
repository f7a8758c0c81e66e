"""The largest batch that fits a device's memory: the peak activation bytes per token, and the free bytes.

A layer needs most memory in the MLP, or in attention, if a library takes q, k and v as separate tensors:

    held  = x and residual, which are one tensor with post-norm
    bytes = itemsize * max(held + up_rows + intermediate, x + qkv + its copy + attended + its copy) + rotary tables
"""

import re
from pathlib import Path

import torch

from unpadded.checkpoint.spec import EncoderSpec

SHARE = 0.5  # of the free memory; the rest is for workspaces of libraries, captured graphs and fragmentation
MEMINFO = Path("/proc/meminfo")


def max_batch_tokens(spec: EncoderSpec, itemsize: int, device: torch.device) -> int | None:
    """Return how many tokens have activations that fit half of the free memory, or None if that is unknown.

    itemsize: bytes per activation.
    """
    free = free_bytes(device)
    return None if free is None else max(1, int(SHARE * free) // bytes_per_token(spec, itemsize))


def bytes_per_token(spec: EncoderSpec, itemsize: int) -> int:
    """Return the peak activation bytes per token."""
    mlp = spec.up_rows + spec.intermediate
    if spec.experts is not None:  # a token is copied for each of its experts, and their outputs are summed in fp32
        mlp = spec.experts.top_k * (mlp + 2 * spec.hidden) + 2 * spec.hidden * 4 // itemsize
    held = (2 if spec.prenorm else 1) * spec.hidden
    attention = (10 if spec.prenorm else 9) * spec.hidden
    tables = 4 * spec.head_dim * len(spec.rotary_embeddings)
    return itemsize * max(held + mlp, attention) + tables


def free_bytes(device: torch.device) -> int | None:
    """Return the device's free memory, plus what torch's allocator has cached, or None if that is unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    found = re.search(r"MemAvailable: +(\d+) kB", MEMINFO.read_text()) if MEMINFO.exists() else None
    return int(found[1]) * 1024 if found else None
