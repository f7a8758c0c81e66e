"""`linear_rotary` as a matmul and `rotary_`, by the library and by Triton with both kinds of loads."""

import pytest
import torch
import torch.nn.functional as F
from support.devices import DEVICE, DTYPES, HAS_CUDA, assert_matches

from unpadded_kernels import linear, rotary_
from unpadded_kernels.choices import override
from unpadded_kernels.linear import (
    linear_invariant_triton,
    linear_rotary,
    linear_rotary_reference,
    linear_rotary_triton,
)
from unpadded_kernels.rotary import rotary_triton

pytestmark = pytest.mark.usefixtures("seed", "poison_empty")


def inputs(tokens, heads, head_dim, dtype, bias=True, in_features=96):
    x = torch.randn(tokens, in_features, device=DEVICE, dtype=dtype)
    rows = 3 * heads * head_dim
    weight = (torch.randn(rows, in_features, device=DEVICE) * in_features**-0.5).to(dtype)
    angle = torch.rand(tokens, head_dim // 2, device=DEVICE) * 100
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=-1)
    return x, weight, torch.randn(rows, device=DEVICE, dtype=dtype) if bias else None, cos_sin, heads, True


def expected(x, weight, bias, cos_sin, heads, invariant):
    return linear_rotary_reference(x.float(), weight.float(), None if bias is None else bias.float(), cos_sin, heads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "tokens, heads, head_dim, bias",
    [(1, 3, 32, True), (7, 3, 64, False), (130, 2, 64, True), (33, 2, 96, True), (5, 3, 128, False), (3, 2, 6, False)],
)
def test_matches_the_reference(tokens, heads, head_dim, bias, dtype, kernel):
    tensors = inputs(tokens, heads, head_dim, dtype, bias)
    assert_matches(linear_rotary_triton(*tensors), expected(*tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_v_does_not_depend_on_the_table(dtype, kernel):
    x, weight, bias, cos_sin, heads, _ = inputs(40, 3, 32, dtype)
    qkv = linear_rotary_triton(x, weight, bias, cos_sin, heads, True)
    with_nan = linear_rotary_triton(x, weight, bias, torch.full_like(cos_sin, float("nan")), heads, True)
    assert torch.equal(with_nan[:, 2], qkv[:, 2]) and with_nan[:, :2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(dtype, kernel):
    x, weight, bias, cos_sin, heads, _ = inputs(300, 3, 32, dtype)
    whole = linear_rotary_triton(x, weight, bias, cos_sin, heads, True)
    # in the interpreter a row's bits depend on its place in the tile, because numpy's matmul does
    starts = (0, 131, 299) if HAS_CUDA else (0, 128, 256)
    for rows in (slice(start, start + count) for start in starts for count in (1, 2, 140)):
        assert torch.equal(linear_rotary_triton(x[rows], weight, bias, cos_sin[rows], heads, True), whole[rows])


@pytest.mark.parametrize("head_dim", [32, 6])
def test_no_tokens(head_dim, kernel):
    assert linear_rotary_triton(*inputs(0, 3, head_dim, torch.float16)).shape == (0, 3, 3, head_dim)


@pytest.mark.parametrize("invariant", [False, True])
def test_rotary_follows_the_matmul(invariant, kernel):
    x, weight, bias, cos_sin, heads, _ = inputs(9, 3, 32, torch.float16)
    matmul = linear_invariant_triton if invariant else F.linear
    qkv = matmul(x, weight, bias).view(9, 3, 3, 32)
    rotary_triton(qkv, cos_sin)
    with override(linear_rotary="library"):
        assert torch.equal(linear_rotary_triton(x, weight, bias, cos_sin, heads, invariant), qkv)


def test_invalid_arguments_are_rejected():
    x, weight, bias, cos_sin, heads, _ = inputs(4, 3, 32, torch.float32)
    with pytest.raises(ValueError, match=r"weight must be \(384, 96\).*got \(288, 96\)"):
        linear_rotary_triton(x, weight, bias, cos_sin, 4)
    with pytest.raises(ValueError, match=r"cos_sin must be contiguous fp32 of \(4, 32\), got torch.float32 of \(3, 32"):
        linear_rotary_triton(x, weight, bias, cos_sin[:3], heads)
    with pytest.raises(ValueError, match="cos_sin must be contiguous"):
        linear_rotary_triton(x, weight, bias, cos_sin.repeat(1, 2)[:, :32], heads)


def test_op_contract(monkeypatch):
    monkeypatch.undo()  # opcheck compares what torch.empty returns
    torch.library.opcheck(linear_rotary, inputs(5, 2, 32, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(HAS_CUDA, reason="tests the CPU body")
def test_on_a_cpu_the_op_is_linear_and_rotary(dtype):
    x, weight, bias, cos_sin, heads, _ = inputs(9, 3, 32, dtype)
    qkv = linear(x, weight, bias).view(9, 3, 3, 32)
    rotary_(qkv, cos_sin)
    assert torch.equal(linear_rotary(x, weight, bias, cos_sin, heads), qkv)
