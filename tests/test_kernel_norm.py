"""LayerNorm that hands on its sum, and LayerNorm of q and k: the Triton kernels against their references."""

import pytest
import torch
from conftest import DEVICE, DTYPES, assert_matches

from unpadded_kernels.norm import (
    pre_layer_norm,
    pre_layer_norm_reference,
    pre_layer_norm_triton,
    qk_norm_,
    qk_norm_reference,
    qk_norm_triton,
)

pytestmark = pytest.mark.usefixtures("seed", "poison_empty")
EPS = 1e-5


def rows(tokens, hidden, dtype):
    x, residual = torch.randn(2, tokens, hidden, device=DEVICE, dtype=dtype)
    weight, bias = torch.randn(2, hidden, device=DEVICE, dtype=dtype)
    return x, residual, weight, bias


def heads_of(tokens, heads, head_dim, dtype):
    qkv = torch.randn(tokens, 3, heads, head_dim, device=DEVICE, dtype=dtype)
    weight, bias = torch.randn(2, 2 * heads * head_dim, device=DEVICE, dtype=dtype)
    return qkv, weight, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, hidden", [(1, 384), (7, 768), (130, 1000), (3, 5), (4, 1)])
def test_pre_layer_norm_matches_the_reference(tokens, hidden, dtype):
    tensors = rows(tokens, hidden, dtype)
    expected = pre_layer_norm_reference(*(tensor.float() for tensor in tensors), EPS)
    for actual, wanted in zip(pre_layer_norm_triton(*tensors, EPS), expected, strict=True):
        assert_matches(actual, wanted)


def test_the_sum_is_the_sum():
    x, residual, weight, bias = rows(9, 96, torch.float32)
    for run in (pre_layer_norm_reference, pre_layer_norm_triton):
        assert torch.equal(run(x, residual, weight, bias, EPS)[1], x + residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, heads, head_dim", [(1, 12, 64), (7, 6, 32), (130, 3, 24), (3, 1, 1)])
def test_qk_norm_matches_the_reference_and_leaves_v(tokens, heads, head_dim, dtype):
    qkv, weight, bias = heads_of(tokens, heads, head_dim, dtype)
    expected, before = qkv.float(), qkv.clone()
    qk_norm_reference(expected, weight.float(), bias.float(), EPS)
    qk_norm_triton(qkv, weight, bias, EPS)
    assert_matches(qkv, expected)
    assert torch.equal(qkv[:, 2], before[:, 2])


def test_qk_norm_is_over_all_heads():
    qkv, weight, bias = heads_of(5, 4, 16, torch.float64)
    flat = qkv.flatten(2).clone()
    qk_norm_reference(qkv, weight, bias, EPS)
    for part in (0, 1):
        span = slice(64 * part, 64 * part + 64)
        x = flat[:, part]
        wanted = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + EPS).sqrt()
        torch.testing.assert_close(qkv[:, part].flatten(1), wanted * weight[span] + bias[span], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(dtype):
    x, residual, weight, bias = rows(64, 768, dtype)
    whole = pre_layer_norm_triton(x, residual, weight, bias, EPS)
    alone = pre_layer_norm_triton(x[5:6], residual[5:6], weight, bias, EPS)
    assert all(torch.equal(many[5:6], one) for many, one in zip(whole, alone, strict=True))
    qkv, weight, bias = heads_of(64, 12, 64, dtype)
    one = qkv[5:6].clone()
    qk_norm_triton(qkv, weight, bias, EPS)
    qk_norm_triton(one, weight, bias, EPS)
    assert torch.equal(qkv[5:6], one)


def test_no_tokens():
    assert [part.shape for part in pre_layer_norm_triton(*rows(0, 384, torch.float32), EPS)] == [(0, 384)] * 2
    qk_norm_triton(*heads_of(0, 4, 16, torch.float32), EPS)


def test_strided_tokens_are_read_in_place():
    x, residual, weight, bias = rows(9, 384, torch.float32)
    wide = torch.randn(9, 3 * 384, device=DEVICE)
    wide[:, 384:768] = x
    expected = pre_layer_norm_reference(x, residual, weight, bias, EPS)
    actual = pre_layer_norm_triton(wide[:, 384:768], residual, weight, bias, EPS)
    assert_matches(actual[0], expected[0])
    assert_matches(actual[1], expected[1])


def test_tokens_past_two_to_the_31_elements(far_tokens):
    _, residual, weight, bias = rows(*far_tokens.shape, torch.float16)
    expected = pre_layer_norm_reference(far_tokens.float(), residual.float(), weight.float(), bias.float(), EPS)
    assert_matches(pre_layer_norm_triton(far_tokens, residual, weight, bias, EPS)[0], expected[0])


def test_refuses_what_it_would_misread():
    x, residual, weight, bias = rows(384, 384, torch.float32)
    with pytest.raises(ValueError, match=r"rows must be contiguous, got strides \(1, 384\)"):
        pre_layer_norm_triton(x.t(), residual, weight, bias, EPS)
    with pytest.raises(ValueError, match=r"got \(3, 384\) and \(384, 384\)"):
        pre_layer_norm_triton(x, residual[:3], weight, bias, EPS)
    qkv, weight, bias = heads_of(4, 3, 16, torch.float32)
    with pytest.raises(ValueError, match="heads of a token must be contiguous"):
        qk_norm_triton(qkv.transpose(2, 3), weight, bias, EPS)
    with pytest.raises(ValueError, match=r"must be \(96,\), q's then k's, got \(48,\)"):
        qk_norm_triton(qkv, weight[:48], bias, EPS)


def test_op_contracts(monkeypatch):
    monkeypatch.undo()  # opcheck compares what torch.empty returns
    torch.library.opcheck(pre_layer_norm, (*rows(5, 384, torch.float32), EPS))
    torch.library.opcheck(qk_norm_, (*heads_of(5, 4, 16, torch.float32), EPS))
