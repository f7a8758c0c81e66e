"""Triton kernels for encoders over packed tokens: texts are concatenated, without padding.

Every op is one of PyTorch's dispatcher. Its reference defines it and runs on any device; its Triton kernel runs on
CUDA; an op whose reference is slow on a CPU has a separate CPU body.
"""

from unpadded_kernels.activation import activation
from unpadded_kernels.attention import attention
from unpadded_kernels.embedding import embedding
from unpadded_kernels.layer_norm import add_layer_norm, pre_layer_norm, rms_norm
from unpadded_kernels.linear import linear, linear_activation, linear_invariant
from unpadded_kernels.matryoshka import matryoshka
from unpadded_kernels.moe import expert_mlp
from unpadded_kernels.pooling import masked_mean_pool, mean_pool
from unpadded_kernels.rotary import rotary_, rotary_cos_sin
from unpadded_kernels.vocabulary_max import vocabulary_max

__all__ = [
    "activation", "add_layer_norm", "attention", "embedding", "expert_mlp", "linear", "linear_activation",
    "linear_invariant", "masked_mean_pool", "matryoshka", "mean_pool", "pre_layer_norm", "rms_norm", "rotary_",
    "rotary_cos_sin", "vocabulary_max",
]  # fmt: skip
