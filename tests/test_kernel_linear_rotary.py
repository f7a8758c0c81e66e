"""qkv with q and k turned in the product's own pass: both Triton kernels, and the two steps they replace."""

import pytest
import torch
from support.devices import DEVICE, DTYPES, HAS_CUDA, assert_matches

from unpadded_kernels import linear, rotary_
from unpadded_kernels.linear_rotary import linear_rotary, linear_rotary_reference, linear_rotary_triton

pytestmark = pytest.mark.usefixtures("seed", "poison_empty")


def inputs(tokens, heads, head_dim, dtype, bias=True, in_features=96):
    x = torch.randn(tokens, in_features, device=DEVICE, dtype=dtype)
    rows = 3 * heads * head_dim
    weight = (torch.randn(rows, in_features, device=DEVICE) * in_features**-0.5).to(dtype)
    angle = torch.rand(tokens, head_dim // 2, device=DEVICE) * 100
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=-1)
    return x, weight, torch.randn(rows, device=DEVICE, dtype=dtype) if bias else None, cos_sin, heads


def expected(x, weight, bias, cos_sin, heads):
    return linear_rotary_reference(
        x.float(), weight.float(), None if bias is None else bias.float(), cos_sin, heads, False
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "tokens, heads, head_dim", [(1, 3, 32), (7, 3, 64), (130, 2, 64), (33, 2, 96), (5, 3, 128), (3, 2, 6), (9, 5, 2)]
)
def test_matches_the_reference(tokens, heads, head_dim, bias, dtype, kernel):
    tensors = inputs(tokens, heads, head_dim, dtype, bias)
    assert_matches(linear_rotary_triton(*tensors, True), expected(*tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96])
def test_the_library_product_and_the_rotation(head_dim, dtype):
    """What runs on CUDA where the fused kernel is not known to be faster."""
    tensors = inputs(20, 3, head_dim, dtype)
    actual = linear_rotary_triton(*tensors, False).float()
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3  # rounded before the rotation too
    torch.testing.assert_close(actual, expected(*tensors), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_v_does_not_depend_on_the_table(dtype, kernel):
    x, weight, bias, cos_sin, heads = inputs(40, 3, 32, dtype)
    turned = linear_rotary_triton(x, weight, bias, cos_sin, heads, True)
    lost = linear_rotary_triton(x, weight, bias, torch.full_like(cos_sin, float("nan")), heads, True)
    assert torch.equal(lost[:, 2], turned[:, 2]) and lost[:, :2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(dtype, kernel):
    x, weight, bias, cos_sin, heads = inputs(300, 3, 32, dtype)
    whole = linear_rotary_triton(x, weight, bias, cos_sin, heads, True)
    # numpy's product, under the interpreter, gives a row bits that depend on its place in the tile
    starts = (0, 131, 299) if HAS_CUDA else (0, 128, 256)
    for rows in (slice(start, start + count) for start in starts for count in (1, 2, 140)):
        assert torch.equal(linear_rotary_triton(x[rows], weight, bias, cos_sin[rows], heads, True), whole[rows])


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_no_tokens(batch_invariant, kernel):
    assert linear_rotary_triton(*inputs(0, 3, 32, torch.float16), batch_invariant).shape == (0, 3, 3, 32)


def test_refusals():
    x, weight, bias, cos_sin, heads = inputs(4, 3, 32, torch.float32)
    with pytest.raises(ValueError, match=r"3 \* heads \* head_dim = 3 \* 4 \* 32 rows, got 288"):
        linear_rotary_triton(x, weight, bias, cos_sin, 4, False)
    with pytest.raises(ValueError, match=r"cos_sin must be contiguous fp32 of \(4, 32\), got torch.float32 of \(3, 32"):
        linear_rotary_triton(x, weight, bias, cos_sin[:3], heads, True)
    with pytest.raises(ValueError, match="cos_sin must be contiguous"):
        linear_rotary_triton(x, weight, bias, cos_sin.repeat(1, 2)[:, :32], heads, True)


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_op_contract(batch_invariant, monkeypatch):
    monkeypatch.undo()  # opcheck compares what torch.empty returns
    torch.library.opcheck(linear_rotary, (*inputs(5, 2, 32, torch.float32), batch_invariant))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(HAS_CUDA, reason="of the CPU's body")
def test_op_is_the_product_and_the_rotation(dtype):
    x, weight, bias, cos_sin, heads = inputs(9, 3, 32, dtype)
    qkv = linear(x, weight, bias).view(9, 3, 3, 32)
    rotary_(qkv, cos_sin)
    assert torch.equal(linear_rotary(x, weight, bias, cos_sin, heads, False), qkv)
