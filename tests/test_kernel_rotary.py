"""Rotary position embedding: the table against float64, and the Triton kernel against its reference."""

import pytest
import torch
from support.devices import DEVICE, DTYPES, assert_matches, packed, with_dtypes

from unpadded_kernels.rotary import (
    rotary_,
    rotary_cos_sin,
    rotary_reference,
    rotary_triton,
)

pytestmark = pytest.mark.usefixtures("seed", "poison_empty")
RAGGED = [[1], [7], [1, 65, 33], [3, 0, 40], [0, 0, 5, 0], [2] * 50]


def positions_of(lengths):
    return torch.cat([torch.arange(length, device=DEVICE) for length in lengths]).to(torch.int32)


def inputs(tokens, heads, head_dim, dtype):
    qkv = torch.randn(tokens, 3, heads, head_dim, device=DEVICE, dtype=dtype)
    angle = torch.rand(tokens, head_dim // 2, device=DEVICE) * 100
    return qkv, torch.cat((angle.cos(), angle.sin()), dim=-1)


def rotated(qkv, cos_sin):
    qkv = qkv.float().clone()
    rotary_reference(qkv, cos_sin)
    return qkv


@pytest.mark.parametrize("shape, dtype", with_dtypes([(7, 3, 32), (1, 12, 64), (33, 5, 96), (4, 1, 6)]), ids=str)
def test_matches_the_reference_and_leaves_v(shape, dtype):
    qkv, cos_sin = inputs(*shape, dtype)
    expected, v = rotated(qkv, cos_sin), qkv[:, 2].clone()
    rotary_triton(qkv, cos_sin)
    assert_matches(qkv, expected)
    assert torch.equal(qkv[:, 2], v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(dtype):
    qkv, cos_sin = inputs(20, 12, 64, dtype)
    alone = qkv[4:5].clone()
    rotary_triton(qkv, cos_sin)
    rotary_triton(alone, cos_sin[4:5])
    assert torch.equal(qkv[4:5], alone)


def test_strided_tokens_and_heads_are_rotated_in_place():
    qkv, cos_sin = inputs(9, 3, 32, torch.float32)
    wide = torch.randn(9, 4, 5, 48, device=DEVICE)
    before = wide.clone()
    wide[:, :3, 1:4, 8:40] = qkv
    rotary_triton(wide[:, :3, 1:4, 8:40], cos_sin)
    assert_matches(wide[:, :3, 1:4, 8:40], rotated(qkv, cos_sin))
    wide[:, :3, 1:4, 8:40] = before[:, :3, 1:4, 8:40]
    assert torch.equal(wide, before)


def test_tokens_past_two_to_the_31_elements(far_tokens):
    _, cos_sin = inputs(5, 2, 32, torch.float32)
    qkv = far_tokens.unflatten(1, (3, 2, 32))
    expected = rotated(qkv, cos_sin)
    rotary_triton(qkv, cos_sin)
    assert_matches(qkv, expected)


def test_no_tokens():
    rotary_triton(*inputs(0, 3, 32, torch.float32))
    empty = torch.empty(0, device=DEVICE, dtype=torch.int32)
    assert rotary_cos_sin(empty, torch.ones(1, 16, device=DEVICE), packed([0])).shape == (0, 32)


def test_invalid_arguments_raise():
    qkv, cos_sin = inputs(4, 2, 32, torch.float32)
    with pytest.raises(ValueError, match=r"qkv must be \(4, 3, 2, 32\) with contiguous rows"):
        rotary_triton(qkv.transpose(2, 3).contiguous().transpose(2, 3), cos_sin)
    with pytest.raises(ValueError, match=r"cos_sin must be contiguous fp32 of \(4, 32\), got torch.float16"):
        rotary_triton(qkv, cos_sin.half())
    with pytest.raises(ValueError, match=r"cos_sin must be contiguous fp32 of \(4, 32\)"):
        rotary_triton(qkv, cos_sin[:3])
    with pytest.raises(ValueError, match=r"fp32 of \(4, 31\)"):
        rotary_triton(qkv[..., :31], cos_sin)


@pytest.mark.parametrize("lengths", RAGGED, ids=str)
def test_cos_sin_of_texts_with_their_own_frequencies(lengths):
    inv_freq = torch.rand(len(lengths), 12, device=DEVICE)
    positions = positions_of(lengths) + 1  # at position 0 all frequencies have one angle
    actual = rotary_cos_sin(positions, inv_freq, packed(lengths))
    for part, own, text in zip(actual.split(lengths), positions.split(lengths), inv_freq, strict=True):
        assert torch.equal(part, rotary_cos_sin(own, text[None], packed([len(own)])))


def test_cos_sin_of_rows_after_the_last_text():
    """The rows of a CUDA graph that no text of the batch fills."""
    cos_sin = rotary_cos_sin(positions_of([9]), torch.rand(2, 12, device=DEVICE), packed([2, 3]))
    assert cos_sin.shape == (9, 24) and cos_sin.isfinite().all()


def test_cos_sin_is_accurate_at_every_position():
    """Against float64: the angle is fp32 by definition, and its cosine and sine must add no error."""
    positions = torch.arange(0, 65536, 7, device=DEVICE, dtype=torch.int32)
    inv_freq = 1000.0 ** -(torch.arange(32, device=DEVICE) / 32)[None]
    angle = (positions.float()[:, None] * inv_freq).double()
    exact = torch.cat((angle.cos(), angle.sin()), dim=-1).float()
    actual = rotary_cos_sin(positions, inv_freq, packed([len(positions)]))
    torch.testing.assert_close(actual, exact, atol=2.5e-7, rtol=0)


def test_op_contract(monkeypatch):
    monkeypatch.undo()  # opcheck compares what torch.empty returns
    torch.library.opcheck(rotary_, inputs(5, 2, 32, torch.float32))
    lengths = [2, 3]
    arguments = positions_of(lengths), torch.rand(2, 16, device=DEVICE), packed(lengths)
    torch.library.opcheck(rotary_cos_sin, arguments)
