"""Every kind of linear layer against the same matmul in float64, and the changes from one kind to another."""

from dataclasses import replace

import pytest
import torch

from unpadded.model.layer import MLP, QKV, Layer, LayerNorm
from unpadded.model.linear import Linear, PackedLinear
from unpadded.model.weights import int8_linear
from unpadded_kernels import avx512
from unpadded_kernels.activation import KINDS, activation_reference
from unpadded_kernels.rotary import rotary_reference

pytestmark = pytest.mark.usefixtures("seed")
HIDDEN, HEADS = 96, 3
CONVERT = {
    "library": lambda plain: plain,
    "invariant": lambda plain: replace(plain, invariant=True),
    "packed": PackedLinear,
    "int8": lambda plain: PackedLinear(plain, int8=True),
}
ERROR = {"library": 1e-6, "invariant": 1e-6, "packed": 1e-6, "int8": 0.012}  # relative, Frobenius


def draw(rows, activation=None, bias=True):
    weight = torch.randn(rows, HIDDEN) * HIDDEN**-0.5
    return Linear(weight=weight, bias=torch.randn(rows) if bias else None, activation=activation)


def expected(plain, x):
    bias = 0 if plain.bias is None else plain.bias.double()
    y = x.double() @ plain.weight.double().T + bias
    return y if plain.activation is None else activation_reference(y, plain.activation)


def assert_close(actual, expected, error):
    assert (actual.double() - expected).norm() <= error * expected.norm()


@pytest.fixture(params=CONVERT)
def kind(request):
    if request.param == "packed" and not avx512.supports(torch.float32):
        pytest.skip("needs AVX-512 and a C compiler")
    if request.param == "int8" and not avx512.supports(torch.int8):
        pytest.skip("needs AVX-512 with VNNI")
    return request.param


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, *KINDS])
def test_every_kind_computes_the_same_linear(kind, activation, bias):
    plain, x = draw(128, activation, bias), torch.randn(7, HIDDEN)
    assert_close(CONVERT[kind](plain)(x), expected(plain, x), ERROR[kind])


@pytest.mark.parametrize("rotary", [True, False])
def test_qkv_is_rotated(kind, rotary):
    plain, x, cos_sin = draw(3 * HIDDEN), torch.randn(7, HIDDEN), torch.randn(7, HIDDEN // HEADS)
    qkv = expected(plain, x).float().view(7, 3, HEADS, -1)
    if rotary:
        rotary_reference(qkv, cos_sin)
    actual = QKV(linear=CONVERT[kind](plain), heads=HEADS)(x, cos_sin if rotary else None)
    assert actual.shape == qkv.shape
    assert_close(actual, qkv.double(), ERROR[kind])


@pytest.mark.skipif(not avx512.supports(torch.float32), reason="needs AVX-512 and a C compiler")
def test_a_packed_linear_becomes_the_plain_one_again():
    plain = draw(128, "swiglu")
    again = PackedLinear(plain).to_linear()
    assert torch.equal(again.weight, plain.weight)
    assert (again.bias is plain.bias) and again.activation == "swiglu"


@pytest.mark.skipif(not avx512.supports(torch.int8), reason="needs AVX-512 with VNNI")
def test_int8_returns_bf16_to_attention_where_that_is_fast(monkeypatch):
    plain, x = draw(3 * HIDDEN), torch.randn(7, HIDDEN)
    exact = PackedLinear(plain, int8=True)(x)
    fast = torch.bfloat16 if avx512.supports(torch.bfloat16) else torch.float32
    assert exact.dtype == torch.float32
    for name, dtype in (("layers.0.qkv", fast), ("layers.0.out", torch.float32)):
        assert torch.equal(int8_linear(name, plain)(x), exact.to(dtype))
    monkeypatch.setattr(avx512, "supports", lambda dtype: dtype != torch.bfloat16)
    assert torch.equal(int8_linear("layers.0.qkv", plain)(x), exact)


def test_linears_are_changed_by_name():
    norm = LayerNorm(weight=torch.ones(HIDDEN), bias=torch.zeros(HIDDEN), eps=1e-5)
    linears = {"qkv": draw(3 * HIDDEN), "out": draw(HIDDEN), "up": draw(128, "gelu"), "down": draw(HIDDEN)}
    qkv, mlp = QKV(linear=linears["qkv"], heads=HEADS), MLP(up=linears["up"], down=linears["down"])
    layer = Layer(qkv=qkv, out=linears["out"], attention_norm=norm, mlp=mlp, mlp_norm=norm)
    assert all(layer.linears[name] is linears[name] for name in linears)
    changed = {name: replace(linear, invariant=True) for name, linear in linears.items()}
    found = layer.map_linears("", lambda name, linear: changed[name]).linears
    assert all(found[name] is changed[name] for name in linears)
