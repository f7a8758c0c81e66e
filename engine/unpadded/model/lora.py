"""Low-rank adapters: the weights as one task has them, W + scale * B A.

A second copy of the adapted weights is made with the first task and written anew, from W, whenever the task changes: a
batch of a task costs what one without an adapter costs, and memory does not grow with the tasks. A change is one pass
over the weights, so calls that alternate between tasks pay for it. The copy never moves: captured graphs stay good.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unpadded.checkpoint.spec import LoraSpec
from unpadded.model.weights import EncoderWeights


class AdaptedWeights:
    """The weights of an encoder for the task asked for last. Not for several threads at once."""

    def __init__(self, adapters: LoraSpec, weights: EncoderWeights) -> None:
        self._adapters = adapters
        self._base = weights
        self._task: str | None = None
        self._adapted: EncoderWeights | None = None  # set with the first task

    def of(self, task: str) -> EncoderWeights:
        """The weights of a task; what an earlier call gave for another one holds them from here on."""
        if self._adapted is None:
            self._adapted = _with_copies(self._base)
        if task != self._task:
            self._task = None  # so that what is left half written by an error is written anew
            index = self._adapters.tasks.index(task)
            for slot, (rows, columns) in self._base.lora.items():
                # of matrices that are stacked, q, k and v, each may have factors of its own
                stacked = columns.shape[1] // self._adapters.rank
                whole = (_tensor(self._base, slot), rows[index], columns[index], _tensor(self._adapted, slot))
                for base, b, a, adapted in zip(*(tensor.chunk(stacked) for tensor in whole), strict=True):
                    torch.addmm(base, b, a, alpha=self._adapters.scale, out=adapted)
            self._task = task
        return self._adapted


def _tensor(weights: EncoderWeights, slot: str) -> Tensor:
    """Of a slot as the families name it: word, layers.3.qkv."""
    *layer, name = slot.split(".")
    found: Tensor = getattr(weights.layers[int(layer[1])] if layer else weights, name)
    return found


def _with_copies(base: EncoderWeights) -> EncoderWeights:
    """Every slot that has an adapter in memory of its own, not yet written."""
    copies = {slot: torch.empty_like(_tensor(base, slot)) for slot in base.lora}

    def under(start: str) -> dict[str, Any]:
        return {slot.removeprefix(start): copy for slot, copy in copies.items() if slot.startswith(start)}

    layers = tuple(replace(layer, **under(f"layers.{index}.")) for index, layer in enumerate(base.layers))
    tables: dict[str, Any] = {slot: copy for slot, copy in copies.items() if "." not in slot}
    return replace(base, layers=layers, **tables)
