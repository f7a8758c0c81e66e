"""Mixture-of-experts MLP: the op and its Triton kernels against a loop over tokens and experts."""

import sys
from collections import defaultdict

import pytest
import torch
from support.devices import DEVICE, DTYPES, HAS_CUDA, TOLERANCE, assert_matches

from unpadded_kernels.activation import activation_reference
from unpadded_kernels.moe import expert_mlp, expert_mlp_reference, expert_mlp_triton

pytestmark = pytest.mark.usefixtures("seed", "poison_empty")
WITH_NAN = pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, in the interpreter


def inputs(tokens, hidden=64, intermediate=96, experts=8, dtype=torch.float32):
    x = torch.randn(tokens, hidden)
    router = torch.randn(experts, hidden) * hidden**-0.5
    up = torch.randn(experts, intermediate, hidden) * hidden**-0.5
    down = torch.randn(experts, hidden, intermediate) * intermediate**-0.5
    return [tensor.to(DEVICE, dtype) for tensor in (x, router, up, down, torch.randn(hidden))]


def expected_mlp(x, router, up, down, bias, top_k, kind):
    """Compute in float64, in a loop over tokens and experts."""
    x, router, up, down, bias = (tensor.double() for tensor in (x, router, up, down, bias))
    rows = []
    for token in x:
        weights = (router @ token).softmax(0)
        row = bias.clone()
        for expert in weights.topk(top_k).indices:
            hidden = activation_reference((up[expert] @ token)[None].float(), kind)[0].double()
            row += weights[expert] * (down[expert] @ hidden)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, kind", [(1, "gelu_tanh"), (2, "gelu"), (7, "gelu_tanh"), (65, "gelu")])
def test_op_matches_the_loop(tokens, kind, dtype):
    tensors = inputs(tokens, dtype=dtype)
    expected = expected_mlp(*tensors, 2, kind).float()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(expert_mlp(*tensors, 2, kind).float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (4, 4), (8, 3)])
def test_any_number_of_experts(experts, top_k):
    tensors = inputs(33, experts=experts)
    expected = expected_mlp(*tensors, top_k, "gelu").float()
    for run in (expert_mlp, expert_mlp_reference):
        torch.testing.assert_close(run(*tensors, top_k, "gelu"), expected, atol=1e-5, rtol=1e-5)


def test_an_expert_that_no_token_chose_is_not_computed():
    x, router, up, down, bias = inputs(9)
    router[3] = 0
    x[:, 0] = 10
    router[:, 0], router[3, 0] = 1, -100
    up[3] = float("nan")
    assert expert_mlp(x, router, up, down, bias, 2, "gelu").isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(HAS_CUDA, reason="tests the CPU body")
def test_a_token_does_not_depend_on_its_batch_on_a_cpu(dtype):
    x, *weights = inputs(200, dtype=dtype)
    whole = expert_mlp(x, *weights, 2, "gelu")
    for count in (1, 2, 3, 17, 130):
        assert torch.equal(expert_mlp(x[-count:], *weights, 2, "gelu"), whole[-count:]), count


