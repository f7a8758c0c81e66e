"""The device side: the only place where bytes cross between the host and the device."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded.batch import PackedBatch, pack
from unpadded.encoder import Encoder
from unpadded.graphs import TEXTS, Graph, bucket_of, fill
from unpadded_kernels import pool
from unpadded_kernels.attention import attention_block_m, tile_map_of
from unpadded_kernels.pooling import matryoshka

# A Dense module of sentence-transformers: weight [out_features, in_features], bias, activation.
Dense = tuple[Tensor, Tensor | None, str]


class Runner:
    """Runs an encoder on its device, batch by batch."""

    def __init__(self, encoder: Encoder, device: torch.device, *, pooling: str, dense: tuple[Dense, ...]) -> None:
        self.encoder = encoder
        self.device = device
        self.pooling = pooling
        self.dense = dense
        self._one_at_a_time = threading.Lock()  # a graph's buffers are overwritten by the next batch of any thread
        # Captured passes by bucket and shape of the result. Library attention takes lengths from the host, experts wait
        # for their counts: neither can be captured.
        self._graphs: dict[tuple[int, bool, int, bool], Graph] = {}
        self._captures = device.type == "cuda" and encoder.attention.name == "unpadded" and not encoder.spec.experts

    @property
    def dimensions(self) -> int:
        """Length of a pooled vector that is not cut."""
        return self.dense[-1][0].shape[0] if self.dense else self.encoder.spec.hidden

    def describe(self) -> dict[str, str]:
        """Where and how it runs, in plain values."""
        dtype = str(self.encoder.weights.word.dtype).removeprefix("torch.")
        return {"device": str(self.device), "dtype": dtype, "attention": self.encoder.attention.name}

    def forward(self, batch: PackedBatch, states: list[Tensor] | None = None) -> Tensor:
        """The last hidden state of every token of a batch on the host: [total_tokens, hidden], left on the device."""
        with self._on_device():
            return self.encoder(self._to_device(batch), states)

    def embed(
        self, sequences: Sequence[np.ndarray], *, layer_norm: bool, dimensions: int, normalize: bool
    ) -> np.ndarray:
        """Id sequences, each [tokens] int32 -> [batch, dimensions] fp32 on the host, shaped as `matryoshka` says."""
        return self.launch(sequences, layer_norm=layer_norm, dimensions=dimensions, normalize=normalize).wait()

    @torch.inference_mode()
    def launch(
        self, sequences: Sequence[np.ndarray], *, layer_norm: bool, dimensions: int, normalize: bool
    ) -> OnTheWay:
        """`embed` that on CUDA does not wait: the host packs the next batch while the device runs this one."""
        batch = pack(sequences, self.encoder.spec)
        bucket = bucket_of(batch) if self._captures else None
        with self._one_at_a_time, self._on_device():
            return self._embed(batch, bucket, len(sequences), layer_norm, dimensions, normalize)

    def _embed(
        self, batch: PackedBatch, bucket: int | None, texts: int, layer_norm: bool, dimensions: int, normalize: bool
    ) -> OnTheWay:
        if bucket is None:
            return OnTheWay(self._pooled(self._to_device(batch), layer_norm, dimensions, normalize))
        batch = self._with_tile_map(batch)
        tiles = bucket // self._block_m() + TEXTS
        batch = fill(batch, bucket, TEXTS, tiles)
        staged = _stage(batch).pin_memory()
        key = (bucket, layer_norm, dimensions, normalize)
        if key not in self._graphs:
            words = staged.to(self.device)
            captured = _views(words, batch)
            self._graphs[key] = Graph(words, lambda: self._pooled(captured, layer_norm, dimensions, normalize))
        return OnTheWay(self._graphs[key].replay(staged)[:texts])

    @torch.inference_mode()
    def token_rows(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Id sequences, each [tokens] int32 -> the last hidden states of each, [tokens, hidden] fp32 on the host."""
        with self._on_device():
            batch = self._to_device(pack(sequences, self.encoder.spec))
            hidden = OnTheWay(self.encoder(batch).float()).wait()
        return np.split(hidden, np.cumsum(batch.lengths)[:-1])

    def _pooled(self, batch: PackedBatch, layer_norm: bool, dimensions: int, normalize: bool) -> Tensor:
        hidden = self.encoder(batch)
        if not self.dense:
            rows: Tensor = pool(hidden, batch.cu_seqlens, self.pooling, layer_norm, dimensions, normalize)
            return rows
        rows = pool(hidden, batch.cu_seqlens, self.pooling, False, hidden.shape[1], False)
        for weight, bias, activation in self.dense:
            rows = self.encoder.linear(rows, weight, bias)
            rows = rows.tanh() if activation == "tanh" else rows
        return matryoshka(rows, layer_norm, dimensions, normalize)

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """Kernels are launched on CUDA's current device, which need not be this one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _to_device(self, batch: PackedBatch) -> PackedBatch:
        if self.device.type == "cpu":
            return batch
        batch = self._with_tile_map(batch)
        return _views(_stage(batch).pin_memory().to(self.device, non_blocking=True), batch)

    def _with_tile_map(self, batch: PackedBatch) -> PackedBatch:
        return replace(batch, tile_map=tile_map_of(batch.lengths, self._block_m()))

    def _block_m(self) -> int:
        return attention_block_m(self.encoder.weights.word.dtype, self.encoder.spec.head_dim, self.device)


FIELDS = ("input_ids", "positions", "cu_seqlens", "inv_freq", "tile_map")


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


class OnTheWay:
    """Rows that the device was told to compute and copy to the host."""

    def __init__(self, rows: Tensor) -> None:
        self._rows, self._copied = rows, None
        if rows.is_cuda:
            self._rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            self._rows.copy_(rows, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> np.ndarray:
        if self._copied is not None:
            self._copied.synchronize()
        return self._rows.numpy()
