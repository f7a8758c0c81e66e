"""The kernels in C for CPUs with AVX-512: against float64, bit for bit row by row, and how they are compiled.

test_cpu_ops tests attention and the norms, which have other bodies on other processors.
"""

import functools
import logging
import re
import subprocess
import sys

import pytest
import torch

from unpadded_kernels import avx512
from unpadded_kernels.activation import GATED, KINDS, activation_reference
from unpadded_kernels.attention import attention_reference
from unpadded_kernels.avx512 import PackedLinear

ERROR = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3, torch.int8: 3e-7}  # int8: of its formulas in fp32
pytestmark = [
    pytest.mark.usefixtures("seed"),
    pytest.mark.skipif(not avx512.supports(torch.float32), reason="needs AVX-512 and a C compiler"),
]
INT8 = pytest.mark.skipif(not avx512.supports(torch.int8), reason="needs AVX-512 with VNNI")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(params=["as here", "without AMX"])
def tiles(request, monkeypatch):
    """The kernels of this processor, and on one with AMX those of processors without it, too."""
    if request.param == "without AMX":
        if not torch.cpu._is_amx_tile_supported():
            pytest.skip("without AMX here, too")
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(avx512, "_kernels", functools.cache(avx512._kernels.__wrapped__))
        assert not avx512._kernels()[0].in_tiles(1, 16)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def expected_linear(x, weight, bias, kind):
    y = (x.double() @ weight.double().T + (0 if bias is None else bias.double())).float()
    return y if kind is None else activation_reference(y, kind)


@DTYPES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(200, 96), (64, 33), (2, 7), (130, 1), (70, 1300), (70, 1600)]
)
def test_linear(tiles, dtype, bias, kind, out_features, in_features):
    if not avx512.supports(dtype) or (dtype == torch.bfloat16 and in_features % 2):
        pytest.skip("not supported")
    weight, added = draw(out_features, in_features, dtype=dtype), draw(out_features, dtype=dtype) if bias else None
    packed = PackedLinear(weight, added, kind)
    assert torch.equal(packed.unpack(), weight)
    x = draw(400, in_features + 2, dtype=dtype)[:, :in_features]  # strided
    whole = packed(x)
    assert whole.shape == (400, out_features // (2 if kind in GATED else 1)) and whole.dtype == dtype
    assert relative(whole, expected_linear(x, weight, added, kind)) <= ERROR[dtype]
    for rows in (0, 1, 2, 5, 6, 7, 16, 17, 32, 33, 191, 192, 193):
        assert torch.equal(packed(x[:rows]), whole[:rows])
        assert torch.equal(packed(x[rows:]), whole[rows:])


@DTYPES
def test_bits_do_not_depend_on_the_number_of_threads(tiles, dtype):
    if not avx512.supports(dtype):
        pytest.skip("not supported")
    x, packed = draw(500, 768, dtype=dtype), PackedLinear(draw(448, 768, dtype=dtype), None, "swiglu")  # 7 panels
    qkv = draw(900, 3, 2, 64, dtype=dtype)
    cu_seqlens, threads, found = torch.tensor([0, 300, 900], dtype=torch.int32), torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 8):
            torch.set_num_threads(number)
            y = packed(x)
            found.append((y, avx512.attention(qkv, cu_seqlens, 0.125, None, None, None)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, first) for pair in found for one, first in zip(pair, found[0], strict=True))


@DTYPES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_reach_the_result_of_their_text_alone(tiles, dtype, value):
    if not avx512.supports(dtype):
        pytest.skip("not supported")
    qkv, cu_seqlens = draw(300, 3, 2, 32, dtype=dtype), torch.tensor([0, 90, 100, 300], dtype=torch.int32)
    exact = avx512.attention(qkv, cu_seqlens, 0.2, None, None, None)
    for part in range(3):  # of q, k and v
        spoiled = qkv.clone()
        spoiled[95, part, 0, 3] = value
        found = avx512.attention(spoiled, cu_seqlens, 0.2, None, None, None)
        expected = attention_reference(spoiled, cu_seqlens, 200, 0.2)
        assert torch.equal(found[:90], exact[:90]) and torch.equal(found[100:], exact[100:])
        assert torch.equal(found.isfinite(), expected.isfinite()) and not found.isfinite().all()


def linear_int8_reference(x, weight, bias, kind):
    """Return y in fp32 of a weight that is not quantized yet, by the formulas of `avx512`."""
    x = x.float()
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    middle, scale = (low + high) / 2, ((high - low) / 254).clamp(min=1e-30)
    q, (p, weight_scale) = ((x - middle) * (1 / scale)).round(), avx512.quantize_weight(weight)
    y = q.double() @ p.double().T * scale * weight_scale + middle * (p.double().sum(1) * weight_scale)
    y = (y if bias is None else y + bias).float()
    return y if kind is None else activation_reference(y, kind)


@INT8
@DTYPES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("in_features", [96, 192])
def test_linear_int8(tiles, dtype, bias, kind, in_features):
    x, weight = draw(600, in_features, dtype=dtype), draw(128, in_features, dtype=dtype) / 10
    added = torch.randn(128) if bias else None
    x[3:5], x[7] = 0, 2.5  # rows of equal values
    packed = PackedLinear(weight, added, kind, int8=torch.float32)
    whole = packed(x)
    expected = linear_int8_reference(x, weight, added, kind)
    assert whole.dtype == torch.float32 and relative(whole, expected) <= ERROR[torch.int8]
    assert relative(whole[[3, 4]] + 1, expected[[3, 4]] + 1) <= ERROR[torch.int8]
    assert relative(whole[7], expected[7]) <= ERROR[torch.int8]
    for rows in (0, 1, 2, 9, 191, 192, 193):
        assert torch.equal(packed(x[:rows]), whole[:rows])
    for row in (0, 7, 191, 192, 599):
        assert torch.equal(packed(x[row : row + 1])[0], whole[row])
    half = PackedLinear(weight, added, kind, int8=torch.bfloat16)
    for rows in (9, 600):
        assert torch.equal(half(x[:rows]), whole[:rows].bfloat16())


