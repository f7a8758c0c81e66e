"""Conversion between the padded tensors of transformers and packed batches.

A forward pass waits for the device once, to read its padded inputs, and not at all if they are on the host.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unpadded.checkpoint.spec import EncoderSpec
from unpadded.errors import InputError
from unpadded.model.batch import PackedBatch, pack


class PaddedInputs(NamedTuple):
    """The inputs of transformers' models, in the order of their arguments."""

    input_ids: Tensor | None  # [batch, length] integers
    attention_mask: Tensor | None  # [batch, length], 0 for padding, which may precede, follow or separate tokens
    token_type_ids: Tensor | None  # [batch, length] or [1, length]
    position_ids: Tensor | None  # [batch, length] or [1, length]
    inputs_embeds: Tensor | None  # [batch, length, hidden] floats, in place of input_ids


def unpad(inputs: PaddedInputs, spec: EncoderSpec) -> tuple[PackedBatch | None, np.ndarray | None, tuple[int, int]]:
    """Pack the tokens that the mask keeps, on the CPU. Return the batch and the two arguments of `pad`.

    The batch is None if no token is kept. For inputs_embeds, its ids are row indices of inputs_embeds.flatten(0, 1).
    Without position_ids, rotary positions count from a text's first token, and learned ones are those of transformers:
    the column, or RoBERTa's count. InputError for ids that the encoder would look up out of bounds.
    """
    shape = _input_shape(inputs, spec)
    mask = inputs.attention_mask
    if mask is not None and mask.shape != shape:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}, but the tokens have shape {shape}; "
            "pass zeros and ones in the shape of the tokens"
        )
    if inputs.position_ids is not None and spec.alibi:
        raise InputError(f"position_ids were passed to {spec.family}, which uses ALiBi instead; omit them")
    types = inputs.token_type_ids if spec.token_types else None
    _check_shape("position_ids", inputs.position_ids, shape)
    _check_shape("token_type_ids", types, shape)
    nonzero = None if mask is None else mask != 0
    ids, given_mask, given_positions, token_types = to_host(inputs.input_ids, nonzero, inputs.position_ids, types)
    kept = np.ones(shape, bool) if given_mask is None else given_mask
    indices = None if kept.all() else np.flatnonzero(kept)
    tokens = (np.arange(math.prod(shape)).reshape(shape) if ids is None else ids)[kept]
    if not tokens.size:
        return None, indices, shape
    if ids is not None:
        _check_range("input_ids", tokens, spec.vocabulary, "use the tokenizer of this checkpoint")
    batch = pack(np.split(tokens.astype(np.int32), kept.sum(axis=1).cumsum()[:-1]), spec)
    positions = _positions(ids, kept, spec)
    if given_positions is not None:
        positions = _kept_values("position_ids", given_positions, kept, spec.position_rows or 2**31)
    if positions is not None:
        batch = replace(batch, positions=torch.from_numpy(positions))
    if token_types is not None and token_types.any():
        kept_types = _kept_values("token_type_ids", token_types, kept, spec.token_types)
        batch = replace(batch, token_types=torch.from_numpy(kept_types))
    return batch, indices, shape