@pytest.mark.parametrize(
    ("tokens", "kind", "dtype"),
    [
        (1, "gelu", torch.float16),
        (150, "gelu", torch.float32),
        (7, "gelu", torch.float32),
        (7, "gelu_tanh", torch.float16),
        pytest.param(150, "gelu", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_kernels_match_the_loop(tokens, kind, dtype):
    tensors = inputs(tokens, dtype=dtype)
    assert_matches(expert_mlp_triton(*tensors, 2, kind), expected_mlp(*tensors, 2, kind))


@pytest.mark.parametrize(
    ("experts", "top_k", "hidden", "intermediate"), [(1, 1, 64, 64), (5, 4, 72, 200), (20, 3, 40, 8)]
)
def test_kernels_of_any_dimensions(experts, top_k, hidden, intermediate):
    tensors = inputs(33, hidden, intermediate, experts)
    assert_matches(expert_mlp_triton(*tensors, top_k, "gelu"), expected_mlp(*tensors, top_k, "gelu"))


@pytest.mark.parametrize("tokens", [64, 65])
def test_one_expert_with_all_tokens_and_one_with_none(tokens):
    x, router, up, down, bias = inputs(tokens, experts=4)
    x[:, 0], router[:, 0] = 10, torch.tensor([2.0, -100.0, 50.0, 1.0])
    expected = expected_mlp(x, router, up, down, bias, 2, "gelu")
    up[1] = down[1] = float("nan")
    assert_matches(expert_mlp_triton(x, router, up, down, bias, 2, "gelu"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@WITH_NAN
def test_a_token_does_not_depend_on_its_batch(dtype):
    x, *weights = inputs(100, hidden=32, intermediate=64, experts=3, dtype=dtype)
    whole = expert_mlp_triton(x, *weights, 2, "gelu")
    for count in (1, 90):
        assert torch.equal(expert_mlp_triton(x[:count], *weights, 2, "gelu"), whole[:count]), count
        if HAS_CUDA:  # in the interpreter a row's bits depend on its place in the tile, because numpy's matmul does
            assert torch.equal(expert_mlp_triton(x[-count:], *weights, 2, "gelu"), whole[-count:]), count
    x[95:] = float("nan")
    assert torch.equal(expert_mlp_triton(x, *weights, 2, "gelu")[:95], whole[:95])


def test_the_order_of_tokens_does_not_matter():
    x, *weights = inputs(150)
    order = torch.randperm(150, device=DEVICE)
    actual = expert_mlp_triton(x[order], *weights, 2, "gelu")
    assert_matches(actual, expert_mlp_triton(x, *weights, 2, "gelu")[order])


@WITH_NAN
def test_a_token_that_is_not_finite_stays_so():
    x, *weights = inputs(9)
    x[4, 3] = float("nan")
    y = expert_mlp_triton(x, *weights, 2, "gelu")
    assert y[4].isnan().all() and y[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


def test_strided_tokens_are_read_in_place():
    x, *weights = inputs(9)
    wide = torch.randn(9, 3 * 64, device=DEVICE)
    wide[:, 64:128] = x
    assert_matches(expert_mlp_triton(wide[:, 64:128], *weights, 2, "gelu"), expected_mlp(x, *weights, 2, "gelu"))


def test_tokens_past_two_to_the_31_elements(far_tokens):
    _, *weights = inputs(5, hidden=192, dtype=torch.float16)
    assert_matches(expert_mlp_triton(far_tokens, *weights, 2, "gelu"), expected_mlp(far_tokens, *weights, 2, "gelu"))


def test_the_host_does_not_wait_for_the_device(monkeypatch):
    """Meta tensors have no values, so reading one would fail."""
    module = sys.modules["unpadded_kernels.moe"]
    for name in ("_route_kernel", "_expert_linear_kernel", "_mix_kernel"):
        monkeypatch.setattr(module, name, defaultdict(lambda: lambda *args, **options: None))
    y = expert_mlp_triton(*(tensor.to("meta") for tensor in inputs(9)), 2, "gelu")
    assert y.shape == (9, 64)


def test_invalid_arguments_are_rejected():
    x, router, up, down, bias = inputs(5)
    with pytest.raises(ValueError, match="activation 'swiglu' of experts is not supported"):
        expert_mlp_triton(x, router, up, down, bias, 2, "swiglu")
    with pytest.raises(ValueError, match=r"up must be \(8, 96, 64\) with contiguous rows, got \(8, 95, 64\)"):
        expert_mlp_triton(x, router, up[:, :95], down, bias, 2, "gelu")
    with pytest.raises(ValueError, match=r"down must be \(8, 64, 96\) with contiguous rows.*strides \(6144, 1, 64\)"):
        expert_mlp_triton(x, router, up, down.mT.contiguous().mT, bias, 2, "gelu")
    with pytest.raises(ValueError, match=r"top_k must be in 1\.\.8, got 9"):
        expert_mlp_triton(x, router, up, down, bias, 9, "gelu")
    with pytest.raises(ValueError, match=r"x must be \(5, 64\) with contiguous rows"):
        expert_mlp_triton(x.mT.contiguous().mT, router, up, down, bias, 2, "gelu")


@pytest.mark.parametrize("expert_mlp", [expert_mlp, expert_mlp_triton])
def test_no_tokens(expert_mlp):
    assert expert_mlp(*inputs(0), 2, "gelu").shape == (0, 64)


def test_op_contract(monkeypatch):
    monkeypatch.undo()  # opcheck compares what torch.empty returns
    torch.library.opcheck(expert_mlp, (*inputs(9), 2, "gelu"))