@INT8
def test_int8_rows_of_many_features_have_exact_sums():
    """The extremes of both factors: each sum is beyond 2**24, where fp32 is not exact, and within int32."""
    x, weight = torch.ones(2, 8192), torch.ones(16, 8192)
    x[:, ::2] = -1
    weight[:, ::2] = -1
    actual = PackedLinear(weight, None, None, int8=torch.float32)(x)
    torch.testing.assert_close(actual, torch.full((2, 16), 8192.0), rtol=1e-6, atol=0)


@INT8
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("int8", [None, torch.float32])
def test_rows_that_are_not_finite_change_no_other_row(tiles, kind, value, int8):
    x, packed = torch.randn(300, 192), PackedLinear(torch.randn(128, 192) / 10, torch.randn(128), kind, int8)
    expected = packed(x)
    spoiled = [0, 5, 191, 192, 299]
    others = [row for row in range(300) if row not in spoiled]
    x[spoiled, 17] = value
    actual = packed(x)
    assert torch.equal(actual[others], expected[others])
    assert not actual[spoiled].isfinite().any()


@INT8
@pytest.mark.parametrize(("mean", "gain"), [(0, 1), (3, 1.8), (30, 10)])
def test_int8_rows_keep_their_precision_far_from_0(mean, gain):
    """The error without an offset per row is `gain` times as large, or more."""
    x, weight = torch.randn(64, 384) + mean, torch.randn(128, 384)
    weight = torch.round(weight * 30).clamp(-127, 127)
    weight[:, 0] = 127  # exact in int8, so that only the error of x counts
    expected = x.double() @ weight.double().T
    scale = x.abs().amax(1, keepdim=True) / 127
    symmetric = (x / scale).round().double() @ weight.double().T * scale
    error = (PackedLinear(weight, None, None, int8=torch.float32)(x) - expected).norm()
    assert (symmetric - expected).norm() >= gain * error


@INT8
def test_int8_weights_of_zeros_give_the_bias():
    weight, bias = torch.zeros(128, 96), torch.randn(128)
    weight[64:] = torch.randn(64, 96)
    y = PackedLinear(weight, bias, None, int8=torch.float32)(torch.randn(5, 96))
    assert torch.equal(y[:, :64], bias[:64].expand(5, 64))


def compile_again(monkeypatch, tmp_path, caplog, **variables):
    """Return whether the kernels work for a process with these variables and an empty cache, and its warnings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING, logger="unpadded"):
        return bool(avx512._kernels.__wrapped__()[1]), caplog.text


def test_kernels_are_compiled_once(monkeypatch, tmp_path, caplog):
    assert compile_again(monkeypatch, tmp_path, caplog) == (True, "")
    (library,) = (tmp_path / "unpadded").iterdir()
    monkeypatch.setattr(subprocess, "run", lambda *rest, **options: pytest.fail("compiled again"))
    assert compile_again(monkeypatch, tmp_path, caplog) == (True, "")
    assert list((tmp_path / "unpadded").iterdir()) == [library]


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CC": "missing", "PATH": "/nowhere"}, "there is no C compiler"),
        ({"CC": sys.executable}, "unknown option|can't open|Unknown option"),
        ({"XDG_CACHE_HOME": "/dev/null"}, "Not a directory|File exists"),
    ],
)
def test_without_a_compiler_a_warning_says_so(monkeypatch, tmp_path, caplog, variables, reason):
    works, warning = compile_again(monkeypatch, tmp_path, caplog, **variables)
    assert not works and "need gcc and a writable XDG_CACHE_HOME, but" in warning
    assert re.search(reason, warning)


def test_another_processor_compiles_nothing(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert compile_again(monkeypatch, tmp_path, caplog) == (False, "")
    assert not list(tmp_path.iterdir())


def test_only_even_inputs_can_be_packed():
    assert avx512.can_pack(torch.ones(2, 4)) and not avx512.can_pack(torch.ones(2, 3))


@pytest.mark.parametrize("in_features", [384, 3072])
def test_fp32_in_tiles_is_as_exact_as_fp32(in_features):
    """With fewer than the three parts of bf16, or without one of the six products, the error is larger."""
    x, weight = draw(100, in_features), draw(128, in_features)
    assert relative(PackedLinear(weight, None, None)(x), x.double() @ weight.double().T) <= 5e-7


def test_the_products_of_vectors_keep_their_sums_in_registers(tmp_path):
    """GCC 12 spills them if it coalesces variables, which takes twice the time."""
    flags = [flag for flag in avx512.FLAGS.split() if flag != "-shared"]
    found = tmp_path / "kernels.s"
    command = ["gcc", *flags, "-mavx512bf16", "-mavx512vnni", "-S", str(avx512.SOURCE), "-o", str(found)]
    subprocess.run(command, check=True, capture_output=True)
    bodies = re.findall(r"^(multiply_\w+)\S*:$(.*?)^\s+\.size", found.read_text(), re.DOTALL | re.MULTILINE)
    assert {name for name, _ in bodies} == {"multiply_f32", "multiply_bf16", "multiply_int8"}
    for _, body in bodies:
        assert body.count("zmm") > 500 and not re.search(r"zmm\d+, -?\d*\(%rsp\)|\(%rsp\), .*%zmm", body)
