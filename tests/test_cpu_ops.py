"""The CPU bodies of ops: against their references in float64, and bit for bit row by row."""

import itertools
import sys

import pytest
import torch

from unpadded_kernels import (
    add_layer_norm,
    attention,
    avx512,
    embedding,
    linear,
    linear_activation,
    mean_pool,
    pre_layer_norm,
    rms_norm,
    rotary_,
    rotary_cos_sin,
)
from unpadded_kernels.activation import KINDS
from unpadded_kernels.attention import attention_reference
from unpadded_kernels.layer_norm import pre_layer_norm_reference, rms_norm_reference
from unpadded_kernels.linear import linear_activation_reference, linear_reference
from unpadded_kernels.linear_cpu import pad_rows

ERROR = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # relative, Frobenius
BOTH = pytest.mark.parametrize("dtype", ERROR, ids=str)


@pytest.fixture(params=["avx512", "onednn", "torch"], autouse=True)
def library(request, monkeypatch):
    """Run the kernels for AVX-512 as far as the processor has them, and as on one without them, or without oneDNN."""
    torch.manual_seed(0)
    if request.param == "avx512":
        if not avx512.supports(torch.float32):
            pytest.skip("needs AVX-512 and a C compiler")
    else:
        monkeypatch.setattr(avx512, "supports", lambda dtype: False)
    if request.param == "torch":
        monkeypatch.setattr(sys.modules["unpadded_kernels.linear_cpu"], "onednn_supports", lambda dtype: False)
    return request.param


def assert_close(actual, expected, dtype):
    error = (actual.double() - expected).norm() / expected.norm()
    assert actual.dtype == dtype and error <= ERROR[dtype], float(error)


def draw(*shape, dtype):
    return torch.randn(*shape).to(dtype)


@BOTH
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 130])
def test_linear(dtype, bias, rows):
    x, weight = draw(rows, 96, dtype=dtype), draw(200, 96, dtype=dtype)
    added = draw(200, dtype=dtype) if bias else None
    actual = linear(x, weight, added)
    assert actual.shape == (rows, 200)
    if rows:
        expected = linear_reference(x.double(), weight.double(), None if added is None else added.double())
        assert_close(actual, expected, dtype)
        alone = torch.cat([linear(row, weight, added) for row in x.split(1)])
        assert torch.equal(actual, alone)


