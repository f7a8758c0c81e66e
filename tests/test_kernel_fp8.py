"""Quantization to e4m3 rows and linears over them: the Triton kernels against their references."""

import sys

import pytest
import torch
from support.devices import DEVICE, DTYPES, HAS_CUDA, assert_matches

from unpadded_kernels._triton import tl
from unpadded_kernels.activation import GATED, KINDS
from unpadded_kernels.fp8 import (
    E4M3,
    dequantize_rows,
    linear_fp8,
    linear_fp8_reference,
    linear_fp8_triton,
    quantize_rows,
    quantize_rows_reference,
    quantize_rows_triton,
)

CAPABILITY = torch.cuda.get_device_capability() if HAS_CUDA else (0, 0)
pytestmark = [
    pytest.mark.usefixtures("seed", "poison_empty", "nearest"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # numpy, for a sigmoid that is 0
    pytest.mark.skipif(HAS_CUDA and CAPABILITY < (8, 9), reason="e4m3 needs compute capability 8.9"),
]
OUT_DTYPES = [torch.float16] if HAS_CUDA else [torch.float32, torch.float16]


@pytest.fixture
def nearest(monkeypatch):
    """Make Triton's interpreter, which drops a rounded mantissa's carry (250 becomes 128), round like a GPU."""
    if HAS_CUDA:
        return
    interpreter = sys.modules["triton.runtime.interpreter"]
    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if target == tl.float8e4nv:
            return torch.from_numpy(values).to(E4M3).view(torch.uint8).numpy()
        return convert(values, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture(params=["pointers", "descriptors"])
def kernel(request, monkeypatch):
    """Loads through pointers (sm_89), and through descriptors (sm_90 and later) where the tensors allow them."""
    if request.param == "descriptors" and HAS_CUDA and CAPABILITY < (9, 0):
        pytest.skip("needs compute capability 9.0")
    generation = 80 if request.param == "pointers" else 90
    if not HAS_CUDA or generation == 80:
        monkeypatch.setattr(sys.modules["unpadded_kernels.linear"], "generation", lambda device: generation)


def uneven(tokens, width, dtype):
    """Return rows of very different magnitude, one of them zeros."""
    x = torch.randn(tokens, width, device=DEVICE) * 10 ** torch.linspace(-3, 3, tokens, device=DEVICE)[:, None]
    x[tokens // 2] = 0
    return x.to(dtype)


def operands(tokens, in_features, rows, bias=True):
    x = quantize_rows_reference(torch.randn(tokens, in_features, device=DEVICE))
    spread = torch.rand(rows, 1, device=DEVICE) * (3 / in_features) ** 0.5
    weight = quantize_rows_reference(torch.randn(rows, in_features, device=DEVICE) * spread)
    return *x, *weight, torch.randn(rows, device=DEVICE).half() if bias else None


def assert_same_rows(actual, expected):
    for actual_part, expected_part in zip(actual, expected, strict=True):
        assert actual_part.dtype == expected_part.dtype
        assert torch.equal(actual_part.float(), expected_part.float())


def assert_linear_matches(actual, expected):
    if HAS_CUDA:  # sm_90 keeps about 14 bits of an e4m3 sum, the interpreter all of fp32's
        torch.testing.assert_close(actual.float(), expected, atol=4e-3, rtol=4e-3)
    else:
        assert_matches(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, width", [(1, 384), (7, 768), (40, 1000), (3, 5), (4, 1)])
def test_rows_are_rounded_to_nearest(tokens, width, dtype):
    x = uneven(tokens, width, dtype)
    assert_same_rows(quantize_rows_triton(x), quantize_rows_reference(x))


def test_error_of_eight_bits():
    """A row's largest element is exact to fp32; others are to a 16th of themselves or 2**-10 of the scale."""
    x = uneven(40, 300, torch.float32)
    rows, scale = quantize_rows_reference(x)
    error = (dequantize_rows(rows, scale).double() - x.double()).abs()
    assert (error <= torch.maximum(x.abs() / 16, scale[:, None] / 1024) * 1.00001).all()
    torch.testing.assert_close(dequantize_rows(rows, scale).abs().amax(1), x.abs().amax(1), atol=0, rtol=1e-6)


@pytest.mark.parametrize("value", [6e-8, 65504])
def test_smallest_and_largest_value_of_fp16(value):
    x = torch.full((3, 40), value, dtype=torch.float16, device=DEVICE)
    assert_same_rows(quantize_rows_triton(x), quantize_rows_reference(x))
    torch.testing.assert_close(dequantize_rows(*quantize_rows_triton(x)), x.float(), atol=0, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, for infinity times 0
def test_values_that_are_not_finite_stay_so():
    x = torch.randn(4, 40, device=DEVICE)
    x[1, 7], x[2, 39] = float("nan"), float("inf")
    for quantize in (quantize_rows_triton, quantize_rows_reference):
        finite = dequantize_rows(*quantize(x)).sum(1).isfinite()
        assert finite.tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    "tokens, in_features, rows, bias, dtype",
    [
        (1, 96, 128, True, torch.float16),
        (7, 320, 384, False, OUT_DTYPES[0]),
        (300, 64, 144, True, OUT_DTYPES[0]),
        (5, 100, 70, False, torch.float16),
    ],
)
def test_linear_matches_the_reference(tokens, in_features, rows, bias, dtype, kernel):
    tensors = operands(tokens, in_features, rows, bias)
    assert_linear_matches(linear_fp8_triton(*tensors, None, dtype), linear_fp8_reference(*tensors, None, torch.float32))


@pytest.mark.parametrize(
    "kind, bias, dtype",
    [
        ("swiglu", True, torch.float16),
        ("geglu", False, OUT_DTYPES[0]),
        ("gelu", True, OUT_DTYPES[0]),
        ("gelu_tanh", False, torch.float16),
    ],
)
def test_activation_in_the_same_pass(kind, bias, dtype, kernel):
    for tokens, in_features, rows in ((130, 64, 416), (3, 72, 48)):
        tensors = operands(tokens, in_features, rows, bias)
        assert_linear_matches(
            linear_fp8_triton(*tensors, kind, dtype), linear_fp8_reference(*tensors, kind, torch.float32)
        )


def test_error_of_a_linear_is_that_of_e4m3():
    x, weight = torch.randn(20, 768, device=DEVICE), torch.randn(64, 768, device=DEVICE)
    y = linear_fp8(*quantize_rows(x), *quantize_rows(weight), None, None, torch.float32)
    exact = x.double() @ weight.double().T
    error = (y - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.min() > 0.01
    assert error.max() < 0.06


def test_a_row_does_not_depend_on_its_batch(kernel):
    x = uneven(64, 768, torch.float16)
    assert_same_rows(quantize_rows_triton(x[5:6]), [part[5:6] for part in quantize_rows_triton(x)])
    # in the interpreter a row's bits depend on its place in the tile, because numpy's matmul does
    starts = (0, 131, 299) if HAS_CUDA else (0, 128, 256)
    for kind in (None, "swiglu"):
        x, x_scale, *rest = operands(300, 96, 272)
        whole = linear_fp8_triton(x, x_scale, *rest, kind, torch.float16)
        for rows in (slice(start, start + count) for start in starts for count in (1, 140)):
            assert torch.equal(linear_fp8_triton(x[rows], x_scale[rows], *rest, kind, torch.float16), whole[rows])


def test_a_row_does_not_depend_on_its_batch_on_a_cpu():
    x, x_scale, *rest = (tensor.cpu() for tensor in operands(300, 96, 272))
    whole = linear_fp8(x, x_scale, *rest, "swiglu", torch.float32)
    for rows in (slice(start, start + count) for start in (0, 131, 299) for count in (1, 2, 3, 140)):
        assert torch.equal(linear_fp8(x[rows], x_scale[rows], *rest, "swiglu", torch.float32), whole[rows])


def test_no_tokens(kernel):
    assert [part.shape for part in quantize_rows_triton(torch.empty(0, 96, device=DEVICE))] == [(0, 96), (0,)]
    tensors = operands(1, 96, 128)
    assert linear_fp8_triton(tensors[0][:0], tensors[1][:0], *tensors[2:], "swiglu", torch.float16).shape == (0, 64)


@pytest.mark.parametrize("kind", [None, "swiglu"])
def test_strided_rows_are_read_in_place(kind, kernel):
    x, x_scale, weight, weight_scale, bias = operands(9, 96, 128)
    wide_x, wide_weight = (quantize_rows_reference(torch.randn(rows, 288, device=DEVICE))[0] for rows in (9, 128))
    wide_x[:, 96:192], wide_weight[:, 16:112] = x, weight
    actual = linear_fp8_triton(
        wide_x[:, 96:192], x_scale, wide_weight[:, 16:112], weight_scale, bias, kind, torch.float16
    )
    assert_linear_matches(actual, linear_fp8_reference(x, x_scale, weight, weight_scale, bias, kind, torch.float32))
    wide = torch.randn(9, 300, device=DEVICE)
    assert_same_rows(quantize_rows_triton(wide[:, 50:150]), quantize_rows_reference(wide[:, 50:150]))


def test_tokens_past_two_to_the_31_elements(far_tokens, kernel):
    assert_same_rows(quantize_rows_triton(far_tokens), quantize_rows_reference(far_tokens))
    x, *rest = operands(*far_tokens.shape, 64)
    far = far_tokens.view(E4M3)[:, : x.shape[1]]
    far.copy_(x)
    assert_linear_matches(
        linear_fp8_triton(far, *rest, None, torch.float16), linear_fp8_reference(x, *rest, None, torch.float32)
    )


def test_invalid_arguments_are_rejected():
    x, x_scale, weight, weight_scale, bias = operands(96, 96, 128)
    run = linear_fp8_triton
    with pytest.raises(ValueError, match=r"x must be \(96, 96\) with contiguous rows"):
        run(x.t(), x_scale, weight, weight_scale, bias, None, torch.float16)
    with pytest.raises(ValueError, match=r"x must be \(96, 5\) with contiguous rows"):
        quantize_rows_triton(torch.empty(5, 96, device=DEVICE).t())
    with pytest.raises(ValueError, match=r"weight must be \(128, 96\).*got \(128, 95\)"):
        run(x, x_scale, weight[:, :95], weight_scale, bias, None, torch.float16)
    with pytest.raises(ValueError, match=r"x_scale must be \(96,\).*got \(95,\)"):
        run(x, x_scale[:95], weight, weight_scale, bias, None, torch.float16)
    with pytest.raises(ValueError, match=r"weight_scale must be \(128,\).*got \(127,\)"):
        run(x, x_scale, weight, weight_scale[:127], bias, None, torch.float16)
    with pytest.raises(ValueError, match=r"bias must be \(128,\).*got \(127,\)"):
        run(x, x_scale, weight, weight_scale, bias[:127], None, torch.float16)
    with pytest.raises(ValueError, match=r"got torch.float32 and torch.float8_e4m3fn: pass them to quantize_rows"):
        run(x.float(), x_scale, weight, weight_scale, bias, None, torch.float16)
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        run(x, x_scale, weight, weight_scale, bias, "relu", torch.float16)


def test_op_contracts(monkeypatch):
    monkeypatch.undo()  # opcheck compares what torch.empty returns
    x = torch.randn(5, 96, device=DEVICE)
    # without test_schema, whose comparison torch does not implement for e4m3
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(quantize_rows, (x,), test_utils=checks)
    for kind in (None, "gelu", "swiglu"):
        torch.library.opcheck(linear_fp8, (*operands(5, 96, 128), kind, torch.float16), test_utils=checks)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_op_matches_the_reference(kind):
    tensors = operands(9, 96, 128)
    actual = linear_fp8(*tensors, kind, torch.float16)
    assert_linear_matches(actual, linear_fp8_reference(*tensors, kind, torch.float32))
    assert actual.shape == (9, 64 if kind in GATED else 128)
