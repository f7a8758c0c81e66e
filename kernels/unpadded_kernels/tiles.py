"""Tile sizes of the kernels: (op, dtype, dimensions, GPU generation) -> block sizes and launch options.

Compiled for each generation without spills (tests/test_compile.py), but not timed on a GPU. Nothing here is keyed by
the number of tokens, so a row's bits never depend on its batch.
"""

from dataclasses import dataclass
from typing import Any

import torch

# Major compute capability -> generation; all others use the tiles of sm_80, which need the least shared memory.
_GENERATION = {8: 80, 9: 90, 10: 100}

# Elements of a row per warp, in kernels with one program per row. A row of up to 1024 elements then needs no barrier:
# add_layer_norm with hidden = 768 issues for 87 cycles per row, against 202 with 256 elements per warp, while an H200's
# memory needs 248 (SASS of sm_90, triton 3.9).
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


# (is the dtype fp32, head_dim rounded up to a power of two of at least 32, generation)
ATTENTION = {
    (False, 32, 80): Tile(block_m=128, block_n=64, num_warps=8, num_stages=3),
    (False, 64, 80): Tile(block_m=128, block_n=64, num_warps=8, num_stages=2),
    (False, 128, 80): Tile(block_m=128, block_n=32, num_warps=8, num_stages=2),
    (False, 32, 90): Tile(block_m=128, block_n=64, num_warps=4, num_stages=3, tma=True),
    (False, 64, 90): Tile(block_m=128, block_n=64, num_warps=4, num_stages=3, tma=True),
    (False, 128, 90): Tile(block_m=128, block_n=64, num_warps=8, num_stages=2, tma=True),
    (False, 32, 100): Tile(block_m=128, block_n=64, num_warps=8, num_stages=3, tma=True),
    (False, 64, 100): Tile(block_m=128, block_n=64, num_warps=8, num_stages=3, tma=True),
    (False, 128, 100): Tile(block_m=128, block_n=64, num_warps=8, num_stages=2, tma=True),
    (True, 32, 80): Tile(block_m=64, block_n=32, num_warps=8, num_stages=2),
    (True, 64, 80): Tile(block_m=32, block_n=16, num_warps=8, num_stages=2),
    (True, 128, 80): Tile(block_m=16, block_n=16, num_warps=8, num_stages=2),
}

# (is the dtype fp32, epilogue, generation); a gated tile has block_n columns of gate and as many of up
LINEAR = {
    (False, "nothing", 80): Tile(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=3),
    (False, "activation", 80): Tile(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=3),
    (False, "gated", 80): Tile(block_m=128, block_n=64, block_k=32, num_warps=8, num_stages=3),
    (False, "nothing", 90): Tile(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3, tma=True),
    (False, "activation", 90): Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4, tma=True),
    (False, "gated", 90): Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3, tma=True),
    (False, "nothing", 100): Tile(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3, tma=True),
    (False, "activation", 100): Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4, tma=True),
    (False, "gated", 100): Tile(block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=4, tma=True),
    (True, "nothing", 80): Tile(block_m=64, block_n=64, block_k=16, num_warps=8, num_stages=2),
    (True, "activation", 80): Tile(block_m=64, block_n=64, block_k=16, num_warps=8, num_stages=2),
    (True, "gated", 80): Tile(block_m=64, block_n=32, block_k=16, num_warps=8, num_stages=2),
}

# The same for e4m3 operands: (epilogue, generation). sm_80 has no e4m3; its entries are for sm_89.
LINEAR_FP8 = {
    ("nothing", 80): Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    ("activation", 80): Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    ("gated", 80): Tile(block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=3),
    ("nothing", 90): Tile(block_m=128, block_n=256, block_k=128, num_warps=8, num_stages=3, tma=True),
    ("activation", 90): Tile(block_m=128, block_n=128, block_k=128, num_warps=8, num_stages=4, tma=True),
    ("gated", 90): Tile(block_m=128, block_n=128, block_k=128, num_warps=8, num_stages=3, tma=True),
    ("nothing", 100): Tile(block_m=128, block_n=128, block_k=128, num_warps=8, num_stages=4, tma=True),
    ("activation", 100): Tile(block_m=128, block_n=128, block_k=128, num_warps=8, num_stages=4, tma=True),
    ("gated", 100): Tile(block_m=128, block_n=64, block_k=128, num_warps=8, num_stages=4, tma=True),
}


def generation(device: torch.device) -> int:
    if device.type != "cuda":
        return 80  # the interpreter
    return _GENERATION.get(torch.cuda.get_device_capability(device)[0], 80)


def row_launch(block_h: int) -> dict[str, Any]:
    """Return the launch options of a kernel with one program per row of block_h elements, a power of two."""
    num_warps = min(max(block_h // _ROW_ELEMENTS_PER_WARP, 1), _MAX_ROW_WARPS)
    return {"num_warps": num_warps, "enable_fp_fusion": True}


def hidden_launch(hidden: int) -> dict[str, Any]:
    """Return the constants and launch options of a kernel with one program per row of `hidden` elements."""
    block_h = 1 << (hidden - 1).bit_length()
    return {"HIDDEN": hidden, "BLOCK_H": block_h, **row_launch(block_h)}


def attention_tile(dtype: torch.dtype, head_dim: int, generation: int) -> Tile:
    fp32 = dtype == torch.float32
    block_d = max(32, 1 << (head_dim - 1).bit_length())
    if (fp32, block_d, 80) not in ATTENTION:
        raise ValueError(f"attention has no kernel for head_dim {head_dim}: use one up to 128")
    return ATTENTION[fp32, block_d, 80 if fp32 else generation]


def attention_block_m(dtype: torch.dtype, head_dim: int, device: torch.device) -> int:
    """Return the queries per tile, the same for every generation: the host makes the tile map by it."""
    if device.type == "cpu":
        head_dim = min(head_dim, 128)  # the largest of the kernels' tiles; the CPU body takes any head_dim
    return attention_tile(dtype, head_dim, generation(device)).block_m


def linear_tile(dtype: torch.dtype, epilogue: str, generation: int) -> Tile:
    if dtype == torch.float8_e4m3fn:
        return LINEAR_FP8[epilogue, generation]
    fp32 = dtype == torch.float32
    return LINEAR[fp32, epilogue, 80 if fp32 else generation]


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter's programs run one after another
    return torch.cuda.get_device_properties(device).multi_processor_count
