"""CUDA graphs for small batches, whose kernels take less time than their launches.

A graph is captured once per bucket of tokens and texts and replayed on new contents: all tensors of a batch are views
of one buffer, which each replay overwrites. A batch is padded to its bucket with tokens that belong to no text and with
texts that have no tokens. The hidden states of the former are computed and never read; the programs that attention and
pooling start for the latter return at once, and the buckets of few texts save a single query most of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded.model.batch import PackedBatch

# Launching a forward pass of 12 layers takes the host 2.1 ms, the time in which a GPU computes 4300 tokens at 2 million
# tokens/s (EPYC, torch 2.11, triton 3.6, 2026-11, without the driver's part; not measured on a GPU).
TOKEN_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096)
TEXT_BUCKETS = (1, 8, 64, 256)


class Bucket(NamedTuple):
    """The shape of a captured pass."""

    tokens: int
    texts: int


def bucket_of(batch: PackedBatch) -> Bucket | None:
    """Return the smallest bucket that holds a batch.

    None if the batch exceeds every bucket, if a text has rotary frequencies of its own, or if tokens have types.
    """
    scaled = batch.inv_freq is not None and batch.inv_freq.shape[1] > 1
    if scaled or batch.token_types is not None:
        return None
    tokens = next((size for size in TOKEN_BUCKETS if len(batch.input_ids) <= size), None)
    texts = next((size for size in TEXT_BUCKETS if len(batch.lengths) <= size), None)
    return None if tokens is None or texts is None else Bucket(tokens, texts)


def fill(batch: PackedBatch, bucket: Bucket, block_m: int) -> PackedBatch:
    """Return the batch padded to the bucket's tokens and texts, and to the number of tiles that these can need.

    block_m: queries per attention tile.
    """
    total_tokens = len(batch.input_ids)
    tile_map = batch.tile_map
    if tile_map is not None:
        tiles = bucket.tokens // block_m + bucket.texts
        tile_map = F.pad(tile_map, (0, 0, 0, tiles - len(tile_map)))  # tiles of texts without tokens
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, bucket.tokens - total_tokens)),
        positions=F.pad(batch.positions, (0, bucket.tokens - total_tokens)),
        cu_seqlens=F.pad(batch.cu_seqlens, (0, bucket.texts - len(batch.lengths)), value=total_tokens),
        tile_map=tile_map,
    )


class Graph:
    """One captured forward pass: `run` of a batch on the device whose tensors are views of `buffer`.

    pool: a `torch.cuda.graph_pool_handle()`. Graphs of one pool share memory, so only one may run at a time.
    """

    def __init__(self, buffer: Tensor, pool: Any, run: Callable[[], Tensor]) -> None:
        self._buffer = buffer
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles kernels and initializes libraries, neither of which can be captured
                run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._rows = run()

    def replay(self, words: Tensor) -> Tensor:
        """Copy pinned words into the buffer and run. The next replay of any graph of the pool overwrites the rows."""
        self._buffer.copy_(words, non_blocking=True)
        self._graph.replay()
        return self._rows
