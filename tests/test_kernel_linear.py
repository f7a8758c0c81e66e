"""`linear_invariant`, alone and with the activation in the same pass: the Triton kernel with both kinds of loads."""

import sys

import pytest
import torch
import torch.nn.functional as F
from support.devices import DEVICE, DTYPES, HAS_CUDA, assert_matches

from unpadded_kernels.activation import GATED, KINDS, activation_triton
from unpadded_kernels.linear import (
    FUSES_ACTIVATION,
    linear_activation_triton,
    linear_invariant,
    linear_invariant_reference,
    linear_invariant_triton,
)

pytestmark = [
    pytest.mark.usefixtures("seed", "poison_empty"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # numpy, for a sigmoid that is 0
]


def inputs(tokens, in_features, rows, dtype, bias=True):
    x = torch.randn(tokens, in_features, device=DEVICE, dtype=dtype)
    weight = (torch.randn(rows, in_features, device=DEVICE) * in_features**-0.5).to(dtype)
    return x, weight, torch.randn(rows, device=DEVICE, dtype=dtype) if bias else None


def expected(x, weight, bias, kind=None):
    return linear_invariant_reference(x.float(), weight.float(), None if bias is None else bias.float(), kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tokens, in_features, rows, bias",
    [(1, 96, 128, True), (7, 128, 384, False), (300, 64, 136, True), (5, 100, 70, False)],
)
def test_matches_the_reference(tokens, in_features, rows, bias, dtype, kernel):
    tensors = inputs(tokens, in_features, rows, dtype, bias)
    assert_matches(linear_invariant_triton(*tensors), expected(*tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind, bias", [("swiglu", True), ("geglu", False), ("gelu", True), ("gelu_tanh", False)])
def test_activation_in_the_same_pass(kind, bias, dtype, kernel):
    for tokens, in_features, rows in ((130, 64, 400), (3, 72, 48)):
        tensors = inputs(tokens, in_features, rows, dtype, bias)
        assert_matches(linear_invariant_triton(*tensors, kind), expected(*tensors, kind))


@pytest.mark.parametrize(
    "kind, dtype",
    [(None, torch.float32), ("swiglu", torch.float16), pytest.param(None, torch.bfloat16, marks=pytest.mark.gpu)],
)
def test_a_row_does_not_depend_on_its_batch(kind, dtype, kernel):
    x, weight, bias = inputs(300, 96, 272, dtype)
    whole = linear_invariant_triton(x, weight, bias, kind)
    # in the interpreter a row's bits depend on its place in the tile, because numpy's matmul does
    starts = (0, 131, 299) if HAS_CUDA else (0, 128, 256)
    for rows in (slice(start, start + count) for start in starts for count in (1, 2, 140)):
        assert torch.equal(linear_invariant_triton(x[rows], weight, bias, kind), whole[rows])


def test_the_number_of_programs_changes_no_bit(kernel, monkeypatch):
    x, weight, bias = inputs(300, 96, 272, torch.float16)
    module = sys.modules["unpadded_kernels.linear"]  # the package's attribute is the op
    results = []
    for programs in (1, 2, 5):
        monkeypatch.setattr(module, "multiprocessors", lambda device, programs=programs: programs)
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["library", "triton"])
def test_the_way_to_an_activation_is_chosen(way, kind, kernel, monkeypatch):
    x, weight, bias = inputs(20, 96, 256, torch.float16)
    library = activation_triton(F.linear(x, weight, bias), kind)
    for generation in FUSES_ACTIVATION:
        monkeypatch.setitem(FUSES_ACTIVATION, generation, way == "triton")
    actual = linear_activation_triton(x, weight, bias, kind)
    assert torch.equal(actual, library if way == "library" else linear_invariant_triton(x, weight, bias, kind))
    assert_matches(library, expected(x, weight, bias, kind))


def test_invalid_arguments_are_rejected():
    x, weight, bias = inputs(96, 96, 128, torch.float32)
    with pytest.raises(ValueError, match=r"x must be \(96, 96\) with contiguous rows"):
        linear_invariant_triton(x.t(), weight, bias)
    with pytest.raises(ValueError, match=r"weight must be \(128, 96\).*got \(128, 95\)"):
        linear_invariant_triton(x, weight[:, :95], bias)
    with pytest.raises(ValueError, match=r"bias must be \(128,\).*got \(127,\)"):
        linear_invariant_triton(x, weight, bias[:127])
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        linear_invariant_triton(x, weight, bias, "relu")


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_op_contract(kind, monkeypatch):
    monkeypatch.undo()  # opcheck compares what torch.empty returns
    torch.library.opcheck(linear_invariant, (*inputs(5, 96, 128, torch.float32), kind))


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_op_matches_the_reference(kind):
    tensors = inputs(9, 96, 128, torch.float32)
    actual = linear_invariant(*tensors, kind)
    assert_matches(actual, expected(*tensors, kind))
    assert actual.shape == (9, 64 if kind in GATED else 128)
