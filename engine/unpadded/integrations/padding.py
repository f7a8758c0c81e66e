"""Between transformers' padded rectangles and packed batches."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from unpadded.checkpoint.spec import EncoderSpec
from unpadded.errors import InputError
from unpadded.model.batch import PackedBatch, pack


def unpad(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    spec: EncoderSpec,
    *,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> tuple[PackedBatch | None, Tensor, tuple[int, int]]:
    """The tokens that the mask keeps, packed on the CPU, their flat places, [total_tokens], and the rectangle's shape.

    input_ids: [batch, length] integers; or inputs_embeds: [batch, length, hidden], where a token's id is its place, its
    row of inputs_embeds.flatten(0, 1). attention_mask: [batch, length], 0 where a token is padding, at an end or
    between. token_type_ids, position_ids: [batch, length] or [1, length]. Without positions rotary ones count from a
    text's first token; learned ones are transformers': the column, or RoBERTa's count.
    The batch is None where nothing is kept. InputError for what the encoder would read out of bounds.
    """
    shape = _shape(input_ids, inputs_embeds, spec)
    if attention_mask is not None and attention_mask.shape != shape:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)} and the tokens {shape}; "
            "pass zeros and ones in the shape of the tokens"
        )
    ids = None if input_ids is None else input_ids.cpu().numpy()
    rows = np.arange(math.prod(shape)).reshape(shape) if ids is None else ids
    kept = np.ones(shape, bool) if attention_mask is None else attention_mask.cpu().numpy() != 0
    sequences = [row[keep].astype(np.int32) for row, keep in zip(rows, kept, strict=True) if keep.any()]
    places = torch.from_numpy(np.flatnonzero(kept))
    if not sequences:
        return None, places, shape
    if ids is not None:
        _check_range("input_ids", ids[kept], spec.vocabulary, "use the tokenizer of this checkpoint")
    batch = pack(sequences, spec)
    positions = _positions(ids, kept, spec)
    if position_ids is not None:
        if spec.alibi:
            raise InputError(f"position_ids were given to {spec.family}, which has ALiBi in their place; pass none")
        positions = _given("position_ids", position_ids, kept, spec.position_rows or 2**31)
    if positions is not None:
        batch = replace(batch, positions=torch.from_numpy(positions))
    if token_type_ids is not None and spec.token_types and bool(token_type_ids.any()):
        token_types = _given("token_type_ids", token_type_ids, kept, spec.token_types)
        batch = replace(batch, token_types=torch.from_numpy(token_types))
    return batch, places, shape


def pad(rows: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """[total_tokens, width] -> [batch, length, width], zeros where no token is. places: on the CPU."""
    if len(places) == shape[0] * shape[1]:
        return rows.view(*shape, -1)
    rectangle = rows.new_zeros(shape[0] * shape[1], rows.shape[1])
    return rectangle.index_copy_(0, places.to(rows.device), rows).view(*shape, -1)


def _shape(input_ids: Tensor | None, inputs_embeds: Tensor | None, spec: EncoderSpec) -> tuple[int, int]:
    """(batch, length) of the one that is given."""
    if input_ids is not None and inputs_embeds is not None:
        raise InputError("input_ids and inputs_embeds were both given; pass one of them")
    if input_ids is not None:
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise InputError(
                f"input_ids are {input_ids.dtype} of shape {tuple(input_ids.shape)}; pass [batch, length] integers"
            )
        return input_ids.shape[0], input_ids.shape[1]
    if inputs_embeds is None:
        raise InputError("neither input_ids nor inputs_embeds were given; pass one of them")
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != spec.hidden or not inputs_embeds.is_floating_point():
        raise InputError(
            f"inputs_embeds are {inputs_embeds.dtype} of shape {tuple(inputs_embeds.shape)}; pass floats of shape "
            f"[batch, length, {spec.hidden}]"
        )
    return inputs_embeds.shape[0], inputs_embeds.shape[1]


def _given(name: str, values: Tensor, kept: np.ndarray, limit: int) -> np.ndarray:
    """[total_tokens] int32: what the caller says of the tokens that are kept."""
    if values.shape not in (kept.shape, (1, kept.shape[1])) or values.is_floating_point():
        raise InputError(
            f"{name} have shape {tuple(values.shape)} and dtype {values.dtype}, and the tokens {kept.shape}; pass "
            "[batch, length] integers, or one row of them"
        )
    found: np.ndarray = np.broadcast_to(values.cpu().numpy(), kept.shape)[kept]
    _check_range(name, found, limit, "pass those that this model has")
    return found.astype(np.int32)


def _check_range(name: str, values: np.ndarray, limit: int, remedy: str) -> None:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= limit:
        raise InputError(f"{name} hold {low if low < 0 else high}; they go from 0 to {limit - 1}: {remedy}")


def _positions(ids: np.ndarray | None, kept: np.ndarray, spec: EncoderSpec) -> np.ndarray | None:
    """[total_tokens] int32 where they are not `pack`'s: padding before or between a text's tokens.

    ids: None where the words' own rows are given, none of which is known to be padding; RoBERTa then counts them all.
    """
    length = kept.shape[1]
    columns = np.arange(length, dtype=np.int32)
    if spec.position_rows:
        if spec.padding_id is None:
            positions = np.broadcast_to(columns, kept.shape)
        else:
            counted = np.ones(kept.shape, bool) if ids is None else ids != spec.padding_id
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
    if spec.alibi or spec.local_attention is not None:
        raise InputError(
            f"attention_mask of text {holed[0]} has zeros between ones, which {spec.family} attention by distance does "
            "not take; mask padding at the ends only"
        )
    relative: np.ndarray = (columns - first)[kept].astype(np.int32)
    return relative
