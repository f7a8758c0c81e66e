"""Runs batches on one device, in this process."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unpadded.errors import TooLargeError
from unpadded.execution.backend import PendingVectors
from unpadded.execution.cuda_graphs import Bucket, Graph, bucket_of, fill
from unpadded.execution.memory import max_batch_tokens
from unpadded.execution.transfer import HostCopy, copy_to_host, from_words, to_words, wait_for
from unpadded.model.batch import PackedBatch, pack
from unpadded.model.encoder import Encoder
from unpadded.model.heads import Dense, text_vectors
from unpadded.options import VectorOptions
from unpadded_kernels.attention import make_tile_map
from unpadded_kernels.tiles import attention_block_m

logger = logging.getLogger("unpadded")


class Runner:
    """A `Backend` of one device: an encoder, its pooling and the Dense modules after it. Any thread may call it.

    A batch that does not fit the device's memory is split in halves, and so are later batches of its size.
    """

    parallelism = 1
    ready_devices = 1

    def __init__(self, encoder: Encoder, device: torch.device, *, pooling: str, dense: tuple[Dense, ...]) -> None:
        self.encoder = encoder
        self.device = device
        self.pooling = pooling
        self.dense = dense
        self.depth = 2 if device.type == "cuda" else 1
        self._max_tokens: float = math.inf  # per batch; lowered by a batch that did not fit
        self._lock = threading.Lock()  # the next batch overwrites a graph's buffers and the adapted weights
        # Attention libraries need the lengths on the host, which a graph cannot capture.
        self.captures_graphs = device.type == "cuda" and encoder.attention.name == "unpadded"
        self.graphs: dict[tuple[Bucket, VectorOptions, bool], Graph] = {}
        self._graph_pool: Any = None

    @property
    def dimensions(self) -> int:
        return self.dense[-1][0].shape[0] if self.dense else self.encoder.spec.hidden

    def describe(self) -> dict[str, str]:
        dtype = "float8" if self.encoder.float8 else str(self.encoder.weights.word.dtype).removeprefix("torch.")
        return {"device": str(self.device), "dtype": dtype, "attention": self.encoder.attention.name}

    def max_batch_tokens(self) -> int | None:
        return max_batch_tokens(self.encoder.spec, self.encoder.weights.word.dtype.itemsize, self.device)

    def forward(self, batch: PackedBatch, states: list[Tensor] | None = None, embeds: Tensor | None = None) -> Tensor:
        """Return the last hidden state of every token of a batch on the host: [total_tokens, hidden] on the device.

        states, embeds: see `Encoder`; embeds may be on any device and of any dtype.
        """
        with self._on_device():
            if embeds is not None:
                embeds = embeds.to(self.device, self.encoder.weights.word.dtype).contiguous()
            return self.encoder(self.to_device(batch), states, embeds=embeds)

    @torch.inference_mode()
    def launch(self, sequences: Sequence[np.ndarray], options: VectorOptions) -> PendingVectors:
        """Start computing vectors; does not wait on CUDA, so that the host can pack the next batch.

        Raises TooLargeError, with the index in `sequences`, for a sequence that does not fit the memory alone.
        """

        def run(part: Sequence[np.ndarray]) -> HostCopy:
            batch = pack(part, self.encoder.spec)
            bucket = bucket_of(batch) if self.captures_graphs else None
            with self._lock, self._on_device():
                self.encoder.prepare(options.adapter)
                if bucket is None:
                    return copy_to_host(self.vectors(self.to_device(batch), options))
                return copy_to_host(self._replay(batch, bucket, options)[: len(part)])

        return PendingVectors(partial(wait_for, self._run_split(sequences, run)))

    @torch.inference_mode()
    def hidden_states(self, sequences: Sequence[np.ndarray], *, adapter: str | None = None) -> list[np.ndarray]:
        def run(part: Sequence[np.ndarray]) -> HostCopy:
            batch = pack(part, self.encoder.spec)
            with self._lock, self._on_device():
                return copy_to_host(self.encoder(self.to_device(batch), adapter=adapter).float())

        hidden = wait_for(self._run_split(sequences, run))
        return np.split(hidden, np.cumsum([len(ids) for ids in sequences])[:-1])

    def close(self) -> None:
        """Do nothing: there are no processes to stop."""

    def _run_split(
        self, sequences: Sequence[np.ndarray], run: Callable[[Sequence[np.ndarray]], HostCopy]
    ) -> list[HostCopy]:
        """Run sequences as one batch if it fits the memory, otherwise in halves."""
        tokens = sum(map(len, sequences))
        if tokens <= self._max_tokens or len(sequences) == 1:
            with contextlib.suppress(torch.OutOfMemoryError):
                return [run(sequences)]
            # Outside of the handler, because the exception holds the tensors of every frame that it passed.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(sequences) == 1:
                raise TooLargeError(0, tokens, str(self.device))
            if self._max_tokens == math.inf:
                logger.warning(
                    "a batch of %d tokens does not fit the memory of %s; batches are split; load with a lower "
                    "token_budget",
                    tokens,
                    self.device,
                )
            self._max_tokens = tokens // 2
        middle = len(sequences) // 2
        first = self._run_split(sequences[:middle], run)
        try:
            return first + self._run_split(sequences[middle:], run)
        except TooLargeError as error:
            raise error.at(middle + error.index) from None

    def vectors(self, batch: PackedBatch, options: VectorOptions) -> Tensor:
        """Compute the vectors of a batch on the device: [batch, dimensions] fp32."""
        return text_vectors(self.encoder, batch, options, pooling=self.pooling, dense=self.dense)

    def _replay(self, batch: PackedBatch, bucket: Bucket, options: VectorOptions) -> Tensor:
        """Compute the vectors of a batch on the host by a CUDA graph, which the first batch of its kind captures."""
        batch = fill(self._with_tile_map(batch), bucket, self._block_m())
        words = to_words(batch).pin_memory()
        # All adapters share a graph: each is written into the same memory before the pass.
        key = (bucket, replace(options, adapter=None), options.adapter is not None)
        if key not in self.graphs:
            buffer = words.to(self.device)
            captured = from_words(buffer, batch)
            self._graph_pool = self._graph_pool or torch.cuda.graph_pool_handle()
            self.graphs[key] = Graph(buffer, self._graph_pool, lambda: self.vectors(captured, options))
        return self.graphs[key].replay(words)

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """Make this device CUDA's current one, to which streams, events and graphs belong."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def to_device(self, batch: PackedBatch) -> PackedBatch:
        if self.device.type == "cpu":
            return batch
        batch = self._with_tile_map(batch)
        return from_words(to_words(batch).pin_memory().to(self.device, non_blocking=True), batch)

    def _with_tile_map(self, batch: PackedBatch) -> PackedBatch:
        return replace(batch, tile_map=make_tile_map(batch.lengths, self._block_m()))

    def _block_m(self) -> int:
        return attention_block_m(self.encoder.weights.word.dtype, self.encoder.spec.head_dim, self.device)
