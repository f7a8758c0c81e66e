"""The modules of a SentenceTransformer between Transformer and Normalize, as a runner takes them."""

from __future__ import annotations

from typing import Any, NamedTuple

from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

from unpadded.checkpoint.modules import POOLING_MODES
from unpadded.model.heads import Dense as RunnerDense

SENTENCE = "sentence_embedding"  # the features that the modules read and write
ACTIVATIONS: dict[type, str] = {nn.Identity: "identity", nn.Tanh: "tanh"}


class Head(NamedTuple):
    """The modules between a Transformer and a Normalize, as a runner takes them."""

    pooling: str
    dense: tuple[RunnerDense, ...]  # they share the modules' memory


def read_head(following: list[nn.Module]) -> Head | None:
    """Return the modules that follow the Transformer as a head, without a Normalize; None if one is not supported."""
    if following and is_normalize(following[-1]):
        following = following[:-1]
    if not following:
        return None
    pooling, *dense = following
    mode: Any = getattr(pooling, "pooling_mode", None)
    if type(pooling) is not Pooling or not pooling.include_prompt or mode not in POOLING_MODES:
        return None
    if not all(map(_is_supported_dense, dense)):
        return None
    return Head(POOLING_MODES[mode], tuple(map(_runner_dense, dense)))


def is_normalize(module: nn.Module) -> bool:
    return type(module) is Normalize and module.module_input_name == module.module_output_name == SENTENCE


def _is_supported_dense(module: nn.Module) -> bool:
    return (
        type(module) is Dense
        and module.module_input_name == module.module_output_name == SENTENCE
        and not module.use_residual
        and type(module.activation_function) in ACTIVATIONS
    )


def _runner_dense(module: Any) -> RunnerDense:
    linear = module.linear
    bias = None if linear.bias is None else linear.bias.detach()
    return linear.weight.detach(), bias, ACTIVATIONS[type(module.activation_function)]


def addresses(dense: tuple[RunnerDense, ...]) -> list[tuple[object, ...]]:
    return [(weight.data_ptr(), bias is not None and bias.data_ptr(), name) for weight, bias, name in dense]
