"""Embedding: the sum of each token's word, token-type and position rows, normalized.

    y[t] = LayerNorm(word[input_ids[t]] + token_type[token_types[t]] + position[positions[t]])

Bound by memory: two rows read and one written per token, 6 * hidden bytes in 16 bits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unpadded_kernels import avx512
from unpadded_kernels._operation import operation
from unpadded_kernels._triton import check_rows, tl, triton
from unpadded_kernels.layer_norm import normalized
from unpadded_kernels.tiles import hidden_launch


def embedding_reference(
    input_ids: Tensor,
    positions: Tensor,
    token_types: Tensor | None,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """Gather, add and normalize.

    input_ids, positions, token_types: [total_tokens] int32, token_types None if every token is of type 0; word:
    [vocabulary, hidden]; token_type: [types, hidden] or None; position: [position_rows, hidden] or None; weight, bias:
    [hidden]. Returns [total_tokens, hidden] in word's dtype. The caller checks that every index is within its table.
    """
    x = F.embedding(input_ids, word).float()
    if token_type is not None:
        x = x + (token_type[0] if token_types is None else F.embedding(token_types, token_type)).float()
    if position is not None:
        x = x + F.embedding(positions, position).float()
    return F.layer_norm(x, weight.shape, weight.float(), bias.float(), eps).to(word.dtype)


@triton.jit
def _embedding_kernel(
    input_ids_ptr,
    positions_ptr,
    token_types_ptr,
    word_ptr,
    token_type_ptr,
    position_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    stride_wv,
    stride_tt,
    stride_pp,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    mask = h < HIDDEN

    # int64: vocabulary * hidden exceeds 2**31 for multilingual vocabularies of wide models
    input_id = tl.load(input_ids_ptr + token).to(tl.int64)
    x = tl.load(word_ptr + input_id * stride_wv + h, mask=mask, other=0.0).to(tl.float32)
    if token_type_ptr is not None:
        token_type = tl.load(token_types_ptr + token).to(tl.int64) if token_types_ptr is not None else 0
        x += tl.load(token_type_ptr + token_type * stride_tt + h, mask=mask, other=0.0).to(tl.float32)
    if position_ptr is not None:
        row = tl.load(positions_ptr + token).to(tl.int64)
        x += tl.load(position_ptr + row * stride_pp + h, mask=mask, other=0.0).to(tl.float32)
    y = normalized(x, mask, weight_ptr, bias_ptr, h, eps, HIDDEN)
    tl.store(y_ptr + token * HIDDEN + h, y, mask=mask)


def embedding_triton(
    input_ids: Tensor,
    positions: Tensor,
    token_types: Tensor | None,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """Launch one program per token. The tables may be strided by row; their rows must be contiguous."""
    total_tokens, hidden = input_ids.shape[0], word.shape[1]
    for name, ids in {"input_ids": input_ids, "positions": positions, "token_types": token_types}.items():
        check_rows(name, ids, total_tokens)
    for name, table in {"word": word, "token_type": token_type, "position": position}.items():
        check_rows(name, table, 0 if table is None else len(table), hidden)
    check_rows("weight", weight, hidden)
    check_rows("bias", bias, hidden)
    y = torch.empty((total_tokens, hidden), dtype=word.dtype, device=word.device)
    _embedding_kernel[(total_tokens,)](
        input_ids,
        positions,
        token_types,
        word,
        token_type,
        position,
        weight,
        bias,
        y,
        stride_wv=word.stride(0),
        stride_tt=0 if token_type is None else token_type.stride(0),
        stride_pp=0 if position is None else position.stride(0),
        eps=eps,
        **hidden_launch(hidden),
    )
    return y


def embedding_cpu(input_ids: Tensor, positions: Tensor, token_types: Tensor | None, *rest: Any) -> Tensor:
    """Compute `embedding_reference`, by the kernel for AVX-512 if all tensors have one dtype and contiguous rows."""
    word, token_type, position, weight, bias, eps = rest
    used = [tensor for tensor in rest[:-1] if tensor is not None]
    if avx512.supports(word.dtype) and all(one.dtype == word.dtype and one.stride(-1) == 1 for one in used):
        ids, tables = (input_ids, token_types, positions), (word, token_type, position)
        return avx512.embedding(ids, tables, weight, bias, eps)
    return embedding_reference(input_ids, positions, token_types, *rest)


embedding = operation(embedding_reference, cpu=embedding_cpu, cuda=embedding_triton)
