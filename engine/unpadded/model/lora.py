"""LoRA: the weights for one task, W + scale * B A.

The first task allocates a copy of the weights that LoRA changes, and every change of task recomputes it in one pass.
Memory does not grow with the number of tasks. The copy never moves, so captured CUDA graphs remain valid.
"""

from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from unpadded.checkpoint.spec import LoraSpec
from unpadded.model.linear import AnyLinear, Linear
from unpadded.model.weights import EncoderWeights


class TaskWeights:
    """The weights of an encoder for one task at a time. Not thread-safe."""

    def __init__(self, spec: LoraSpec, base: EncoderWeights) -> None:
        self._spec = spec
        self._base = base
        self._task: str | None = None  # the one that _adapted was computed for

    @cached_property
    def _adapted(self) -> EncoderWeights:
        """The weights with separate memory, uninitialized at first, for each matrix that LoRA changes."""
        copies = {name: torch.empty_like(_matrix(self._base, name)) for name in self._base.lora}

        def change(name: str, linear: AnyLinear) -> AnyLinear:
            return replace(linear, weight=copies[name]) if isinstance(linear, Linear) and name in copies else linear

        tables: dict[str, Any] = {name: copy for name, copy in copies.items() if "." not in name}
        return replace(self._base.map_linears(change), **tables)

    def of(self, task: str) -> EncoderWeights:
        """Return the weights for a task; a later call for another task overwrites them."""
        if task != self._task:
            self._task = None  # after an error midway, the next call starts again
            index = self._spec.tasks.index(task)
            for name, (lora_b, lora_a) in self._base.lora.items():
                base, adapted = _matrix(self._base, name), _matrix(self._adapted, name)
                torch.addmm(base, lora_b[index], lora_a[index], alpha=self._spec.scale, out=adapted)
            self._task = task
        return self._adapted


def _matrix(weights: EncoderWeights, name: str) -> Tensor:
    """name: such as word or layers.3.qkv, see `Family.tensors`."""
    *layer, name = name.split(".")
    if not layer:
        return cast(Tensor, getattr(weights, name))
    return cast(Linear, weights.layers[int(layer[1])].linears[name]).weight  # LoRA changes plain weights
