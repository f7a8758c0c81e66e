"""The device side: the only place where bytes cross between the host and the device."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded.errors import TooLargeError
from unpadded.execution.backend import PendingVectors
from unpadded.execution.cuda_graphs import Bucket, Graph, bucket_of, fill
from unpadded.execution.memory import max_batch_tokens
from unpadded.model.batch import PackedBatch, SelectedTokens, pack
from unpadded.model.encoder import Encoder
from unpadded.options import VectorOptions
from unpadded_kernels import pool
from unpadded_kernels.attention import make_tile_map
from unpadded_kernels.pooling import matryoshka
from unpadded_kernels.tiles import attention_block_m

logger = logging.getLogger("unpadded")

# A Dense module of sentence-transformers: weight [out_features, in_features], bias, activation.
Dense = tuple[Tensor, Tensor | None, str]
Copy: TypeAlias = tuple[Tensor, torch.cuda.Event | None]  # on the host, and what says when it has arrived


class Runner:
    """Runs an encoder on its device, batch by batch.

    A batch that the device's memory does not hold runs in halves, and so do those of its size that follow.
    """

    parallelism = 1
    ready_devices = 1

    def __init__(self, encoder: Encoder, device: torch.device, *, pooling: str, dense: tuple[Dense, ...]) -> None:
        self.encoder = encoder
        self.device = device
        self.pooling = pooling
        self.dense = dense
        self.depth = 2 if device.type == "cuda" else 1  # batches worth launching before the first is waited for
        self._most_tokens: float = math.inf  # of a batch; lowered by one that did not fit
        self._one_at_a_time = threading.Lock()  # a graph's buffers are overwritten by the next batch of any thread
        # Captured passes; attention libraries take lengths from the host and cannot be captured.
        self._graphs: dict[tuple[Bucket, VectorOptions, bool], Graph] = {}
        self._graph_pool: Any = None
        self._captures = device.type == "cuda" and encoder.attention.name == "unpadded"

    @property
    def dimensions(self) -> int:
        """Length of a pooled vector that is not cut."""
        return self.dense[-1][0].shape[0] if self.dense else self.encoder.spec.hidden

    def describe(self) -> dict[str, str]:
        """Where and how it runs, in plain values."""
        dtype = "float8" if self.encoder.float8 else str(self.encoder.weights.word.dtype).removeprefix("torch.")
        return {"device": str(self.device), "dtype": dtype, "attention": self.encoder.attention.name}

    def max_batch_tokens(self) -> int | None:
        """Tokens of a batch that fit what is free of the device's memory; None where that is unknown."""
        return max_batch_tokens(self.encoder.spec, self.encoder.weights.word.dtype.itemsize, self.device)

    def forward(self, batch: PackedBatch, states: list[Tensor] | None = None, embeds: Tensor | None = None) -> Tensor:
        """The last hidden state of every token of a batch on the host: [total_tokens, hidden], left on the device.

        embeds: on any device, in any dtype; see `Encoder`.
        """
        with self._on_device():
            if embeds is not None:
                embeds = embeds.to(self.device, self.encoder.weights.word.dtype).contiguous()
            return self.encoder(self._to_device(batch), states, embeds=embeds)

    @torch.inference_mode()
    def launch(self, sequences: Sequence[np.ndarray], options: VectorOptions) -> PendingVectors:
        """Start computing vectors: [batch, dimensions] fp32, pooled, then transformed as `matryoshka` defines.

        Does not wait on CUDA: the host packs the next batch while the device runs this one. Raises TooLargeError, with
        the index in `sequences`, for a sequence that does not fit the device's memory alone.
        """

        def run(part: Sequence[np.ndarray]) -> Copy:
            batch = pack(part, self.encoder.spec)
            bucket = bucket_of(batch) if self._captures else None
            with self._one_at_a_time, self._on_device():
                self.encoder.prepare(options.adapter)
                return _to_host(self._vectors(batch, bucket, len(part), options))

        return PendingVectors(partial(_wait, self._in_parts(sequences, run)))

    def _in_parts(self, sequences: Sequence[np.ndarray], run: Callable[[Sequence[np.ndarray]], Copy]) -> list[Copy]:
        tokens = sum(map(len, sequences))
        if tokens <= self._most_tokens or len(sequences) == 1:
            with contextlib.suppress(torch.OutOfMemoryError):
                return [run(sequences)]
            # Out of the handler, whose exception holds the tensors of every frame that it passed.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(sequences) == 1:
                raise TooLargeError(0, tokens, str(self.device))
            if self._most_tokens == math.inf:
                logger.warning(
                    "a batch of %d tokens does not fit the memory of %s; batches are split; load with a lower "
                    "token_budget",
                    tokens,
                    self.device,
                )
            self._most_tokens = tokens // 2
        middle = len(sequences) // 2
        first = self._in_parts(sequences[:middle], run)
        try:
            return first + self._in_parts(sequences[middle:], run)
        except TooLargeError as error:
            raise error.at(middle + error.index) from None

    def _vectors(self, batch: PackedBatch, bucket: Bucket | None, texts: int, options: VectorOptions) -> Tensor:
        if bucket is None:
            return self._pooled(self._to_device(batch), options)
        batch = fill(self._with_tile_map(batch), bucket, self._block_m())
        staged = _stage(batch).pin_memory()
        # All adapters share a graph: each is written into the same memory before the pass.
        key = (bucket, replace(options, adapter=None), options.adapter is not None)
        if key not in self._graphs:
            words = staged.to(self.device)
            captured = _views(words, batch)
            self._graph_pool = self._graph_pool or torch.cuda.graph_pool_handle()
            self._graphs[key] = Graph(words, self._graph_pool, lambda: self._pooled(captured, options))
        return self._graphs[key].replay(staged)[:texts]

    @torch.inference_mode()
    def hidden_states(self, sequences: Sequence[np.ndarray], *, adapter: str | None = None) -> list[np.ndarray]:
        """Id sequences, each [tokens] int32 -> the last hidden states of each, [tokens, hidden] fp32 on the host."""

        def run(part: Sequence[np.ndarray]) -> Copy:
            batch = pack(part, self.encoder.spec)
            with self._one_at_a_time, self._on_device():
                return _to_host(self.encoder(self._to_device(batch), adapter=adapter).float())

        hidden = _wait(self._in_parts(sequences, run))
        return np.split(hidden, np.cumsum([len(ids) for ids in sequences])[:-1])

    def close(self) -> None:
        """Nothing to end: it runs in this process."""

    def _pooled(self, batch: PackedBatch, options: VectorOptions) -> Tensor:
        hidden, cu_seqlens = self._read_by_pooling(batch, options.adapter)
        matryoshka_options = (options.layer_norm, options.dimensions, options.normalize)
        if not self.dense:
            rows: Tensor = pool(hidden, cu_seqlens, self.pooling, *matryoshka_options)
            return rows
        rows = pool(hidden, cu_seqlens, self.pooling, False, hidden.shape[1], False)
        for weight, bias, activation in self.dense:
            rows = self.encoder.linear(rows.to(weight.dtype), weight, bias)
            rows = rows.tanh() if activation == "tanh" else rows
        return matryoshka(rows.float(), *matryoshka_options)

    def _read_by_pooling(self, batch: PackedBatch, adapter: str | None) -> tuple[Tensor, Tensor]:
        """The last hidden states that pooling reads, and their cu_seqlens: one of each text unless all are averaged."""
        cu_seqlens = batch.cu_seqlens
        if self.pooling == "mean" or len(batch.input_ids) == 0:
            return self.encoder(batch, adapter=adapter), cu_seqlens
        hidden = self.encoder(
            batch, adapter=adapter, selected=_select_pooled_tokens(cu_seqlens, self.pooling, self._block_m())
        )
        hidden = hidden.masked_fill((cu_seqlens.diff() == 0)[:, None], 0)
        return hidden, torch.arange(len(cu_seqlens), dtype=torch.int32, device=hidden.device)

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """Streams, events and graphs are of CUDA's current device, which need not be this one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _to_device(self, batch: PackedBatch) -> PackedBatch:
        if self.device.type == "cpu":
            return batch
        batch = self._with_tile_map(batch)
        return _views(_stage(batch).pin_memory().to(self.device, non_blocking=True), batch)

    def _with_tile_map(self, batch: PackedBatch) -> PackedBatch:
        return replace(batch, tile_map=make_tile_map(batch.lengths, self._block_m()))

    def _block_m(self) -> int:
        return attention_block_m(self.encoder.weights.word.dtype, self.encoder.spec.head_dim, self.device)


def _select_pooled_tokens(cu_seqlens: Tensor, pooling: str, block_m: int) -> SelectedTokens:
    """Return the token of each text that pooling reads; for a text without tokens, a token of another text.

    cu_seqlens: [batch + 1] int32.
    """
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    places = torch.zeros_like(lengths) if pooling == "cls" else (lengths - 1).clamp(min=0)
    rows = (starts + places).minimum(cu_seqlens[-1] - 1)
    return SelectedTokens(rows, torch.stack((starts, lengths, places // block_m), dim=1))


FIELDS = ("input_ids", "positions", "token_types", "cu_seqlens", "inv_freq", "tile_map")


def _stage(batch: PackedBatch) -> Tensor:
    """A batch's tensors as one run of 32-bit words, to cross at once; each starts at 16 bytes, for the widest loads."""
    parts = [getattr(batch, name).view(torch.int32).flatten() for name in FIELDS if getattr(batch, name) is not None]
    return torch.cat([F.pad(part, (0, -len(part) % 4)) for part in parts])


def _views(words: Tensor, like: PackedBatch) -> PackedBatch:
    """The batch whose tensors lie in `words` as `_stage` laid those of `like`."""
    found: dict[str, Any] = {}
    start = 0
    for name in FIELDS:
        tensor = getattr(like, name)
        if tensor is not None:
            size = math.prod(tensor.shape)
            found[name] = words[start : start + size].view(tensor.dtype).view(tensor.shape)
            start += size + -size % 4
    return replace(like, **found)


def _to_host(rows: Tensor) -> Copy:
    if not rows.is_cuda:
        return rows, None
    pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    pinned.copy_(rows, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return pinned, copied


def _wait(copies: list[Copy]) -> np.ndarray:
    """Wait until the copies have arrived and concatenate them."""
    for _, copied in copies:
        if copied is not None:
            copied.synchronize()
    parts = [rows.numpy() for rows, _ in copies]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
