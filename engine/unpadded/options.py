"""The options of `load` and `encode`. Each is described once, here: flags, their help and the docs are generated.

`option` returns a dataclass field, which ruff cannot know.
"""
# ruff: noqa: RUF009

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, get_args

from unpadded.errors import OptionError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from unpadded.checkpoint.reader import Checkpoint

logger = logging.getLogger("unpadded")

Precision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
Truncation = Literal["right", "left", "error"]
ScoreActivation = Literal["auto", "sigmoid", "softmax", "none"]


class Option(NamedTuple):
    """One option, as `describe` returns it."""

    name: str
    type: str  # the annotation, as written
    default: Any
    help: str
    metavar: str | None
    choices: tuple[str, ...] | None  # None if the type is not a Literal


def describe(options: type[Any]) -> tuple[Option, ...]:
    """Return the options of a dataclass: its fields made by `option`, in their order."""
    return tuple(
        Option(field.name, str(field.type), field.default, **field.metadata)
        for field in fields(options)
        if field.metadata
    )


def option(default: Any, help: str, *, metavar: str | None = None, literal: Any = None) -> Any:
    """Return a dataclass field with its description. literal: the Literal type of an option with fixed choices."""
    choices = None if literal is None else get_args(literal)
    return field(default=default, metadata={"help": help, "metavar": metavar, "choices": choices})


def convert(option: Option, value: Any) -> Any:
    """Return the value of an option from a string, such as a flag's; other values are returned as they are.

    OptionError for a string that is not of the option's type.
    """
    if option.default == ():
        return (value,) if isinstance(value, str) else tuple(value)
    if not isinstance(value, str):
        return value
    if option.type == "bool":
        return value.lower() == "true"
    number = {"int": int, "float": float}.get(option.type.partition(" ")[0])
    if number is None or repr(value) in option.type:  # a string, or a word that a numeric option accepts
        return value
    if value == "none" and option.type.endswith("None"):
        return None
    try:
        return number(value)
    except ValueError:
        example = 2 if option.default is None or isinstance(option.default, str) else option.default
        raise OptionError(f"{option.name} is not a number: {value!r}; pass one such as {example}") from None


