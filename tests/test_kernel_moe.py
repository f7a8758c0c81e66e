"""An MLP of experts: the op against every expert on every token, and a token's bits whoever stands beside it."""

import pytest
import torch
from conftest import DEVICE, DTYPES, TOLERANCE

from unpadded_kernels.activation import activation_reference
from unpadded_kernels.moe import expert_mlp, expert_mlp_reference

pytestmark = pytest.mark.usefixtures("seed", "poison_empty")


def inputs(tokens, hidden=64, intermediate=96, experts=8, gated=False, dtype=torch.float32):
    x = torch.randn(tokens, hidden)
    router = torch.randn(experts, hidden) * hidden**-0.5
    up = torch.randn(experts, intermediate * (2 if gated else 1), hidden) * hidden**-0.5
    down = torch.randn(experts, hidden, intermediate) * intermediate**-0.5
    return [tensor.to(DEVICE, dtype) for tensor in (x, router, up, down, torch.randn(hidden))]


def every_expert(x, router, up, down, bias, top, kind):
    """In float64, with a loop over tokens and experts."""
    x, router, up, down, bias = (tensor.double() for tensor in (x, router, up, down, bias))
    rows = []
    for token in x:
        weights = (router @ token).softmax(0)
        row = bias.clone()
        for expert in weights.topk(top).indices:
            hidden = activation_reference((up[expert] @ token)[None].float(), kind)[0].double()
            row += weights[expert] * (down[expert] @ hidden)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 65])
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_matches_every_expert_on_every_token(tokens, kind, dtype):
    tensors = inputs(tokens, gated=kind == "swiglu", dtype=dtype)
    expected = every_expert(*tensors, 2, kind).float()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(expert_mlp(*tensors, 2, kind).float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("experts", "top"), [(1, 1), (4, 1), (4, 4), (8, 3)])
def test_any_number_of_experts(experts, top):
    tensors = inputs(33, experts=experts)
    expected = every_expert(*tensors, top, "gelu").float()
    for run in (expert_mlp, expert_mlp_reference):
        torch.testing.assert_close(run(*tensors, top, "gelu"), expected, atol=1e-5, rtol=1e-5)


def test_an_expert_that_nobody_chose():
    x, router, up, down, bias = inputs(9)
    router[3] = 0
    x[:, 0] = 10
    router[:, 0], router[3, 0] = 1, -100
    up[3] = float("nan")
    assert expert_mlp(x, router, up, down, bias, 2, "gelu").isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(DEVICE == "cuda", reason="the library's products on CUDA follow the number of rows")
def test_a_token_does_not_depend_on_its_batch(dtype):
    x, *weights = inputs(200, dtype=dtype)
    whole = expert_mlp(x, *weights, 2, "gelu")
    for count in (1, 2, 3, 17, 130):
        assert torch.equal(expert_mlp(x[-count:], *weights, 2, "gelu"), whole[-count:]), count


def test_no_tokens():
    assert expert_mlp(*inputs(0), 2, "gelu").shape == (0, 64)


def test_op_contract(monkeypatch):
    monkeypatch.undo()  # opcheck compares what torch.empty returns
    torch.library.opcheck(expert_mlp, (*inputs(9), 2, "gelu"))
