"""What a caller may ask of an engine, and the same checked against the checkpoint."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

import numpy as np

from unpadded.checkpoint.reader import Checkpoint
from unpadded.errors import OptionError
from unpadded.quantization import Precision
from unpadded.tokenization.tokenizer import Truncation

logger = logging.getLogger("unpadded")

LongText = Literal["truncate", "mean"]


class Options(TypedDict, total=False):
    """How texts become vectors: the keywords that `encode`, `embed` and `stream` share.

    task: a prompt of the checkpoint by its name (nomic: search_query, search_document, clustering, classification), and
    with it the adapter of that name, where the checkpoint has adapters.
    prompt: the words themselves, put before every text; beside a task that has an adapter, instead of its own. With
    neither, the checkpoint's default, most often none.
    dimensions: matryoshka: layer norm without affine where the model was trained so, cut, L2. None keeps all.
    normalize: L2. None does what the checkpoint says, and normalizes what was cut or averaged.
    precision: float32, float16, int8, uint8, binary or ubinary, with sentence-transformers' meanings.
    ranges: [2, dimensions], the lowest and the highest value of each dimension, for int8 and uint8.
    truncation: of a text beyond max_length keep the first tokens ("right") or the last ("left"), or raise ("error").
    long_text: "truncate", or "mean": the mean over chunks of 2048 tokens, as nomic's client takes it.
    """

    task: str | None
    prompt: str | None
    dimensions: int | None
    normalize: bool | None
    precision: Precision
    ranges: np.ndarray | None
    truncation: Truncation
    long_text: LongText


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The options of one call, checked and with their defaults."""

    prompt: str
    adapter: str | None
    dimensions: int
    layer_norm: bool
    normalize: bool
    precision: Precision
    ranges: np.ndarray | None
    truncation: Truncation
    long_text: LongText

    @property
    def shape(self) -> dict[str, Any]:
        """How a runner makes vectors of sequences: its keywords. Sequences of equal ones may share a batch."""
        return {
            "layer_norm": self.layer_norm,
            "dimensions": self.dimensions,
            "normalize": self.normalize,
            "adapter": self.adapter,
        }


def make_plan(
    checkpoint: Checkpoint,
    full_dimensions: int,
    *,
    task: str | None = None,
    prompt: str | None = None,
    dimensions: int | None = None,
    normalize: bool | None = None,
    precision: Precision = "float32",
    ranges: np.ndarray | None = None,
    truncation: Truncation = "right",
    long_text: LongText = "truncate",
) -> Plan:
    """Check options against a checkpoint and its full dimensions; OptionError names what is not offered."""
    check_offered("precision", precision, Precision)
    check_offered("truncation", truncation, Truncation)
    check_offered("long_text", long_text, LongText)
    if dimensions is not None and not 1 <= dimensions <= full_dimensions:
        raise OptionError(f"dimensions do not fit: {dimensions}; {checkpoint.name} gives 1 to {full_dimensions}")
    if dimensions is not None and dimensions < full_dimensions and not checkpoint.matryoshka:
        logger.warning(
            "%s is not known to be trained for matryoshka; cutting its vectors to %d dimensions costs quality",
            checkpoint.name,
            dimensions,
        )
    reshaped = dimensions is not None or long_text == "mean"
    adapters = checkpoint.spec.lora
    adapter = task if adapters is not None and task in adapters.tasks else None
    if adapters is not None and adapter is not None and not adapters.rank:
        absent = checkpoint.folder / adapters.folders[adapters.tasks.index(adapter)]
        raise OptionError(
            f"task = {adapter!r} has an adapter that {checkpoint.name} does not hold: {absent} is absent; download it, "
            "or pass prompt= to do without"
        )
    return Plan(
        prompt=_prompt(checkpoint, None if prompt is not None and adapter is not None else task, prompt),
        adapter=adapter,
        dimensions=dimensions or full_dimensions,
        layer_norm=reshaped and checkpoint.matryoshka_layer_norm,
        normalize=(checkpoint.normalize or reshaped) if normalize is None else normalize,
        precision=precision,
        ranges=ranges,
        truncation=truncation,
        long_text=long_text,
    )


def check_offered(name: str, value: object, offered: Any) -> None:
    """Raise OptionError unless value is one of a Literal's."""
    if value not in get_args(offered):
        raise OptionError(f"{name} is unknown: {value!r}; use one of {', '.join(map(str, get_args(offered)))}")


def _prompt(checkpoint: Checkpoint, task: str | None, prompt: str | None) -> str:
    if task is not None and prompt is not None:
        raise OptionError(f"task and prompt are both given: {task!r} and {prompt!r}; pass one of them")
    if prompt is not None:
        return prompt
    name = checkpoint.default_prompt if task is None else task
    if name is None:
        return ""
    if name not in checkpoint.prompts:
        known = ", ".join(checkpoint.prompts) or "no tasks, but takes prompt= with the words themselves"
        raise OptionError(f"task is unknown: {name!r}; {checkpoint.name} has {known}")
    return checkpoint.prompts[name]
