"""Between transformers' padded rectangles and packed batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from unpadded.batch import PackedBatch, pack
from unpadded.errors import InputError
from unpadded.spec import EncoderSpec


def unpad(
    input_ids: Tensor, attention_mask: Tensor | None, spec: EncoderSpec, position_ids: Tensor | None = None
) -> tuple[PackedBatch | None, Tensor]:
    """The tokens that the mask keeps, packed on the CPU, and their flat places in the rectangle, [total_tokens].

    input_ids: [batch, length] integers; attention_mask: the same, 0 where a token is padding, at an end or between.
    position_ids: [batch, length] or [1, length]. Without them rotary positions count from a text's first token; learned
    ones are transformers': the column, or RoBERTa's count.
    The batch is None where nothing is kept. InputError for what the encoder would read out of bounds.
    """
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise InputError(
            f"input_ids are {input_ids.dtype} of shape {tuple(input_ids.shape)}; pass [batch, length] integers"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)}; "
            "pass one of zeros and ones in the shape of input_ids"
        )
    ids = input_ids.cpu().numpy()
    kept = np.ones(ids.shape, bool) if attention_mask is None else attention_mask.cpu().numpy() != 0
    sequences = [row[keep].astype(np.int32) for row, keep in zip(ids, kept, strict=True) if keep.any()]
    places = torch.from_numpy(np.flatnonzero(kept))
    if not sequences:
        return None, places
    _check_ids(ids[kept], spec)
    batch = pack(sequences, spec)
    positions = _positions(ids, kept, spec)
    if position_ids is not None:
        positions = _given_positions(position_ids, kept, spec)
    if positions is not None:
        batch = replace(batch, positions=torch.from_numpy(positions))
    return batch, places


def pad(rows: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """[total_tokens, width] -> [batch, length, width], zeros where no token is. places: on the CPU."""
    if len(places) == shape[0] * shape[1]:
        return rows.view(*shape, -1)
    rectangle = rows.new_zeros(shape[0] * shape[1], rows.shape[1])
    return rectangle.index_copy_(0, places.to(rows.device), rows).view(*shape, -1)


def _check_ids(ids: np.ndarray, spec: EncoderSpec) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= spec.vocabulary:
        raise InputError(
            f"input_ids hold {low if low < 0 else high}; ids go from 0 to {spec.vocabulary - 1}: "
            "use the tokenizer of this checkpoint"
        )


def _given_positions(position_ids: Tensor, kept: np.ndarray, spec: EncoderSpec) -> np.ndarray:
    """[total_tokens] int32, as the caller wants them."""
    if spec.alibi or position_ids.ndim != 2 or position_ids.shape not in (kept.shape, (1, kept.shape[1])):
        raise InputError(
            f"position_ids have shape {tuple(position_ids.shape)} and input_ids {kept.shape}, of {spec.family}; pass "
            "[batch, length] or one row, and none to a model with ALiBi"
        )
    positions: np.ndarray = np.broadcast_to(position_ids.cpu().numpy(), kept.shape)[kept].astype(np.int32)
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or (spec.position_rows and high >= spec.position_rows):
        offered = f"0 to {spec.position_rows - 1}" if spec.position_rows else "0 and more"
        raise InputError(f"position_ids hold {low if low < 0 else high}; {spec.family} takes {offered}")
    return positions


def _positions(ids: np.ndarray, kept: np.ndarray, spec: EncoderSpec) -> np.ndarray | None:
    """[total_tokens] int32 where they are not `pack`'s: padding before or between a text's tokens."""
    length = kept.shape[1]
    columns = np.arange(length, dtype=np.int32)
    if spec.position_rows:
        if spec.padding_id is None:
            positions = np.broadcast_to(columns, kept.shape)
        else:
            counted = ids != spec.padding_id
            positions = counted.cumsum(axis=1, dtype=np.int32) * counted + np.int32(spec.padding_id)
        highest = int(positions[kept].max())
        if highest >= spec.position_rows:
            raise InputError(
                f"a token is at position {highest}; the model has {spec.position_rows} learned positions: "
                "truncate the texts, as truncation=True of the tokenizer does"
            )
        learned: np.ndarray = positions[kept]
        return learned
    first = kept.argmax(axis=1, keepdims=True)
    span = length - kept[:, ::-1].argmax(axis=1) - first[:, 0]
    holed = np.flatnonzero(kept.any(axis=1) & (span != kept.sum(axis=1)))
    if not holed.size:
        return None
    if spec.alibi or spec.local is not None:
        raise InputError(
            f"attention_mask of text {holed[0]} has zeros between ones, which {spec.family} attention by distance does "
            "not take; mask padding at the ends only"
        )
    relative: np.ndarray = (columns - first)[kept].astype(np.int32)
    return relative
