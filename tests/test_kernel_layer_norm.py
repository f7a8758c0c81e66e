"""Residual add + LayerNorm, with and without the sum as a second result: the Triton kernel and its references."""

import pytest
import torch
from support.devices import DEVICE, DTYPES, assert_matches

from unpadded_kernels.layer_norm import (
    add_layer_norm,
    add_layer_norm_reference,
    add_layer_norm_triton,
    pre_layer_norm,
    pre_layer_norm_reference,
    pre_layer_norm_triton,
)

pytestmark = pytest.mark.usefixtures("seed", "poison_empty")
EPS = 1e-5
SHAPES = [(1, 384), (7, 768), (130, 1000), (3, 5), (4, 1)]


def inputs(tokens, hidden, dtype):
    x, residual = torch.randn(2, tokens, hidden, device=DEVICE, dtype=dtype)
    weight, bias = torch.randn(2, hidden, device=DEVICE, dtype=dtype)
    return x, residual, weight, bias


def expected(*tensors, eps=EPS):
    return add_layer_norm_reference(*(tensor.float() for tensor in tensors), eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, hidden", SHAPES)
def test_matches_the_reference(tokens, hidden, dtype):
    tensors = inputs(tokens, hidden, dtype)
    assert_matches(add_layer_norm_triton(*tensors, EPS), expected(*tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, hidden", SHAPES)
def test_pre_layer_norm_returns_the_sum_too(tokens, hidden, dtype):
    x, residual, weight, bias = inputs(tokens, hidden, dtype)
    alone = add_layer_norm_triton(x, residual, weight, bias, EPS)
    y, total = pre_layer_norm_triton(x, residual, weight, bias, EPS)
    assert torch.equal(y, alone)
    assert torch.equal(total, x + residual)
    assert torch.equal(pre_layer_norm_reference(x, residual, weight, bias, EPS)[1], x + residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(dtype):
    x, residual, weight, bias = inputs(64, 768, dtype)
    whole = add_layer_norm_triton(x, residual, weight, bias, EPS)
    assert torch.equal(whole[5:6], add_layer_norm_triton(x[5:6], residual[5:6], weight, bias, EPS))


def test_eps_matters_when_the_variance_is_small():
    x, residual, weight, bias = inputs(4, 96, torch.float32)
    small = (x * 1e-3, residual * 1e-3, weight, bias)
    assert_matches(add_layer_norm_triton(*small, 1e-5), expected(*small))
    assert_matches(add_layer_norm_triton(*small, 1e-12), expected(*small, eps=1e-12))


def test_a_mean_far_from_zero_loses_no_precision():
    x, residual, weight, bias = inputs(4, 768, torch.float32)
    shifted = (x + 100, residual, weight, bias)
    exact = add_layer_norm_reference(*(t.double() for t in shifted), EPS)
    torch.testing.assert_close(add_layer_norm_triton(*shifted, EPS), exact.float(), atol=1e-4, rtol=1e-4)


def test_no_tokens():
    assert add_layer_norm_triton(*inputs(0, 384, torch.float32), EPS).shape == (0, 384)
    assert [part.shape for part in pre_layer_norm_triton(*inputs(0, 384, torch.float32), EPS)] == [(0, 384)] * 2


def test_strided_tokens_are_read_in_place():
    x, residual, weight, bias = inputs(9, 384, torch.float32)
    wide_x, wide_residual = torch.randn(9, 3 * 384, device=DEVICE), torch.randn(9, 2 * 384, device=DEVICE)
    wide_x[:, 384:768], wide_residual[:, :384] = x, residual
    y, total = pre_layer_norm_triton(wide_x[:, 384:768], wide_residual[:, :384], weight, bias, EPS)
    assert_matches(y, expected(x, residual, weight, bias))
    assert torch.equal(total, x + residual)


def test_tokens_past_two_to_the_31_elements(far_tokens):
    _, residual, weight, bias = inputs(*far_tokens.shape, torch.float16)
    actual = add_layer_norm_triton(far_tokens, residual, weight, bias, EPS)
    assert_matches(actual, expected(far_tokens, residual, weight, bias))


@pytest.mark.parametrize("run", [add_layer_norm_triton, pre_layer_norm_triton])
def test_invalid_arguments_are_rejected(run):
    x, residual, weight, bias = inputs(384, 384, torch.float32)
    with pytest.raises(ValueError, match=r"x must be \(384, 384\) with contiguous rows.*strides \(1, 384\)"):
        run(x.t(), residual, weight, bias, EPS)
    with pytest.raises(ValueError, match=r"residual must be \(384, 384\).*got \(3, 384\)"):
        run(x, residual[:3], weight, bias, EPS)


@pytest.mark.parametrize("op", [add_layer_norm, pre_layer_norm])
def test_op_contract(op, monkeypatch):
    monkeypatch.undo()  # opcheck compares what torch.empty returns
    torch.library.opcheck(op, (*inputs(5, 384, torch.float32), EPS))