class LoadKeywords(TypedDict, total=False):
    """The keyword arguments of `load`: the fields of `LoadOptions`."""

    device: str | torch.device | Sequence[str | torch.device]
    dtype: str | torch.dtype
    attention: str
    rotary_scaling_factor: float | Literal["config"] | None
    max_length: int | None
    token_budget: int | Literal["auto"] | None
    batch_invariant: bool
    revision: str | None


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options for loading and running a model."""

    device: str | torch.device | Sequence[str | torch.device] = option(
        "auto",
        "auto (CUDA if available, else the CPU), cpu, cuda, cuda:N, all (every CUDA device), or several such as "
        "cuda:0,cuda:1, each of which runs in a process of its own",
    )
    dtype: str | torch.dtype = option(
        "auto",
        "auto (float16 on CUDA, float32 on a CPU), float32, float16, bfloat16, or int8 on a CPU with AVX-512 VNNI, "
        "less accurate: linear layers quantized at load, with a scale per row",
    )
    attention: str = option("auto", "attention backend: auto, unpadded, torch or flash-attn")
    rotary_scaling_factor: float | Literal["config"] | None = option(
        "config",
        "factor of dynamic-NTK scaling for texts longer than the model was trained on, computed from each text's own "
        "length; config uses the checkpoint's value, none disables scaling",
        metavar="FACTOR",
    )
    max_length: int | None = option(
        None, "maximum number of tokens kept per text; default: the checkpoint's maximum", metavar="N"
    )
    token_budget: int | Literal["auto"] | None = option(
        None,
        "maximum number of tokens per batch, which bounds memory; auto, the default on CUDA, lowers the usual number "
        "to what half of the free memory holds",
        metavar="N",
    )
    batch_invariant: bool = option(
        False, "compute the same bits for a text alone and in any batch on CUDA too, which is slower"
    )
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face id", metavar="REVISION")

    def __post_init__(self) -> None:
        if isinstance(self.token_budget, int) and self.token_budget < 1:
            raise OptionError(f"token_budget is not positive: {self.token_budget}; pass a number such as 16384")
        if isinstance(self.token_budget, str) and self.token_budget != "auto":
            raise OptionError(f"token_budget is unknown: {self.token_budget!r}; use auto or a number of tokens")


class EncodeKeywords(TypedDict, total=False):
    """The keyword arguments of `encode`, `embed` and `stream`: the fields of `EncodeOptions`."""

    task: str | None
    prompt: str | None
    dimensions: int | None
    normalize: bool | None
    precision: Precision
    ranges: np.ndarray | None
    truncation: Truncation


class EmbedKeywords(EncodeKeywords, total=False):
    """The keyword arguments of `embed`."""

    show_progress: bool | None


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """Options for turning texts into vectors."""

    task: str | None = option(
        None,
        "name of one of the checkpoint's prompts, such as search_query or search_document; also selects the LoRA "
        "adapter of that name if the checkpoint has one",
        metavar="TASK",
    )
    prompt: str | None = option(
        None,
        "text put before every input, instead of the task's prompt; default: the checkpoint's default prompt, if any",
        metavar="TEXT",
    )
    dimensions: int | None = option(
        None,
        "cut the vectors to this length (matryoshka), after a layer norm if the model was trained with one, and "
        "L2-normalize them; default: the full length",
        metavar="N",
    )
    normalize: bool | None = option(
        None, "L2-normalize the vectors; default: as the checkpoint does, and always after cutting"
    )
    precision: Precision = option(
        "float32", "number format of the vectors, as in sentence-transformers", literal=Precision
    )
    ranges: np.ndarray | None = option(
        None, "lowest and highest value of each dimension, [2, dimensions], for int8 and uint8", metavar="NPY"
    )
    truncation: Truncation = option(
        "right",
        "what to do with a text longer than max_length: right keeps its first tokens, left its last, error raises",
        literal=Truncation,
    )

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, get_args(Precision))
        check_choice("truncation", self.truncation, get_args(Truncation))


class ScoreKeywords(TypedDict, total=False):
    """The keyword arguments of `score` and `rank`."""

    activation: ScoreActivation
    prompt: str | None
    truncation: Literal["right", "error"]


@dataclass(frozen=True, kw_only=True)
class VectorOptions:
    """Options for turning hidden states into rows of a head. Sequences with equal ones can share a batch."""

    dimensions: int
    layer_norm: bool = False
    normalize: bool = False
    adapter: str | None = None  # the task whose LoRA adapter is applied
    head: str = "vector"  # a name in the runner's heads
    rows: Literal["text", "token", "span"] = "text"  # what has a row


@dataclass(frozen=True, kw_only=True)
class Plan(EncodeOptions):
    """The options of one call, checked against a checkpoint: prompt is that of the task, if it has one."""

    vector_options: VectorOptions
    prompt: str
    cut: tuple[int, int] | None = None  # span_tokens and overlap of `encode_spans` without spans
    max_length: int | None = None  # tokens per text; None: the checkpoint's
    expansion: tuple[int, int] | None = None  # tokens per text at least, and the id that is appended to shorter ones


# Keyword arguments of sentence-transformers, and those that no option replaces -> what to do here.
REPLACEMENTS = {
    "batch_size": "omit it, or pass token_budget= to load",
    "convert_to_numpy": "pass output='numpy' or output='list' to encode",
    "convert_to_tensor": "pass output='torch' to encode",
    "device": "pass it to load",
    "long_text": "split long texts, or call encode_spans for one vector per part",
    "model_kwargs": "pass dtype= and attention=",
    "normalize_embeddings": "pass normalize=",
    "output_value": "call token_embeddings",
    "prompt_name": "pass task=",
    "show_progress_bar": "pass show_progress=",
    "token": "set HF_TOKEN in the environment",
    "tokenizer_kwargs": "pass max_length=",
    "truncate_dim": "pass dimensions= to encode",
    "trust_remote_code": "omit it: no code of a checkpoint is ever run",
}


def check_keywords(keywords: Mapping[str, Any], options: type[Any]) -> None:
    """Raise OptionError, with what to do, for a keyword argument that is not a field of the options."""
    known = options.__dataclass_fields__
    for name in keywords.keys() - known.keys():
        action = REPLACEMENTS.get(name, f"use one of {', '.join(known)}")
        raise OptionError(f"{name} is not an option; {action}")


def make_plan(checkpoint: Checkpoint, full_dimensions: int, options: EncodeOptions) -> Plan:
    """Check options against a checkpoint and its full dimensions; OptionError names an unsupported value."""
    dimensions = options.dimensions
    if dimensions is not None and not 1 <= dimensions <= full_dimensions:
        raise OptionError(
            f"dimensions are out of range: {dimensions}; {checkpoint.name} supports 1 to {full_dimensions}"
        )
    if dimensions is not None and dimensions < full_dimensions and not checkpoint.matryoshka:
        message = "%s is not known to be trained for matryoshka; cutting its vectors to %d dimensions costs quality"
        logger.warning(message, checkpoint.name, dimensions)
    lora = checkpoint.spec.lora
    adapter = options.task if lora is not None and options.task in lora.tasks else None
    cut = dimensions is not None
    resolved = vars(options) | {"prompt": _prompt(checkpoint, options, has_adapter=adapter is not None)}
    return Plan(
        **resolved,
        vector_options=VectorOptions(
            layer_norm=cut and checkpoint.matryoshka_layer_norm,
            dimensions=dimensions or full_dimensions,
            normalize=(checkpoint.normalize or cut) if options.normalize is None else options.normalize,
            adapter=adapter,
        ),
    )


def make_score_plan(
    checkpoint: Checkpoint,
    activation: ScoreActivation = "auto",
    prompt: str | None = None,
    truncation: Truncation = "right",
) -> tuple[Plan, ScoreActivation]:
    """Check the options of `Engine.score` against a checkpoint; return the plan, and the activation that auto means."""
    head = checkpoint.score
    if head is None:
        raise OptionError(
            f"{checkpoint.name} has no head for scores; load a reranker or classifier, such as one whose architecture "
            "in config.json ends in ForSequenceClassification"
        )
    check_choice("activation", activation, get_args(ScoreActivation))
    check_choice("truncation", truncation, ("right", "error"))
    options = EncodeOptions(prompt=prompt, truncation=truncation)
    rows = VectorOptions(dimensions=len(head.labels), head="score")
    resolved = vars(options) | {"prompt": _prompt(checkpoint, options, has_adapter=False)}
    if activation == "auto":
        activation = "sigmoid" if head.sigmoid else "none"
    return Plan(**resolved, vector_options=rows), activation


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise OptionError unless value is one of the choices."""
    if value not in choices:
        raise OptionError(f"{name} is unknown: {value!r}; use one of {', '.join(choices)}")


def _prompt(checkpoint: Checkpoint, options: EncodeOptions, *, has_adapter: bool) -> str:
    """The text put before every input. prompt replaces that of a task with an adapter, which applies all the same."""
    task, prompt = options.task, options.prompt
    if task is not None and prompt is not None and not has_adapter:
        raise OptionError(f"task and prompt are both given: {task!r} and {prompt!r}; pass one of them")
    if prompt is not None:
        return prompt
    name = checkpoint.default_prompt if task is None else task
    if name is None:
        return ""
    if name not in checkpoint.prompts:
        known = ", ".join(checkpoint.prompts) or "no tasks; pass prompt= instead"
        raise OptionError(f"task is unknown: {name!r}; {checkpoint.name} has {known}")
    return checkpoint.prompts[name]
