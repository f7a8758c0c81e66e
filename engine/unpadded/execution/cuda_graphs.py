"""CUDA graphs for small batches, whose kernels are shorter than their launches.

A graph is captured once a bucket of tokens and texts and replayed on new contents: ids, positions, cu_seqlens and the
tile map are read from one buffer that is overwritten, so nothing of a batch is baked in. A batch is filled up to its
bucket with tokens of no text, and with texts of no tokens; the rows of the first are computed and never read, and for
the second attention and pooling start programs that end at once, which a bucket of few texts spares a query.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded.model.batch import PackedBatch

# Of tokens. To launch a forward pass of 12 layers op by op takes a host 2.1 ms, as long as a GPU needs for 4300 tokens
# at 2 million a second (EPYC, torch 2.11, triton 3.6, 2026-11, without the driver's part; no GPU has been at hand).
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096)
TEXTS = (1, 8, 64, 256)


class Bucket(NamedTuple):
    """What a captured pass has room for."""

    tokens: int
    texts: int


def bucket_of(batch: PackedBatch) -> Bucket | None:
    """The smallest bucket that holds a batch.

    None where none does, where a text has its own rotary, or where tokens have types.
    """
    scaled = batch.inv_freq is not None and batch.inv_freq.shape[1] > 1
    if scaled or batch.token_types is not None:
        return None
    tokens = next((most for most in TOKENS if len(batch.input_ids) <= most), None)
    texts = next((most for most in TEXTS if len(batch.lengths) <= most), None)
    return None if tokens is None or texts is None else Bucket(tokens, texts)


def fill(batch: PackedBatch, bucket: Bucket, block_m: int) -> PackedBatch:
    """The batch with as many tokens and texts as the bucket, and all the tiles of block_m queries that they can have.

    What is added belongs to no text.
    """
    total_tokens = len(batch.input_ids)
    tile_map = batch.tile_map
    if tile_map is not None:
        tiles = bucket.tokens // block_m + bucket.texts
        tile_map = F.pad(tile_map, (0, 0, 0, tiles - len(tile_map)))  # of texts of no tokens
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, bucket.tokens - total_tokens)),
        positions=F.pad(batch.positions, (0, bucket.tokens - total_tokens)),
        cu_seqlens=F.pad(batch.cu_seqlens, (0, bucket.texts - len(batch.lengths)), value=total_tokens),
        tile_map=tile_map,
    )


class Graph:
    """One captured pass over a bucket: `run` of a batch on the device, whose tensors are views of `words`.

    pool: a `torch.cuda.graph_pool_handle()`. Graphs of one pool share memory, so they may only run one after another.
    """

    def __init__(self, words: Tensor, pool: Any, run: Callable[[], Tensor]) -> None:
        self.words = words
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles kernels and lets libraries set up, neither of which can be captured
                run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._rows = run()

    def replay(self, staged: Tensor) -> Tensor:
        """Overwrite the words with pinned ones of the host, and run. Any replay of the pool overwrites the rows."""
        self.words.copy_(staged, non_blocking=True)
        self._graph.replay()
        return self._rows
