"""LayerNorm of q and of k: the Triton kernel against its reference."""

import pytest
import torch
from support.devices import DEVICE, DTYPES, assert_matches, with_dtypes

from unpadded_kernels.layer_norm import qk_norm_, qk_norm_reference, qk_norm_triton

pytestmark = pytest.mark.usefixtures("seed", "poison_empty")
EPS = 1e-5


def inputs(tokens, heads, head_dim, dtype):
    qkv = torch.randn(tokens, 3, heads, head_dim, device=DEVICE, dtype=dtype)
    weight, bias = torch.randn(2, 2 * heads * head_dim, device=DEVICE, dtype=dtype)
    return qkv, weight, bias


@pytest.mark.parametrize("shape, dtype", with_dtypes([(7, 6, 32), (1, 12, 64), (130, 3, 24), (3, 1, 1)]), ids=str)
def test_matches_the_reference_and_leaves_v(shape, dtype):
    qkv, weight, bias = inputs(*shape, dtype)
    expected, before = qkv.float(), qkv.clone()
    qk_norm_reference(expected, weight.float(), bias.float(), EPS)
    qk_norm_triton(qkv, weight, bias, EPS)
    assert_matches(qkv, expected)
    assert torch.equal(qkv[:, 2], before[:, 2])


def test_the_norm_is_over_all_heads():
    qkv, weight, bias = inputs(5, 4, 16, torch.float64)
    flat = qkv.flatten(2).clone()
    qk_norm_reference(qkv, weight, bias, EPS)
    for part in (0, 1):
        span = slice(64 * part, 64 * part + 64)
        x = flat[:, part]
        wanted = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + EPS).sqrt()
        torch.testing.assert_close(qkv[:, part].flatten(1), wanted * weight[span] + bias[span], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(dtype):
    qkv, weight, bias = inputs(64, 12, 64, dtype)
    one = qkv[5:6].clone()
    qk_norm_triton(qkv, weight, bias, EPS)
    qk_norm_triton(one, weight, bias, EPS)
    assert torch.equal(qkv[5:6], one)


def test_no_tokens():
    qk_norm_triton(*inputs(0, 4, 16, torch.float32), EPS)


def test_invalid_arguments_raise():
    qkv, weight, bias = inputs(4, 3, 16, torch.float32)
    with pytest.raises(ValueError, match="heads of a token must be contiguous"):
        qk_norm_triton(qkv.transpose(2, 3), weight, bias, EPS)
    with pytest.raises(ValueError, match=r"weight must be \(96,\).*got \(48,\)"):
        qk_norm_triton(qkv, weight[:48], bias, EPS)


def test_op_contract(monkeypatch):
    monkeypatch.undo()  # opcheck compares what torch.empty returns
    torch.library.opcheck(qk_norm_, (*inputs(5, 4, 16, torch.float32), EPS))
