"""Residual add + RMSNorm: the Triton kernel against its reference."""

import pytest
import torch
from support.devices import DEVICE, DTYPES, assert_matches, pairwise, with_dtypes

from unpadded_kernels.layer_norm import rms_norm, rms_norm_reference, rms_norm_triton

pytestmark = pytest.mark.usefixtures("seed", "poison_empty")
EPS = 1e-5


def inputs(tokens, hidden, dtype):
    x, residual = torch.randn(2, tokens, hidden, device=DEVICE, dtype=dtype)
    return x, residual, torch.randn(hidden, device=DEVICE, dtype=dtype)


@pytest.mark.parametrize(
    "shape, has_residual, dtype",
    pairwise([(1, 384), (7, 1152), (130, 1000), (3, 5), (4, 1)], [True, False], DTYPES),
)
def test_matches_the_reference(shape, has_residual, dtype):
    x, residual, weight = inputs(*shape, dtype)
    residual = residual if has_residual else None
    expected = rms_norm_reference(x.float(), residual.float() if has_residual else None, weight.float(), EPS)
    for actual, wanted in zip(rms_norm_triton(x, residual, weight, EPS), expected, strict=True):
        assert_matches(actual, wanted)


def test_the_reference_is_the_published_formula():
    x, residual, weight = inputs(9, 96, torch.float32)
    h = (x + residual).double()
    y, total = rms_norm_reference(x, residual, weight, EPS)
    torch.testing.assert_close(y.double(), h / (h.pow(2).mean(1, keepdim=True) + EPS).sqrt() * weight)
    assert torch.equal(total, x + residual)


def test_eps_is_used_when_the_row_is_small():
    x, _, weight = inputs(4, 96, torch.float32)
    for eps in (1e-5, 1e-12):
        small = (x * 1e-3, None, weight, eps)
        assert_matches(rms_norm_triton(*small)[0], rms_norm_reference(*small)[0])


@pytest.mark.parametrize("run, dtype", with_dtypes([rms_norm_triton, rms_norm]))
def test_a_row_does_not_depend_on_its_batch(run, dtype):
    x, residual, weight = inputs(64, 2304, dtype)
    whole = run(x, residual, weight, EPS)
    alone = run(x[5:6], residual[5:6], weight, EPS)
    assert all(torch.equal(many[5:6], one) for many, one in zip(whole, alone, strict=True))


def test_no_tokens():
    assert [part.shape for part in rms_norm_triton(*inputs(0, 384, torch.float32), EPS)] == [(0, 384)] * 2


def test_strided_tokens_are_read_in_place():
    x, residual, weight = inputs(9, 384, torch.float32)
    wide = torch.randn(9, 3 * 384, device=DEVICE)
    wide[:, 384:768] = x
    expected = rms_norm_reference(x, residual, weight, EPS)
    for actual, wanted in zip(rms_norm_triton(wide[:, 384:768], residual, weight, EPS), expected, strict=True):
        assert_matches(actual, wanted)


def test_tokens_past_two_to_the_31_elements(far_tokens):
    _, residual, weight = inputs(*far_tokens.shape, torch.float16)
    expected = rms_norm_reference(far_tokens.float(), residual.float(), weight.float(), EPS)
    assert_matches(rms_norm_triton(far_tokens, residual, weight, EPS)[0], expected[0])


def test_invalid_arguments_raise():
    x, residual, weight = inputs(384, 384, torch.float32)
    with pytest.raises(ValueError, match=r"x must be \(384, 384\) with contiguous rows.*strides \(1, 384\)"):
        rms_norm_triton(x.t(), None, weight, EPS)
    with pytest.raises(ValueError, match=r"residual must be \(384, 384\).*got \(3, 384\)"):
        rms_norm_triton(x, residual[:3], weight, EPS)


def test_op_contract(monkeypatch):
    monkeypatch.undo()  # opcheck compares what torch.empty returns
    x, residual, weight = inputs(5, 384, torch.float32)
    torch.library.opcheck(rms_norm, (x, residual, weight, EPS))
    torch.library.opcheck(rms_norm, (x, None, weight, EPS))
