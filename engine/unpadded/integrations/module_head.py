"""The modules of a SentenceTransformer between Transformer and Normalize, as a runner takes them."""

from __future__ import annotations

from typing import Any

from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

from unpadded.checkpoint.modules import POOLING_MODES
from unpadded.model.heads import Head
from unpadded.model.layer import HeadLayer

SENTENCE = "sentence_embedding"  # the features that the modules read and write
ACTIVATIONS: dict[type, str] = {nn.Identity: "identity", nn.Tanh: "tanh"}


def read_head(following: list[nn.Module]) -> Head | None:
    """Return the modules that follow the Transformer as a head, without a Normalize; None if one is not supported.

    The head's layers share the modules' memory.
    """
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
    return Head(POOLING_MODES[mode], tuple(map(_head_layer, dense)))


def is_normalize(module: nn.Module) -> bool:
    return type(module) is Normalize and module.module_input_name == module.module_output_name == SENTENCE


def _is_supported_dense(module: nn.Module) -> bool:
    return (
        type(module) is Dense
        and module.module_input_name == module.module_output_name == SENTENCE
        and not module.use_residual
        and type(module.activation_function) in ACTIVATIONS
    )


def _head_layer(module: Any) -> HeadLayer:
    linear = module.linear
    bias = None if linear.bias is None else linear.bias.detach()
    return HeadLayer(linear.weight.detach(), bias, ACTIVATIONS[type(module.activation_function)])


def addresses(head: Head) -> tuple[object, ...]:
    """Return what differs between heads that do not share their memory."""
    pointers = [(one.weight.data_ptr(), one.bias is not None and one.bias.data_ptr()) for one in head.layers]
    return head.pooling, pointers, [one.activation for one in head.layers]
