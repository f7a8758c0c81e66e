"""PackedBatch: the one thing that crosses from the host to the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unpadded.spec import EncoderSpec, Rotary


@dataclass(frozen=True)
class PackedBatch:
    """Texts end to end, nothing between them."""

    input_ids: Tensor  # [total_tokens] int32
    positions: Tensor  # [total_tokens] int32, from 0 in every text
    cu_seqlens: Tensor  # [batch + 1] int32, where each text starts; the last is total_tokens
    inv_freq: (
        Tensor | None
    )  # fp32 [1, head_dim / 2], or [batch, head_dim / 2] where a text is scaled; None without rotary
    lengths: tuple[int, ...]  # of each text in tokens; stays on the host

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0)


def pack(sequences: Sequence[np.ndarray], spec: EncoderSpec) -> PackedBatch:
    """Lay id sequences (each [tokens], int32) end to end, on the CPU."""
    lengths = tuple(len(ids) for ids in sequences)
    cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    positions = np.arange(cu_seqlens[-1], dtype=np.int32) - np.repeat(cu_seqlens[:-1], lengths)
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate(sequences)),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        inv_freq=None if spec.rotary is None else inverse_frequencies(spec.rotary, spec.head_dim, lengths),
        lengths=lengths,
    )


def inverse_frequencies(rotary: Rotary, head_dim: int, lengths: Sequence[int]) -> Tensor:
    """1 / base ** (2j / head_dim) for j < head_dim / 2, fp32: one row, or one a text where any is scaled.

    A text of L tokens beyond the trained length M has the dynamic-NTK base of its own length (see `Rotary`); the
    formula is the published reference's, which takes the padded batch's length for L and keeps its tables between calls; here L
    is the text's, so that its embedding depends on nothing else.
    """
    factor, trained = rotary.scaling_factor, rotary.trained_length
    bases = [rotary.base]
    if factor is not None and any(length > trained for length in lengths):
        exponent = head_dim / (head_dim - 2)
        bases = [
            rotary.base * (factor * length / trained - (factor - 1)) ** exponent if length > trained else rotary.base
            for length in lengths
        ]
    powers = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / torch.tensor(bases, dtype=torch.float32)[:, None] ** powers
