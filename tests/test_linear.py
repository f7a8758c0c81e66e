"""Every kind of linear layer against the same matmul in float64, and the changes from one kind to another."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from unpadded.model.layer import MLP, QKV, Layer, LayerNorm, RMSNorm
from unpadded.model.linear import Linear
from unpadded.model.weights import int8_linear, packed_linear
from unpadded_kernels import avx512
from unpadded_kernels.activation import KINDS, activation_reference
from unpadded_kernels.attention_cpu import biases_by_distance
from unpadded_kernels.avx512 import PackedLinear
from unpadded_kernels.rotary import rotary_reference

pytestmark = pytest.mark.usefixtures("seed")
HIDDEN, HEADS = 96, 3
CONVERT = {
    "library": lambda plain: plain,
    "invariant": lambda plain: replace(plain, invariant=True),
    "packed": partial(packed_linear, "layers.0.out"),
    "int8": partial(int8_linear, "layers.0.out"),
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


@pytest.mark.skipif(not avx512.supports(torch.int8), reason="needs AVX-512 with VNNI")
def test_int8_returns_bf16_to_attention_where_that_is_fast(monkeypatch):
    plain, x = draw(3 * HIDDEN), torch.randn(7, HIDDEN)
    exact = PackedLinear(plain.weight, plain.bias, None, int8=torch.float32)(x)
    for fast in (True, False) if avx512.supports(torch.bfloat16) else (False,):
        monkeypatch.setattr(avx512, "has_fast_bf16", lambda fast=fast: fast)
        for name, dtype in (
            ("layers.0.qkv", torch.bfloat16 if fast else torch.float32),
            ("layers.0.out", torch.float32),
        ):
            assert torch.equal(int8_linear(name, plain)(x), exact.to(dtype))


NORMS = {
    "post-norm": LayerNorm(weight=torch.linspace(1, 2, HIDDEN), bias=torch.linspace(-1, 1, HIDDEN), eps=1e-5),
    "pre-norm": LayerNorm(
        weight=torch.linspace(1, 2, HIDDEN), bias=torch.linspace(-1, 1, HIDDEN), eps=1e-5, prenorm=True
    ),
    "RMS": RMSNorm(weight=torch.linspace(1, 2, HIDDEN), eps=1e-5),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_packed_layer_has_the_bits_of_its_parts(dtype, activation, norm):
    """The same by one to eight threads, which share blocks of rows or, of few rows, panels."""
    if not avx512.supports(dtype):
        pytest.skip("needs AVX-512 and a C compiler")
    stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    change = int8_linear if dtype == torch.int8 else packed_linear
    names = {"qkv": (3 * HIDDEN, HIDDEN), "out": (HIDDEN, HIDDEN), "up": (256, HIDDEN)}
    names["down"] = HIDDEN, 128 if activation == "swiglu" else 256
    linears = {
        name: change(
            f"layers.0.{name}",
            Linear(
                weight=(torch.randn(shape) * shape[1] ** -0.5).to(stored),
                bias=torch.randn(shape[0]).to(stored),
                activation=activation if name == "up" else None,
            ),
        )
        for name, shape in names.items()
    }
    first = replace(norm, **{name: vars(norm)[name].to(stored) for name in vars(norm).keys() & {"weight", "bias"}})
    second = replace(first, weight=first.weight.flip(0))
    layer = Layer(
        qkv=QKV(linear=linears["qkv"], heads=HEADS),
        out=linears["out"],
        attention_norm=first,
        mlp=MLP(up=linears["up"], down=linears["down"]),
        mlp_norm=second,
    )
    x, residual = (torch.randn(2000, HIDDEN).to(stored) for _ in range(2))
    memory = torch.empty(2000 * 4 * HIDDEN)
    cos_sin, slopes = torch.randn(2000, HIDDEN // HEADS), torch.tensor([0.5, 0.25, 0.125])
    lengths = torch.tensor([1, 15, 0, 175, 1, 1, 307, 1500], dtype=torch.int32)
    threads = torch.get_num_threads()
    cases = (0, None), (1, None), (2, None), (4, 20), (5, None), (6, None), (7, 30), (8, 100)
    try:
        for texts, window in cases:
            cu_seqlens = F.pad(lengths[:texts].cumsum(0, dtype=torch.int32), (1, 0))
            rows, longest = int(cu_seqlens[-1]), int(lengths[:texts].max()) if texts else 0
            key_lengths = (lengths[:texts] + 1) // 2 if texts == 6 else None
            selected = torch.tensor([0, rows // 2, rows // 2, rows - 1], dtype=torch.int32) if texts == 4 else None
            table = None if texts == 2 else cos_sin[:rows]
            biases = biases_by_distance(longest, window, slopes if texts == 8 else None, None)
            mask = cu_seqlens, 0.2, window, biases, key_lengths
            attended = avx512.attention(layer.qkv(x[:rows], table), *mask)
            kept = slice(None) if selected is None else selected
            middle, total = first(layer.out(attended[kept]), residual[:rows][kept])
            expected = second(layer.mlp(middle), total)
            for number in (1, 2, 3, 8):
                torch.set_num_threads(number)
                found = layer.packed(x[:rows].clone(), residual[:rows].clone(), table, selected, memory, *mask)
                assert all(torch.equal(one, exact) for one, exact in zip(found, expected, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_linears_are_changed_by_name():
    norm = LayerNorm(weight=torch.ones(HIDDEN), bias=torch.zeros(HIDDEN), eps=1e-5)
    linears = {"qkv": draw(3 * HIDDEN), "out": draw(HIDDEN), "up": draw(128, "gelu"), "down": draw(HIDDEN)}
    qkv, mlp = QKV(linear=linears["qkv"], heads=HEADS), MLP(up=linears["up"], down=linears["down"])
    layer = Layer(qkv=qkv, out=linears["out"], attention_norm=norm, mlp=mlp, mlp_norm=norm)
    assert all(layer.linears[name] is linears[name] for name in linears)
    changed = {name: replace(linear, invariant=True) for name, linear in linears.items()}
    found = layer.map_linears("", lambda name, linear: changed[name]).linears
    assert all(found[name] is changed[name] for name in linears)
