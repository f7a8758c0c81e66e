"""The device side: the only place where bytes cross between the host and the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from unpadded.batch import PackedBatch, pack
from unpadded.encoder import Encoder
from unpadded_kernels import linear, pool
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

    @property
    def dimensions(self) -> int:
        """Length of a pooled vector that is not cut."""
        return self.dense[-1][0].shape[0] if self.dense else self.encoder.spec.hidden

    def describe(self) -> dict[str, str]:
        """Where and how it runs, in plain values."""
        dtype = str(self.encoder.weights.word.dtype).removeprefix("torch.")
        return {"device": str(self.device), "dtype": dtype, "attention": self.encoder.attention.name}

    @torch.inference_mode()
    def embed(
        self, sequences: Sequence[np.ndarray], *, layer_norm: bool, dimensions: int, normalize: bool
    ) -> np.ndarray:
        """Id sequences, each [tokens] int32 -> [batch, dimensions] fp32 on the host, shaped as `matryoshka` says."""
        batch = self._to_device(pack(sequences, self.encoder.spec))
        hidden = self.encoder(batch)
        if not self.dense:
            return _to_host(pool(hidden, batch.cu_seqlens, self.pooling, layer_norm, dimensions, normalize))
        rows = pool(hidden, batch.cu_seqlens, self.pooling, False, hidden.shape[1], False)
        for weight, bias, activation in self.dense:
            rows = linear(rows, weight, bias)
            rows = rows.tanh() if activation == "tanh" else rows
        return _to_host(matryoshka(rows, layer_norm, dimensions, normalize))

    @torch.inference_mode()
    def token_rows(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Id sequences, each [tokens] int32 -> the last hidden states of each, [tokens, hidden] fp32 on the host."""
        batch = self._to_device(pack(sequences, self.encoder.spec))
        hidden = _to_host(self.encoder(batch).float())
        return np.split(hidden, np.cumsum(batch.lengths)[:-1])

    def _to_device(self, batch: PackedBatch) -> PackedBatch:
        """Everything in one pinned transfer of 32-bit words."""
        if self.device.type == "cpu":
            return batch
        words = [batch.input_ids, batch.positions, batch.cu_seqlens]
        if batch.inv_freq is not None:
            words.append(batch.inv_freq.view(torch.int32).flatten())
        staged = torch.cat(words).pin_memory().to(self.device, non_blocking=True)
        input_ids, positions, cu_seqlens, *inv_freq = staged.split([len(part) for part in words])
        return replace(
            batch,
            input_ids=input_ids,
            positions=positions,
            cu_seqlens=cu_seqlens,
            inv_freq=inv_freq[0].view(torch.float32).view(batch.inv_freq.shape) if batch.inv_freq is not None else None,
        )


def _to_host(rows: Tensor) -> np.ndarray:
    return rows.cpu().numpy()