def pad(rows: Tensor, indices: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """[total_tokens, width] -> [batch, length, width], zeros at padding.

    indices: [total_tokens] int64 on the device of the rows, the position of each row in the flattened batch; None where
    nothing is padding.
    """
    if indices is None:
        return rows.view(*shape, -1)
    padded = rows.new_zeros(shape[0] * shape[1], rows.shape[1])
    return padded.index_copy_(0, indices, rows).view(*shape, -1)


def to_host(*tensors: Tensor | None) -> list[np.ndarray | None]:
    """Copy tensors to the host, with one wait for their device."""
    # With non_blocking, PyTorch copies from CUDA to pinned memory and does not wait.
    copies = [None if tensor is None else tensor.to("cpu", non_blocking=tensor.is_cuda) for tensor in tensors]
    for device in {tensor.device for tensor in tensors if tensor is not None and tensor.is_cuda}:
        torch.cuda.current_stream(device).record_event().synchronize()
    return [None if copy is None else copy.numpy() for copy in copies]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device without waiting for it; on a CPU the tensor shares the array's memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    pinned = torch.empty_like(tensor, pin_memory=True)
    np.copyto(pinned.numpy(), array)
    return pinned.to(device, non_blocking=True)


def _input_shape(inputs: PaddedInputs, spec: EncoderSpec) -> tuple[int, int]:
    """Return (batch, length) of input_ids or inputs_embeds."""
    input_ids, inputs_embeds = inputs.input_ids, inputs.inputs_embeds
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither input_ids nor" if input_ids is None else "both input_ids and"
        raise InputError(f"{given} inputs_embeds were passed; pass one of them")
    if input_ids is not None:
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise InputError(
                f"input_ids are {input_ids.dtype} of shape {tuple(input_ids.shape)}; pass [batch, length] integers"
            )
        return input_ids.shape[0], input_ids.shape[1]
    assert inputs_embeds is not None
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != spec.hidden or not inputs_embeds.is_floating_point():
        raise InputError(
            f"inputs_embeds are {inputs_embeds.dtype} of shape {tuple(inputs_embeds.shape)}; pass floats of shape "
            f"[batch, length, {spec.hidden}]"
        )
    return inputs_embeds.shape[0], inputs_embeds.shape[1]


def _check_shape(name: str, values: Tensor | None, shape: tuple[int, int]) -> None:
    if values is not None and (values.shape not in (shape, (1, shape[1])) or values.is_floating_point()):
        raise InputError(
            f"{name} are {values.dtype} of shape {tuple(values.shape)}, but the tokens have shape {shape}; pass "
            "integers of shape [batch, length] or [1, length]"
        )


def _kept_values(name: str, values: np.ndarray, kept: np.ndarray, limit: int) -> np.ndarray:
    """Return the values of the kept tokens: [total_tokens] int32."""
    found: np.ndarray = np.broadcast_to(values, kept.shape)[kept]
    _check_range(name, found, limit, "pass values that this model has")
    return found.astype(np.int32)


def _check_range(name: str, values: np.ndarray, limit: int, remedy: str) -> None:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= limit:
        raise InputError(
            f"{name} contain {low if low < 0 else high}, outside of the model's range 0 to {limit - 1}; {remedy}"
        )


def _positions(ids: np.ndarray | None, kept: np.ndarray, spec: EncoderSpec) -> np.ndarray | None:
    """Return positions of the kept tokens, [total_tokens] int32, or None if those of `pack` are right.

    ids: None for inputs_embeds, none of which is known to be padding, so that RoBERTa counts them all.
    """
    length = kept.shape[1]
    columns = np.arange(length, dtype=np.int32)
    first = kept.argmax(axis=1, keepdims=True)
    span = length - kept[:, ::-1].argmax(axis=1) - first[:, 0]  # columns from a text's first token to its last
    texts_with_gaps = np.flatnonzero(kept.any(axis=1) & (span != kept.sum(axis=1)))
    if texts_with_gaps.size and (spec.alibi or spec.position_bias or spec.local_attention is not None):
        raise InputError(
            f"attention_mask of text {texts_with_gaps[0]} has zeros between ones, which attention by distance, as in "
            f"{spec.family}, does not support; mask padding at the ends only"
        )
    if spec.position_rows:
        if spec.padding_id is None:
            positions = np.broadcast_to(columns, kept.shape)
        else:
            counted = np.ones(kept.shape, bool) if ids is None else ids != spec.padding_id
            positions = counted.cumsum(axis=1, dtype=np.int32) * counted + np.int32(spec.padding_id)
        highest = int(positions[kept].max())
        if highest >= spec.position_rows:
            raise InputError(
                f"a token is at position {highest}, but the model has {spec.position_rows} learned positions; "
                "pass truncation=True to the tokenizer"
            )
        learned: np.ndarray = positions[kept]
        return learned
    if not texts_with_gaps.size:
        return None
    relative: np.ndarray = (columns - first)[kept].astype(np.int32)
    return relative
