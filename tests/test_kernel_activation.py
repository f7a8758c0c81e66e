"""SwiGLU, GeGLU and GELU: the Triton kernel against its reference."""

import pytest
import torch
from support.devices import DEVICE, DTYPES, assert_matches, pairwise, with_dtypes

from unpadded_kernels.activation import GATED, KINDS, activation, activation_reference, activation_triton

pytestmark = [
    pytest.mark.usefixtures("seed", "poison_empty"),
    # exp of a large number is infinity and a sigmoid of it 0, which numpy reports under the interpreter
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]


def inputs(tokens, intermediate, kind, dtype):
    return torch.randn(tokens, intermediate * (2 if kind in GATED else 1), device=DEVICE, dtype=dtype) * 3


@pytest.mark.parametrize("shape, kind, dtype", pairwise([(1, 3072), (7, 1536), (5, 1100), (3, 3)], KINDS, DTYPES))
def test_matches_the_reference(shape, kind, dtype):
    x = inputs(*shape, kind, dtype)
    assert_matches(activation_triton(x, kind), activation_reference(x.float(), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_large_values_stay_finite(kind):
    x = torch.tensor([[-200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0, 1.0]], device=DEVICE).repeat(2, 1)
    assert_matches(activation_triton(x, kind), activation_reference(x, kind))


@pytest.mark.parametrize("kind, approximate", [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_gelu_is_within_a_millionth(kind, approximate):
    x = torch.linspace(-12, 12, 100_000, device=DEVICE)[None]
    exact = torch.nn.functional.gelu(x.double(), approximate=approximate)
    assert (activation_triton(x, kind).double() - exact).abs().max() <= 1e-6


@pytest.mark.parametrize("kind, dtype", with_dtypes(KINDS))
def test_a_row_does_not_depend_on_its_batch(kind, dtype):
    x = inputs(20, 1100, kind, dtype)
    assert torch.equal(activation_triton(x, kind)[3:4], activation_triton(x[3:4], kind))


def test_no_tokens():
    assert activation_triton(inputs(0, 96, "swiglu", torch.float32), "swiglu").shape == (0, 96)


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_strided_tokens_are_read_in_place(kind):
    x = inputs(6, 96, kind, torch.float32)
    wide = torch.randn(6, 400, device=DEVICE)
    wide[:, 16 : 16 + x.shape[1]] = x
    assert_matches(activation_triton(wide[:, 16 : 16 + x.shape[1]], kind), activation_reference(x, kind))


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_tokens_past_two_to_the_31_elements(kind, far_tokens):
    assert_matches(activation_triton(far_tokens, kind), activation_reference(far_tokens.float(), kind))


def test_invalid_arguments_raise():
    x = torch.randn(6, 6, device=DEVICE)
    with pytest.raises(ValueError, match=r"x must be \(6, 6\) with contiguous rows"):
        activation_triton(x.t(), "gelu")
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        activation_triton(x, "relu")
    with pytest.raises(ValueError, match="even width, got 5"):
        activation_triton(x[:, :5], "swiglu")


@pytest.mark.parametrize("kind", KINDS)
def test_op_contract(kind, monkeypatch):
    monkeypatch.undo()  # opcheck compares what torch.empty returns
    torch.library.opcheck(activation, (inputs(5, 96, kind, torch.float32), kind))
