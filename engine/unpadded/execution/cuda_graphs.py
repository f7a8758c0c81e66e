"""CUDA graphs for small batches, whose kernels take less time than their launches.

A graph is captured once per bucket of tokens and texts and replayed on new contents: all tensors of a batch are views
of one buffer, which each replay overwrites. A batch is padded to its bucket with tokens that belong to no text and with
texts that have no tokens. The hidden states of the former are never read, and programs for the latter return at once.
"""

import threading
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from unpadded.model.batch import PackedBatch

# Launching a forward pass of 12 layers takes the host as long as a GPU needs for about 4300 tokens (bench/NOTES.md).
TOKEN_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096)
TEXT_BUCKETS = (1, 8, 64, 256)

Bucket: TypeAlias = tuple[int, int]  # tokens and texts of a captured pass

_one_capture = threading.Lock()  # torch supports one capture at a time per process


def bucket_of(batch: PackedBatch) -> Bucket | None:
    """Return the smallest bucket that holds a batch.

    None if the batch exceeds every bucket, or if a text has rotary frequencies of its own or spans.
    """
    if (batch.inv_freq is not None and batch.inv_freq.shape[1] > 1) or batch.cu_spans is not None:
        return None
    tokens = next((size for size in TOKEN_BUCKETS if len(batch.input_ids) <= size), None)
    texts = next((size for size in TEXT_BUCKETS if len(batch.lengths) <= size), None)
    return None if tokens is None or texts is None else (tokens, texts)


def fill(batch: PackedBatch, bucket: Bucket, block_m: int) -> PackedBatch:
    """Return the batch padded to the bucket's tokens and texts, and to the number of tiles that these can need.

    block_m: queries per attention tile.
    """
    tokens, texts = bucket
    return replace(
        batch,
        input_ids=_extend(batch.input_ids, tokens),
        positions=_extend(batch.positions, tokens),
        cu_seqlens=_extend(batch.cu_seqlens, texts + 1, len(batch.input_ids)),
        token_types=None if batch.token_types is None else _extend(batch.token_types, tokens),
        # the added tiles are of texts without tokens
        key_lengths=None if batch.key_lengths is None else _extend(batch.key_lengths, texts),
        tile_map=None if batch.tile_map is None else _extend(batch.tile_map, tokens // block_m + texts),
    )


def _extend(tensor: Tensor, rows: int, value: int = 0) -> Tensor:
    """Return the int32 tensor on the host with so many rows, of which the new ones have this value."""
    extended = np.full((rows, *tensor.shape[1:]), value, np.int32)
    extended[: len(tensor)] = tensor.numpy()
    return torch.from_numpy(extended)


class Graphs:
    """The captured graphs of one runner, which share memory, so that only one may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self.by_key: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}  # graph, its input, its result
        self._pool: Any = None  # set by each capture that begins without other graphs
        # Not the stream of the batches: any thread that frees pinned memory records an event there, also in a capture.
        self._stream = torch.cuda.Stream(device)

    @torch.inference_mode()
    def replay(self, key: Hashable, words: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Return run(words on the device), by the graph that the first call for a key captures.

        words: pinned, of one size per key. The next replay of any graph overwrites the result.
        """
        if key not in self.by_key:
            self.by_key[key] = self._capture(words.to(self._stream.device, non_blocking=True), run)
        graph, buffer, rows = self.by_key[key]
        buffer.copy_(words, non_blocking=True)
        graph.replay()
        return rows

    def _capture(self, buffer: Tensor, run: Callable[[Tensor], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        if not self.by_key:
            self._pool = torch.cuda.graph_pool_handle()  # torch rejects the handle of a pool whose graphs are destroyed
        stream = torch.cuda.current_stream()
        self._stream.wait_stream(stream)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(2):  # compiles kernels and initializes libraries, neither of which can be captured
                    run(buffer)
        finally:
            stream.wait_stream(self._stream)  # after an error too, since the memory of the buffer is then freed
        graph = torch.cuda.CUDAGraph()
        options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        try:
            with _one_capture, torch.cuda.graph(graph, **options):
                rows = run(buffer)
        except BaseException:
            # Destroying a graph frees the cuBLAS workspace of its stream, which the other graphs use too.
            del graph
            self.by_key.clear()
            raise
        return graph, buffer, rows