@BOTH
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1, 2, 9])
def test_linear_activation(dtype, bias, kind, rows):
    x, weight = draw(rows, 96, dtype=dtype), draw(128, 96, dtype=dtype) / 10
    added = draw(128, dtype=dtype) if bias else None
    actual = linear_activation(x, weight, added, kind)
    assert actual.shape == (rows, 64 if kind in ("swiglu", "geglu") else 128)
    if rows:
        before = linear_reference(x.double(), weight.double(), None if added is None else added.double())
        # the reference of an activation computes in fp32
        expected = linear_activation_reference(before, torch.eye(128).double(), None, kind)
        assert_close(actual, expected, dtype)
        alone = torch.cat([linear_activation(row, weight, added, kind) for row in x.split(1)])
        assert torch.equal(actual, alone)


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
def test_matmuls_in_blocks_of_rows(monkeypatch, kind, rows):
    """As on a processor with AMX."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    x, weight, bias = (draw(*shape, dtype=torch.bfloat16) for shape in ((300, 400), (128, 400), (128,)))

    def run(x):
        return linear(x, weight, bias) if kind is None else linear_activation(x, weight, bias, kind)

    reference = linear_reference(x, weight, bias)
    if kind is not None:
        reference = linear_activation_reference(x, weight, bias, kind)
    assert_close(run(x), reference, torch.bfloat16)
    assert torch.equal(run(x[:rows]), run(x)[:rows])


def test_few_numbers_of_rows_are_computed():
    found = [len(pad_rows(torch.empty(rows, 1))) for rows in range(1, 1025)]
    assert all(rows <= up < rows + 32 and up % 8 == 0 for rows, up in enumerate(found, 1))
    assert len(set(found)) == 16 + 28  # up to 128 and from there


def test_an_unknown_activation_raises():
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        linear_activation(torch.ones(2, 4), torch.ones(4, 4), None, "relu")


@BOTH
@pytest.mark.parametrize("head_dim", [16, 32, 64, 256])  # 256 exceeds what the Triton kernel supports
def test_attention(dtype, head_dim):
    """Runs of equal lengths, long texts, and texts without tokens."""
    lengths = [1, 0, 2, 7, 40, 40, 40, 320, 321, 0, 513, 768, 769, 3, 3]
    qkv = draw(sum(lengths), 3, 2, head_dim, dtype=dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    scale = head_dim**-0.5
    actual = attention(qkv, cu_seqlens, max(lengths), scale)
    assert_close(actual, attention_reference(qkv.double(), cu_seqlens, max(lengths), scale), dtype)
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        one = torch.tensor([0, end - start], dtype=torch.int32)
        assert torch.equal(attention(qkv[start:end].clone(), one, end - start, scale), actual[start:end])


@BOTH
def test_attention_of_groups_of_short_texts(dtype):
    lengths = [62] * 3 + [63] * 9 + [64] * 9 + [65] * 10 + [128] * 5 + [1] * 3 + [64] * 2
    qkv, cu_seqlens = draw(sum(lengths), 3, 2, 32, dtype=dtype), torch.tensor([0, *lengths]).cumsum(0).int()
    actual = attention(qkv, cu_seqlens, 128, 32**-0.5)
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        own, one = qkv[start:end].clone(), torch.tensor([0, end - start], dtype=torch.int32)
        assert torch.equal(attention(own, one, end - start, 32**-0.5), actual[start:end])
        assert_close(actual[start:end], attention_reference(own.double(), one, end - start, 32**-0.5), dtype)


@BOTH
def test_attention_in_a_window_and_with_slopes(dtype):
    qkv = draw(120, 3, 2, 16, dtype=dtype)
    cu_seqlens, slopes = torch.tensor([0, 50, 120], dtype=torch.int32), torch.tensor([0.5, 0.0625])
    actual = attention(qkv, cu_seqlens, 70, 0.25, 8, slopes)
    for start, end in ((0, 50), (50, 120)):
        q, k, v = qkv[start:end].double().permute(1, 2, 0, 3)
        distance = (torch.arange(end - start)[:, None] - torch.arange(end - start)).abs()
        scores = q @ k.transpose(1, 2) * 0.25 - slopes.double()[:, None, None] * distance
        weights = scores.masked_fill(distance > 8, float("-inf")).softmax(-1)
        assert_close(actual[start:end], (weights @ v).transpose(0, 1).flatten(1), dtype)


@BOTH
@pytest.mark.parametrize(("window", "lengths"), [(None, (162, 171, 80)), (16, (196, 129)), (None, (300, 1000))])
def test_attention_with_many_threads_does_not_depend_on_the_batch(dtype, window, lengths):
    """torch lays out the keys by the number of texts, queries and threads."""
    threads = torch.get_num_threads()
    slopes = torch.rand(12) if window is None and max(lengths) < 1000 else None
    torch.set_num_threads(64)
    try:
        for length in lengths:
            qkv, cu_seqlens = draw(7 * length, 3, 12, 32, dtype=dtype), length * torch.arange(8, dtype=torch.int32)
            actual = attention(qkv, cu_seqlens, length, 0.25, window, slopes)
            assert torch.equal(attention(qkv[:length], cu_seqlens[:2], length, 0.25, window, slopes), actual[:length])
    finally:
        torch.set_num_threads(threads)


@BOTH
@pytest.mark.parametrize("hidden", [16, 100, 768])
def test_norms(dtype, hidden):
    x, residual = draw(7, 2 * hidden, dtype=dtype)[:, :hidden], draw(7, hidden, dtype=dtype) + 3
    weight, bias = draw(hidden, dtype=dtype), draw(hidden, dtype=dtype)
    expected = pre_layer_norm_reference(*(tensor.float() for tensor in (x, residual, weight, bias)), 1e-5)
    for found, right in zip(pre_layer_norm(x, residual, weight, bias, 1e-5), expected, strict=True):
        assert_close(found, right.double(), dtype)
    assert_close(add_layer_norm(x, residual, weight, bias, 1e-5), expected[0].double(), dtype)
    for second in (residual, None):
        right = rms_norm_reference(x.float(), None if second is None else second.float(), weight.float(), 1e-5)
        for found, one in zip(rms_norm(x, second, weight, 1e-5), right, strict=True):
            assert_close(found, one.double(), dtype)
    alone = torch.cat(
        [add_layer_norm(*rows, weight, bias, 1e-5) for rows in zip(x.split(1), residual.split(1), strict=True)]
    )
    assert torch.equal(alone, add_layer_norm(x, residual, weight, bias, 1e-5))


@BOTH
@pytest.mark.parametrize("given", [(True, True), (False, True), (True, False)], ids=["all", "one type", "words"])
def test_embedding(dtype, given):
    with_types, with_positions = given
    word, types, position = (draw(rows, 200, dtype=dtype)[:, :100] for rows in (61, 3, 40))  # strided
    weight, bias = draw(2, 100, dtype=dtype)
    ids = [torch.randint(limit, (900,), dtype=torch.int32) for limit in (61, 3, 40)]
    sums = word[ids[0]].double()
    if with_positions:
        sums += position[ids[2]].double()
        sums += (types[ids[1]] if with_types else types[0]).double()
    expected = torch.nn.functional.layer_norm(sums, (100,), weight.double(), bias.double(), 1e-5)
    tables = word, types if with_positions else None, position if with_positions else None
    found = embedding(ids[0], ids[2], ids[1] if with_types else None, *tables, weight, bias, 1e-5)
    assert_close(found, expected, dtype)


def test_mean_of_a_text_without_tokens_is_zero_and_others_match_a_mean_in_float64():
    hidden, lengths = torch.randn(1200, 100)[:, :70], [0, 1, 1100, 0, 99]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    rows = mean_pool(hidden, cu_seqlens)
    assert torch.equal(rows[[0, 3]], torch.zeros(2, 70))
    for row, start, end in zip(rows, cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        if start < end:
            expected = hidden[start:end].double().mean(0)
            torch.testing.assert_close(row.double(), expected, atol=1e-6, rtol=1e-6)
            one = torch.tensor([0, end - start], dtype=torch.int32)
            assert torch.equal(mean_pool(hidden[start:end], one)[0], row)


@BOTH
def test_rotary_rotates_q_and_k_by_position_and_leaves_v(dtype):
    """As complex numbers in float64, with frequencies per text."""
    lengths, heads, half = [600, 5], 2, 8
    cu_seqlens, positions = (
        torch.tensor([0, 600, 605], dtype=torch.int32),
        torch.cat([torch.arange(n) for n in lengths]),
    )
    inv_freq = torch.rand(2, half)
    qkv = draw(605, 3, heads, 2 * half, dtype=dtype)
    rotated = qkv.clone()
    rotary_(rotated, rotary_cos_sin(positions.int(), inv_freq, cu_seqlens))
    assert torch.equal(rotated[:, 2], qkv[:, 2])
    angle = (positions[:, None].float() * inv_freq.repeat_interleave(torch.tensor(lengths), 0)).double()
    first, second = qkv[:, :2].double().chunk(2, -1)
    expected = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)[:, None, None]
    assert_close(rotated[:, :2], torch.cat((expected.real, expected.imag), -1), dtype)
