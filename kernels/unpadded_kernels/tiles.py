"""Tile sizes of the kernels: (op, dtype, dimensions, GPU generation) -> what a program covers and how it is launched.

Compiled for each generation without spills (tests/test_compile.py), not yet timed: no GPU has been at hand. Nothing
here is keyed by the number of tokens, so a row's bits never depend on its batch.
"""

from dataclasses import dataclass
from typing import Any

import torch

# Compute capability major -> the generation whose tiles it runs; others run sm_80's, which need least shared memory.
_GENERATION = {8: 80, 9: 90, 10: 100}

# Row kernels: elements of a row that one warp holds. Up to 1024 a row needs no barrier and its overhead is paid once:
# add_layer_norm of 768 issues for 87 cycles a row then, for 202 with 256 a warp, where an H200's memory takes 248 (SASS
# of sm_90, triton 3.9).
_ROW_ELEMENTS_PER_WARP = 1024
_MAX_ROW_WARPS = 8


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What one program covers. block_k: the step along a product's inner dimension; attention has none.

    overlap: in full attention, whether a block's values are added up during the softmax of the next block, where
    tensor cores work beside the rest (FlashAttention-3, arXiv 2407.08608, 3.2). at_once: programs of a persistent
    product that share a multiprocessor; of two, one may multiply while the other's tile is activated and stored.
    """

    block_m: int
    block_n: int
    block_k: int = 0
    num_warps: int
    num_stages: int
    tma: bool = False  # whether loads go through tensor descriptors
    overlap: bool = False
    at_once: int = 1

    @property
    def launch(self) -> dict[str, Any]:
        # Said outright, since Triton 3.10 turns its default off and with it every bit of the results.
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# (is the dtype fp32, head_dim rounded up to a power of two, generation)
ATTENTION = {
    (False, 16, 80): Tile(block_m=128, block_n=64, num_warps=8, num_stages=3),
    (False, 32, 80): Tile(block_m=128, block_n=64, num_warps=8, num_stages=3),
    (False, 64, 80): Tile(block_m=128, block_n=64, num_warps=8, num_stages=2),
    (False, 128, 80): Tile(block_m=128, block_n=32, num_warps=8, num_stages=2),
    (False, 16, 90): Tile(block_m=128, block_n=64, num_warps=4, num_stages=3, tma=True, overlap=True),
    (False, 32, 90): Tile(block_m=128, block_n=64, num_warps=4, num_stages=3, tma=True, overlap=True),
    (False, 64, 90): Tile(block_m=128, block_n=64, num_warps=4, num_stages=3, tma=True, overlap=True),
    (False, 128, 90): Tile(block_m=128, block_n=64, num_warps=8, num_stages=2, tma=True, overlap=True),
    (False, 16, 100): Tile(block_m=128, block_n=64, num_warps=8, num_stages=3, tma=True),
    (False, 32, 100): Tile(block_m=128, block_n=64, num_warps=8, num_stages=3, tma=True),
    (False, 64, 100): Tile(block_m=128, block_n=64, num_warps=8, num_stages=3, tma=True),
    (False, 128, 100): Tile(block_m=128, block_n=64, num_warps=8, num_stages=2, tma=True),
    (True, 16, 80): Tile(block_m=64, block_n=32, num_warps=8, num_stages=2),
    (True, 32, 80): Tile(block_m=64, block_n=32, num_warps=8, num_stages=2),
    (True, 64, 80): Tile(block_m=32, block_n=16, num_warps=8, num_stages=2),
    (True, 128, 80): Tile(block_m=16, block_n=16, num_warps=8, num_stages=2),
}

# (is the dtype fp32, what follows in the same pass, generation); a gated tile holds block_n columns of both products
LINEAR = {
    (False, "nothing", 80): Tile(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=3),
    (False, "activation", 80): Tile(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=3),
    (False, "gated", 80): Tile(block_m=128, block_n=64, block_k=32, num_warps=8, num_stages=3),
    (False, "rotary", 80): Tile(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=3),
    (False, "nothing", 90): Tile(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3, tma=True),
    (False, "activation", 90): Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4, tma=True),
    (False, "gated", 90): Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3, tma=True),
    (False, "rotary", 90): Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4, tma=True),
    (False, "nothing", 100): Tile(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3, tma=True),
    (False, "activation", 100): Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4, tma=True),
    (False, "gated", 100): Tile(block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=4, tma=True),
    (False, "rotary", 100): Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4, tma=True),
    (True, "nothing", 80): Tile(block_m=64, block_n=64, block_k=16, num_warps=8, num_stages=2),
    (True, "activation", 80): Tile(block_m=64, block_n=64, block_k=16, num_warps=8, num_stages=2),
    (True, "gated", 80): Tile(block_m=64, block_n=32, block_k=16, num_warps=8, num_stages=2),
    (True, "rotary", 80): Tile(block_m=64, block_n=128, block_k=16, num_warps=8, num_stages=2),
}

# The same of e4m3 operands: (what follows in the same pass, generation). sm_80 has no e4m3; sm_89 runs its tiles.
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

# The same of a product grouped by expert, whose rows no descriptor gathers: (is the dtype fp32, gated, generation)
EXPERTS = {
    (False, False, 80): Tile(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=3),
    (False, True, 80): Tile(block_m=128, block_n=64, block_k=32, num_warps=8, num_stages=3),
    (False, False, 90): Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    (False, True, 90): Tile(block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=3),
    (False, False, 100): Tile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    (False, True, 100): Tile(block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=3),
    (True, False, 80): Tile(block_m=64, block_n=64, block_k=16, num_warps=8, num_stages=2),
    (True, True, 80): Tile(block_m=64, block_n=32, block_k=16, num_warps=8, num_stages=2),
}

# Generations where linear_activation is one kernel, not the library's product and the activation. None is measured yet.
FUSED_ACTIVATION: frozenset[int] = frozenset()
# The same of linear_rotary: one kernel, not the library's product and the rotation.
FUSED_ROTARY: frozenset[int] = frozenset()


def generation(device: torch.device) -> int:
    if device.type != "cuda":
        return 80  # the interpreter
    return _GENERATION.get(torch.cuda.get_device_capability(device)[0], 80)


def row_launch(block_h: int) -> dict[str, Any]:
    """How a kernel of one row per program is launched. block_h: elements of the row, a power of two."""
    num_warps = min(max(block_h // _ROW_ELEMENTS_PER_WARP, 1), _MAX_ROW_WARPS)
    return {"num_warps": num_warps, "enable_fp_fusion": True}


def attention_tile(dtype: torch.dtype, head_dim: int, generation: int) -> Tile:
    fp32 = dtype == torch.float32
    block_d = max(16, 1 << (head_dim - 1).bit_length())
    if (fp32, block_d, 80) not in ATTENTION:
        raise ValueError(f"attention has no kernel for head_dim {head_dim}: use one up to 128")
    return ATTENTION[fp32, block_d, 80 if fp32 else generation]


def attention_block_m(dtype: torch.dtype, head_dim: int, device: torch.device) -> int:
    """Return the queries per tile, the same for every generation: the host makes the tile map by it."""
    if device.type == "cpu":
        head_dim = min(head_dim, 128)  # the largest of the kernels' tiles; the CPU body takes any head_dim
    return attention_tile(dtype, head_dim, generation(device)).block_m


def linear_tile(dtype: torch.dtype, follows: str, generation: int) -> Tile:
    if dtype == torch.float8_e4m3fn:
        return LINEAR_FP8[follows, generation]
    fp32 = dtype == torch.float32
    return LINEAR[fp32, follows, 80 if fp32 else generation]


def expert_tile(dtype: torch.dtype, gated: bool, generation: int) -> Tile:
    fp32 = dtype == torch.float32
    return EXPERTS[fp32, gated, 80 if fp32 else generation]


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter's programs run one after another
    return torch.cuda.get_device_properties(device).multi_processor_count
