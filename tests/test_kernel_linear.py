"""Matrix products with fixed tiles, alone and with the activation in the same pass: both Triton kernels."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.devices import DEVICE, DTYPES, HAS_CUDA, assert_matches

from unpadded_kernels.activation import GATED, KINDS
from unpadded_kernels.linear import (
    linear_activation_reference,
    linear_activation_triton,
    linear_invariant,
    linear_invariant_reference,
    linear_invariant_triton,
)

pytestmark = [
    pytest.mark.usefixtures("seed", "poison_empty"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # numpy, of a sigmoid that is 0
]


def inputs(tokens, in_features, rows, dtype, bias=True):
    x = torch.randn(tokens, in_features, device=DEVICE, dtype=dtype)
    weight = (torch.randn(rows, in_features, device=DEVICE) * in_features**-0.5).to(dtype)
    return x, weight, torch.randn(rows, device=DEVICE, dtype=dtype) if bias else None


def expected(x, weight, bias, kind=None):
    return linear_invariant_reference(x.float(), weight.float(), None if bias is None else bias.float(), kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens, in_features, rows", [(1, 96, 128), (7, 128, 384), (300, 64, 136), (5, 100, 70)])
def test_matches_the_reference(tokens, in_features, rows, bias, dtype, kernel):
    tensors = inputs(tokens, in_features, rows, dtype, bias)
    assert_matches(linear_invariant_triton(*tensors), expected(*tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_in_the_same_pass(kind, bias, dtype, kernel):
    for tokens, in_features, rows in ((130, 64, 400), (3, 72, 48)):
        tensors = inputs(tokens, in_features, rows, dtype, bias)
        assert_matches(linear_invariant_triton(*tensors, kind), expected(*tensors, kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [None, "swiglu"])
def test_a_row_does_not_depend_on_its_batch(kind, dtype, kernel):
    x, weight, bias = inputs(300, 96, 272, dtype)
    whole = linear_invariant_triton(x, weight, bias, kind)
    # numpy's product, under the interpreter, gives a row bits that depend on its place in the tile
    starts = (0, 131, 299) if HAS_CUDA else (0, 128, 256)
    for rows in (slice(start, start + count) for start in starts for count in (1, 2, 140)):
        assert torch.equal(linear_invariant_triton(x[rows], weight, bias, kind), whole[rows])


def test_how_many_programs_run_changes_no_bit(kernel, monkeypatch):
    x, weight, bias = inputs(300, 96, 272, torch.float16)
    module = sys.modules["unpadded_kernels.linear"]  # the package's attribute is the op
    own = module.linear_tile(x.dtype, "gated", 80 if kernel == "pointers" else 90)
    results = []
    for tile in (own, replace(own, at_once=2), replace(own, at_once=5)):
        monkeypatch.setattr(module, "linear_tile", lambda *_, tile=tile: tile)
        results.append(linear_invariant_triton(x, weight, bias, "swiglu"))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_no_tokens(kernel):
    assert linear_invariant_triton(*inputs(0, 96, 128, torch.float16)).shape == (0, 128)
    assert linear_invariant_triton(*inputs(0, 96, 128, torch.float16), "swiglu").shape == (0, 64)


@pytest.mark.parametrize("kind", [None, "swiglu"])
def test_strided_rows_are_read_in_place(kind, kernel):
    x, weight, bias = inputs(9, 96, 128, torch.float16)
    wide_x, wide_weight = torch.randn(9, 3 * 96, device=DEVICE).half(), torch.randn(128, 200, device=DEVICE).half()
    wide_x[:, 96:192], wide_weight[:, 16:112] = x, weight
    actual = linear_invariant_triton(wide_x[:, 96:192], wide_weight[:, 16:112], bias, kind)
    assert_matches(actual, expected(x, weight, bias, kind))


def test_tokens_past_two_to_the_31_elements(far_tokens, kernel):
    _, weight, bias = inputs(5, 192, 64, torch.float16)
    assert_matches(linear_invariant_triton(far_tokens, weight, bias), expected(far_tokens, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_library_product_and_the_activation(kind, dtype):
    """What linear_activation runs on CUDA where the fused kernel is not known to be faster."""
    tensors = inputs(20, 96, 256, dtype)
    torch.testing.assert_close(
        linear_activation_triton(*tensors, kind), linear_activation_reference(*tensors, kind), atol=2e-3, rtol=2e-3
    )


def test_refusals():
    x, weight, bias = inputs(96, 96, 128, torch.float32)
    with pytest.raises(ValueError, match="rows must be contiguous"):
        linear_invariant_triton(x.t(), weight, bias)
    with pytest.raises(ValueError, match=r"weight must be \[out_features, 96\].*got \(128, 95\)"):
        linear_invariant_triton(x, weight[:, :95], bias)
    with pytest.raises(ValueError, match=r"and \(127,\)"):
        linear_invariant_triton(x, weight, bias[:127])
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        linear_invariant_triton(x, weight, bias, "relu")


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_op_contract(kind, monkeypatch):
    monkeypatch.undo()  # opcheck compares what torch.empty returns
    torch.library.opcheck(linear_invariant, (*inputs(5, 96, 128, torch.float32), kind))


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_op_is_the_product_and_the_activation(kind):
    x, weight, bias = inputs(9, 96, 128, torch.float32)
    product = F.linear(x, weight, bias)
    assert_matches(linear_invariant(x, weight, bias, kind), expected(x, weight, bias, kind))
    assert linear_invariant(x, weight, bias, kind).shape[1] == product.shape[1] // (2 if kind in GATED else 1)
