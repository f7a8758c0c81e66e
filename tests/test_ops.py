"""Every op under torch.compile: alone, and the ops of a layer in one graph. test_kernel_* check their contracts."""

import pytest
import torch
from support.devices import DEVICE, packed

import unpadded_kernels as kernels

pytestmark = pytest.mark.usefixtures("seed")
HEADS, HEAD_DIM = 2, 16
HIDDEN = HEADS * HEAD_DIM
EPS = 1e-5


@pytest.fixture(autouse=True)
def reset_compiler():
    torch.compiler.reset()


def randn(*shape):
    return torch.randn(shape, device=DEVICE)


def arguments(tokens):
    """Return the arguments of every op, for two texts of `tokens` tokens in all."""
    x, row, weight = randn(tokens, HIDDEN), randn(HIDDEN), randn(96, HIDDEN)
    qkv, cos_sin = randn(tokens, 3, HEADS, HEAD_DIM), randn(tokens, HEAD_DIM)
    cu_seqlens = packed([2, tokens - 2])
    positions = torch.arange(tokens, device=DEVICE, dtype=torch.int32)
    experts = randn(4, HIDDEN), randn(4, 48, HIDDEN), randn(4, HIDDEN, 48), row
    mask = torch.ones(2, tokens, device=DEVICE, dtype=torch.int64)
    return {
        "activation": (randn(tokens, 96), "swiglu"),
        "add_layer_norm": (x, x, row, row, EPS),
        "attention": (qkv, cu_seqlens, tokens, 0.25),
        "embedding": (positions, positions, positions, *randn(3, 100, HIDDEN), row, row, EPS),
        "expert_mlp": (x, *experts, 2, "gelu"),
        "linear": (x, weight, randn(96)),
        "linear_activation": (x, weight, None, "geglu"),
        "linear_invariant": (x, weight, None, "swiglu"),
        "matryoshka": (x, True, 24, True),
        "masked_mean_pool": (randn(2, tokens, HIDDEN), mask, True),
        "mean_pool": (x, cu_seqlens),
        "pre_layer_norm": (x, x, row, row, EPS),
        "rms_norm": (x, None, row, EPS),
        "rotary_": (qkv, cos_sin),
        "rotary_cos_sin": (positions, randn(2, HEAD_DIM // 2), cu_seqlens),
        "vocabulary_max": (x, weight, randn(96), cu_seqlens),
    }


def run_on_copies(call, values):
    """Return the results of the call and the arguments after it, which an op in place has changed."""
    copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in values]
    results = call(*copies)
    results = list(results) if isinstance(results, tuple) else [] if results is None else [results]
    return [tensor.float() for tensor in (*results, *copies) if isinstance(tensor, torch.Tensor)]


def test_every_op_has_arguments():
    assert sorted(arguments(5)) == sorted(kernels.__all__)


@pytest.mark.parametrize("name", ["linear", "linear_activation"])
def test_op_contract(name):
    torch.library.opcheck(getattr(kernels, name), arguments(5)[name])


@pytest.mark.parametrize("name", kernels.__all__)
def test_a_compiled_op_returns_the_same_bits(name):
    op = getattr(kernels, name)
    compiled = torch.compile(lambda *values: op(*values), backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 9):
        values = arguments(tokens)[name]
        for actual, expected in zip(run_on_copies(compiled, values), run_on_copies(op, values), strict=True):
            assert torch.equal(actual, expected)


def layer(ids, positions, cu_seqlens, longest, inv_freq, word, row, qkv_weight, out_weight, up_weight, down_weight):
    x = kernels.embedding(ids, positions, None, word, None, None, row, row, EPS)
    cos_sin = kernels.rotary_cos_sin(positions, inv_freq, cu_seqlens)
    qkv = kernels.linear(x, qkv_weight, None).view(-1, 3, HEADS, HEAD_DIM)
    kernels.rotary_(qkv, cos_sin)
    attended = kernels.attention(qkv, cu_seqlens, longest, HEAD_DIM**-0.5)
    x = kernels.add_layer_norm(kernels.linear(attended, out_weight, None), x, row, row, EPS)
    up = kernels.linear_activation(x, up_weight, None, "swiglu")
    x = kernels.add_layer_norm(kernels.linear(up, down_weight, None), x, row, row, EPS)
    return kernels.matryoshka(kernels.mean_pool(x, cu_seqlens), False, HIDDEN, True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # Inductor's own imports
def test_a_layer_is_one_graph():
    """Compiled by Inductor at one number of tokens and run at others, with rotary in place."""
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    weights = randn(100, HIDDEN), randn(HIDDEN), randn(3 * HIDDEN, HIDDEN), randn(HIDDEN, HIDDEN)
    weights = *weights, randn(96, HIDDEN), randn(HIDDEN, 48)
    for lengths in ([3, 4], [5, 40], [1, 2, 9]):
        ids = torch.arange(sum(lengths), device=DEVICE, dtype=torch.int32)
        values = ids, ids, packed(lengths), max(lengths), randn(1, HEAD_DIM // 2).abs(), *weights
        assert torch.equal(compiled(*values), layer(*values))
