"""Tile sizes of the kernels: (op, dtype, dimensions, GPU generation) -> block sizes and launch options.

Compiled for each generation without spills (tests/test_compile.py), but not timed on a GPU. Nothing here is keyed by
the number of tokens, so a row's bits never depend on its batch.
"""

from dataclasses import dataclass
from typing import Any

import torch

# Elements of a row per warp, in kernels with one program per row. A row of up to 1024 elements then needs no barrier.
_ROW_ELEMENTS_PER_WARP = 1024
_MAX_ROW_WARPS = 8


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Block sizes and launch options of one kernel."""

    block_m: int
    block_n: int
    block_k: int = 0  # step along a matmul's inner dimension; attention has none
    num_warps: int
    num_stages: int
    tma: bool = False  # whether loads go through tensor descriptors

    @property
    def launch(self) -> dict[str, Any]:
        """The block sizes as a kernel's constants, and the launch options."""
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}
        if self.block_k:
            blocks["BLOCK_K"] = self.block_k
        # explicit, because Triton 3.10 changes the default, which would change the results' bits
        return {**blocks, "num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# (bytes per element, head_dim rounded up to a power of two of at least 32, generation)
ATTENTION = {
    (2, 32, 80): Tile(block_m=128, block_n=64, num_warps=8, num_stages=3),
    (2, 64, 80): Tile(block_m=128, block_n=64, num_warps=8, num_stages=2),
    (2, 128, 80): Tile(block_m=128, block_n=32, num_warps=8, num_stages=2),
    (2, 32, 90): Tile(block_m=128, block_n=64, num_warps=4, num_stages=3, tma=True),
    (2, 64, 90): Tile(block_m=128, block_n=64, num_warps=4, num_stages=3, tma=True),
    (2, 128, 90): Tile(block_m=128, block_n=64, num_warps=8, num_stages=2, tma=True),
    (2, 32, 100): Tile(block_m=128, block_n=64, num_warps=8, num_stages=3, tma=True),
    (2, 64, 100): Tile(block_m=128, block_n=64, num_warps=8, num_stages=3, tma=True),
    (2, 128, 100): Tile(block_m=128, block_n=64, num_warps=8, num_stages=2, tma=True),
    (4, 32, 80): Tile(block_m=64, block_n=32, num_warps=8, num_stages=2),
    (4, 64, 80): Tile(block_m=32, block_n=16, num_warps=8, num_stages=2),
    (4, 128, 80): Tile(block_m=16, block_n=16, num_warps=8, num_stages=2),
}

# (bytes per element, epilogue, generation); a gated tile has block_n columns of gate and as many of up
LINEAR = {
    (2, "nothing", 80): Tile(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=3),
    (2, "activation", 80): Tile(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=3),
    (2, "gated", 80): Tile(block_m=128, block_n=64, block_k=32, num_warps=8, num_stages=3),
    (2, "nothing", 90): Tile(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3, tma=True),
    (2, "activation", 90): Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4, tma=True),
    (2, "gated", 90): Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3, tma=True),
    (2, "nothing", 100): Tile(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3, tma=True),
    (2, "activation", 100): Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4, tma=True),
    (2, "gated", 100): Tile(block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=4, tma=True),
    (4, "nothing", 80): Tile(block_m=64, block_n=64, block_k=16, num_warps=8, num_stages=2),
    (4, "activation", 80): Tile(block_m=64, block_n=64, block_k=16, num_warps=8, num_stages=2),
    (4, "gated", 80): Tile(block_m=64, block_n=32, block_k=16, num_warps=8, num_stages=2),
}


def generation(device: torch.device) -> int:
    """Return 90 or 100, else 80, whose tiles need the least shared memory."""
    if device.type != "cuda":
        return 80  # the interpreter
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


def row_launch(block_h: int) -> dict[str, Any]:
    """Return the launch options of a kernel with one program per row of block_h elements, a power of two."""
    num_warps = min(max(block_h // _ROW_ELEMENTS_PER_WARP, 1), _MAX_ROW_WARPS)
    return {"num_warps": num_warps, "enable_fp_fusion": True}


def hidden_launch(hidden: int) -> dict[str, Any]:
    """Return the constants and launch options of a kernel with one program per row of `hidden` elements."""
    block_h = 1 << (hidden - 1).bit_length()
    return {"HIDDEN": hidden, "BLOCK_H": block_h, **row_launch(block_h)}


def attention_tile(dtype: torch.dtype, head_dim: int, generation: int) -> Tile:
    block_d = max(32, 1 << (head_dim - 1).bit_length())
    if block_d > 128:
        raise ValueError(f"attention has no kernel for head_dim {head_dim}: use one up to 128")
    itemsize = min(dtype.itemsize, 4)  # fp64 has only a CPU body
    return ATTENTION[itemsize, block_d, 80 if itemsize == 4 else generation]


def attention_block_m(dtype: torch.dtype, head_dim: int, device: torch.device) -> int:
    """Return the queries per tile, the same for every generation: the host makes the tile map by it."""
    if device.type == "cpu":
        head_dim = min(head_dim, 128)  # the largest of the kernels' tiles; the CPU body takes any head_dim
    return attention_tile(dtype, head_dim, generation(device)).block_m


def linear_tile(dtype: torch.dtype, epilogue: str, generation: int) -> Tile:
    return LINEAR[dtype.itemsize, epilogue, 80 if dtype == torch.float32 else generation]


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter's programs run one after another
    return torch.cuda.get_device_properties(device).multi_processor_count
