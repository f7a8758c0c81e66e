"""PackedBatch: the encoder's input, and the only data that crosses from the host to the device."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from unpadded.checkpoint.spec import EncoderSpec, Rotary
from unpadded.checkpoint.token_head import UNATTENDED


@dataclass(frozen=True, eq=False)
class SpannedIds:
    """Token ids of a text, of which each span becomes a row."""

    ids: np.ndarray  # [tokens] int32
    spans: np.ndarray  # [spans, 2] int32: the first token, and the one after the last
    sources: np.ndarray  # [spans, 4] int64, for results: place in the text's spans, its characters, number of tokens

    def __len__(self) -> int:
        return len(self.ids)


Ids: TypeAlias = np.ndarray | SpannedIds  # of one text


@dataclass(frozen=True)
class PackedBatch:
    """Texts end to end, without padding."""

    input_ids: Tensor  # [total_tokens] int32
    positions: Tensor  # [total_tokens] int32, starting again in every text
    cu_seqlens: Tensor  # [batch + 1] int32, the start of each text, then total_tokens
    inv_freq: Tensor | None  # fp32 [rotary embeddings, 1 or batch, head_dim / 2]; one row per text if any is scaled
    lengths: tuple[int, ...]  # tokens per text; stays on the host
    token_types: Tensor | None = None  # [total_tokens] int32; None: all of type 0
    tile_map: Tensor | None = None  # [tiles, 3] int32, the tiles of attention on CUDA; set by the runner
    span_tokens: Tensor | None = None  # [n] int32, the tokens of one span after the other
    cu_spans: Tensor | None = None  # [spans + 1] int32, the start of each span in span_tokens, then n
    key_lengths: Tensor | None = None  # [batch] int32, the first tokens of each text that are attended to; None: all

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0)


@dataclass(frozen=True)
class SelectedTokens:
    """The tokens whose last hidden states are needed, where pooling reads one token per text."""

    indices: Tensor  # [n] int32, positions in the packed batch
    tile_map: Tensor  # [n, 3] int32, the attention tiles that contain them


def pack(sequences: Sequence[Ids], spec: EncoderSpec) -> PackedBatch:
    """Concatenate id sequences on the CPU. A token of type 1 has the id ~id, one that is no key id + UNATTENDED.

    By numpy, because torch's threads would wait for each other while a tokenizer uses all cores.
    """
    lengths = tuple(len(ids) for ids in sequences)
    cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    input_ids = np.concatenate([ids.ids if isinstance(ids, SpannedIds) else ids for ids in sequences])
    token_types = None
    if (second := input_ids < 0).any():
        token_types = torch.from_numpy(second.astype(np.int32))
        input_ids = np.where(second, ~input_ids, input_ids)
    key_lengths = None
    if not (keys := input_ids < UNATTENDED).all():
        key_lengths = torch.from_numpy(np.diff(np.append(0, keys.cumsum())[cu_seqlens]).astype(np.int32))
        input_ids = input_ids % UNATTENDED
    if spec.padding_id is None:
        positions = np.arange(cu_seqlens[-1], dtype=np.int32) - np.repeat(cu_seqlens[:-1], lengths)
    else:
        positions = _positions_after_padding(input_ids, cu_seqlens, spec.padding_id)
    span_tokens, cu_spans = _span_tokens(sequences, cu_seqlens)
    inv_freq = [inverse_frequencies(rotary, spec.head_dim, lengths) for rotary in spec.rotary_embeddings]
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        inv_freq=torch.from_numpy(np.stack(np.broadcast_arrays(*inv_freq))) if inv_freq else None,
        lengths=lengths,
        token_types=token_types,
        span_tokens=span_tokens,
        cu_spans=cu_spans,
        key_lengths=key_lengths,
    )


def _span_tokens(sequences: Sequence[Ids], cu_seqlens: np.ndarray) -> tuple[Tensor | None, Tensor | None]:
    """Return `span_tokens` and `cu_spans` of a batch; None if its texts have no spans."""
    pairs = zip(sequences, cu_seqlens.tolist(), strict=False)
    spans = [ids.spans + start for ids, start in pairs if isinstance(ids, SpannedIds)]
    if not spans:
        return None, None
    starts, ends = np.concatenate(spans).T
    cu_spans = np.concatenate(([0], np.cumsum(ends - starts)))
    tokens = np.arange(cu_spans[-1]) + np.repeat(starts - cu_spans[:-1], ends - starts)
    return torch.from_numpy(tokens.astype(np.int32)), torch.from_numpy(cu_spans.astype(np.int32))


def _positions_after_padding(input_ids: np.ndarray, cu_seqlens: np.ndarray, padding_id: int) -> np.ndarray:
    """Count as RoBERTa does: from padding_id + 1 in every text; tokens of padding_id stay at it and do not count."""
    counted = input_ids != padding_id
    count = np.concatenate(([0], counted.cumsum(dtype=np.int32)))
    before = np.repeat(count[cu_seqlens[:-1]], np.diff(cu_seqlens))
    return np.where(counted, count[1:] - before, 0).astype(np.int32) + np.int32(padding_id)


def inverse_frequencies(rotary: Rotary, head_dim: int, lengths: Sequence[int]) -> np.ndarray:
    """Return 1 / base ** (2j / head_dim) for j < head_dim / 2 in fp32: one row, or one per text if any is scaled.

    A text longer than the trained length has the dynamic-NTK base for its own length (see `Rotary`), so that its
    embedding depends on nothing else. The published reference has the same formula, but takes the padded batch's length
    and keeps its tables between calls.
    """
    factor, trained = rotary.scaling_factor, rotary.trained_length
    if factor is None or all(length <= trained for length in lengths):
        return _frequencies((rotary.base,), rotary.frequency_scale, head_dim)
    exponent = head_dim / (head_dim - 2)
    bases = tuple(
        rotary.base * (factor * length / trained - (factor - 1)) ** exponent if length > trained else rotary.base
        for length in lengths
    )
    return _frequencies(bases, rotary.frequency_scale, head_dim)


@functools.lru_cache(maxsize=16)
def _frequencies(bases: tuple[float, ...], frequency_scale: float, head_dim: int) -> np.ndarray:
    """Return one row per base, by torch, whose powers have the bits of the references: [bases, head_dim / 2] fp32."""
    powers = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inverse: np.ndarray = (frequency_scale / torch.tensor(bases, dtype=torch.float32)[:, None] ** powers).numpy()
    return inverse
