"""The linear kernel for sm_90, whose source is simulated: its arithmetic, and its barriers under random schedules."""

import sys

import pytest
import torch
from support.devices import HAS_CUDA, TOLERANCE

pytest.importorskip("triton.experimental.gluon")
import triton
from support import barriers
from support.barriers import SimulationError, simulate

from unpadded_kernels import choices
from unpadded_kernels.fp8 import dequantize_rows, linear_fp8_triton, quantize_rows_reference
from unpadded_kernels.hopper import is_supported
from unpadded_kernels.hopper import linear as hopper
from unpadded_kernels.linear import (
    linear_activation_triton,
    linear_invariant_reference,
    linear_invariant_triton,
    linear_rotary_triton,
)
from unpadded_kernels.linear_kernels import Epilogue
from unpadded_kernels.rotary import rotary_reference

pytestmark = [
    pytest.mark.usefixtures("seed", "poison_empty"),
    pytest.mark.skipif(HAS_CUDA, reason="simulates the kernel on CPU tensors"),
]
# (activation, bias, head_dim or 0 without rotary)
EPILOGUES = [
    *[(None, True, 0), (None, False, 0), ("swiglu", False, 0), ("geglu", True, 0), ("gelu", False, 0)],
    *[("gelu_tanh", True, 0), (None, False, 64), (None, True, 32), (None, False, 128)],
]
SCHEDULES = 150


def inputs(tokens, in_features, rows, dtype, kind=None, bias=False, head_dim=0):
    x = torch.randn(tokens, in_features).to(dtype)
    weight = (torch.randn(rows, in_features) * in_features**-0.5).to(dtype)
    angle = torch.rand(tokens, head_dim // 2) * 100
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=-1) if head_dim else None
    return x, weight, Epilogue(bias=torch.randn(rows).to(dtype) if bias else None, kind=kind, cos_sin=cos_sin)


def expected(x, weight, epilogue):
    """Return the result in fp64."""
    bias, cos_sin = epilogue.bias, epilogue.cos_sin
    y = linear_invariant_reference(x.double(), weight.double(), None if bias is None else bias.double(), epilogue.kind)
    if cos_sin is not None:
        rotary_reference(y.view(len(x), 3, -1, cos_sin.shape[1]), cos_sin)
    return y


def run(x, weight, epilogue, seed=0, change=str):
    return simulate(lambda: hopper.linear_hopper(x, weight, epilogue, x.dtype), seed, change)


def error(actual, expected):
    return (actual.double() - expected.double()).norm() / expected.double().norm()


@pytest.fixture
def small_blocks(monkeypatch):
    """Use the smallest blocks that a descriptor takes, so that a schedule is simulated in milliseconds."""
    monkeypatch.setattr(hopper, "BLOCK_M", 4)
    monkeypatch.setattr(hopper, "WEIGHT_ROWS", 128)
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, bias, head_dim", EPILOGUES)
def test_matches_the_reference_in_fp64(kind, bias, head_dim, dtype):
    """Rows, columns and steps that do not fill the last block, or whole heads of q, k and v."""
    tensors = inputs(150, 200, 3 * 384 if head_dim else 592, dtype, kind, bias, head_dim)
    assert hopper.fits(*tensors, dtype)
    torch.testing.assert_close(
        run(*tensors).double(), expected(*tensors).double(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("kind, head_dim", [("swiglu", 0), (None, 64)])
def test_rows_of_nan_and_infinity_change_no_other_row(kind, head_dim):
    x, weight, epilogue = inputs(200, 128, 768, torch.float16, kind, True, head_dim)
    clean = run(x, weight, epilogue)
    bad = torch.tensor([0, 63, 64, 127, 128, 199])
    for value in (float("nan"), float("inf")):
        dirty = x.clone()
        dirty[bad] = value
        actual = run(dirty, weight, epilogue)
        kept = torch.ones(200, dtype=torch.bool).index_fill(0, bad, False)
        assert torch.equal(actual[kept], clean[kept])
        assert not actual[bad].isfinite().any()


def test_a_row_does_not_depend_on_its_batch(monkeypatch):
    x, weight, epilogue = inputs(300, 128, 512, torch.float16, "swiglu", True)
    whole = run(x, weight, epilogue)
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 3)
    for start in (0, 128, 256):  # a multiple of the block: numpy's and torch's matmuls depend on a row's place in it
        for rows in (slice(start, start + count) for count in (1, 2, 140)):
            assert torch.equal(run(x[rows], weight, epilogue, seed=start), whole[rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, bias", [(None, False), (None, True), ("swiglu", False), ("gelu", True)])
def test_rows_in_8_bits(kind, bias, dtype):
    x, weight, epilogue = inputs(150, 272, 592, dtype, kind, bias)
    (x_rows, x_scale), (weight_rows, weight_scale) = quantize_rows_reference(x), quantize_rows_reference(weight)
    epilogue = Epilogue(bias=epilogue.bias, kind=kind, scales=(x_scale, weight_scale))
    assert hopper.fits(x_rows, weight_rows, epilogue, dtype)
    actual = simulate(lambda: hopper.linear_hopper(x_rows, weight_rows, epilogue, dtype), 0)
    dequantized = dequantize_rows(x_rows, x_scale), dequantize_rows(weight_rows, weight_scale)
    assert error(actual, expected(*dequantized, epilogue)) < TOLERANCE[dtype]


def test_no_tokens():
    assert run(*inputs(0, 64, 256, torch.float16, "swiglu")).shape == (0, 128)


def test_operands_that_do_not_fit():
    x, weight, epilogue = inputs(5, 64, 1152, torch.float16, head_dim=64)
    assert hopper.fits(x, weight, epilogue, x.dtype)
    assert not hopper.fits(x[:, :60].contiguous(), weight[:, :60].contiguous(), epilogue, x.dtype)  # rows of 120 bytes
    assert not hopper.fits(x, weight[:, 4:], epilogue, x.dtype)  # not aligned
    assert not hopper.fits(x, weight[:500], Epilogue(), x.dtype)  # rows of the result: 1000 bytes
    for head_dim, rows in ((16, 1152), (256, 1536), (64, 960)):  # 960: a tile would have heads of k and of v
        assert not hopper.fits(*inputs(5, 64, rows, torch.float16, head_dim=head_dim), x.dtype)


def small_case(number):
    """Return operands for one to nine tiles of one to four steps, in blocks of `small_blocks`."""
    tokens, steps = 1 + number % 11, 1 + number % 4
    return inputs(tokens, 64 * steps, 256, torch.float16, "swiglu" if number % 3 else None, bool(number % 2))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("part", range(2))
def test_random_schedules(part):
    """Each case is two programs, with a schedule each."""
    for number in range(part, SCHEDULES, 2):
        tensors = small_case(number)
        assert error(run(*tensors, seed=number), expected(*tensors)) < 1e-3, number


@pytest.fixture
def hopper_device(monkeypatch):
    """Let the dispatch see a device of compute capability 9.0; return the places where a kernel is launched."""
    module = sys.modules["unpadded_kernels.linear"]  # the package's attribute is the op
    monkeypatch.setattr(choices, "generation", lambda device: 90)
    return barriers.recorded_launches(monkeypatch, module, "launch_linear", hopper, "linear_hopper")


def rotary_case(dtype=torch.float16):
    x, weight, epilogue = inputs(9, 64, 3 * 384, dtype, bias=True, head_dim=64)
    return x, weight, epilogue.bias, epilogue.cos_sin, 6


def test_ops_launch_the_kernel_of_their_choice(hopper_device):
    x, weight, epilogue = inputs(9, 64, 256, torch.float16, "swiglu", True)
    rows, for_rotary = (quantize_rows_reference(x), quantize_rows_reference(weight)), rotary_case()
    calls = {
        "linear_activation": lambda: linear_activation_triton(x, weight, epilogue.bias, "swiglu"),
        "linear_invariant": lambda: linear_invariant_triton(x, weight, None, None),
        "linear_rotary": lambda: linear_rotary_triton(*for_rotary),
        "linear_fp8": lambda: linear_fp8_triton(*rows[0], *rows[1], None, "gelu", torch.float16),
    }
    for op, call in calls.items():
        del hopper_device[:]
        plain = call()
        with choices.override(**{op: "hopper"}):
            torch.testing.assert_close(call(), plain, atol=2e-3, rtol=2e-3)
        assert hopper_device == ["hopper"] if op == "linear_rotary" else ["triton", "hopper"], op
    del hopper_device[:]
    with choices.override(linear_rotary="hopper"):
        linear_rotary_triton(*for_rotary, True)
    with choices.override(linear_invariant="hopper"):
        linear_rotary_triton(*for_rotary, True)
    assert hopper_device == ["triton", "hopper"]  # the choice of linear_invariant counts


def test_fp32_and_operands_that_do_not_fit_take_plain_triton(hopper_device):
    with choices.override(linear_invariant="hopper"):
        linear_invariant_triton(*inputs(9, 60, 256, torch.float16)[:2], None)
    linear_invariant_triton(*inputs(9, 64, 256, torch.float32)[:2], None)
    assert hopper_device == ["triton", "triton"]


def test_only_compute_capability_9_0_is_supported(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    for capability in ((8, 0), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert is_supported(torch.device("cuda", 0)) == (capability == (9, 0))
    assert not is_supported(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delattr(barriers.hopper.tma, "async_load", raising=False)
    monkeypatch.delattr(barriers.hopper.tma, "async_copy_global_to_shared", raising=False)
    assert not is_supported(torch.device("cuda", 0))
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not is_supported(torch.device("cuda", 0))  # in the interpreter


def without(line):
    return lambda source: source.replace(line, "None")


def only_in(function, before, after):
    return lambda source: source.replace(before, after) if f"def {function}(" in source else source


MUTANTS = {
    "a stage is loaded before it is free": without("mbarrier.wait(empty.index(stage), (step // STAGES + 1) % 2)"),
    "a stage is read before it is loaded": without("mbarrier.wait(full.index(stage), step // STAGES % 2)"),
    "the producer's phase is that of the consumers": lambda s: s.replace(
        "(step // STAGES + 1) % 2", "step // STAGES % 2"
    ),
    "the phase does not change": lambda s: s.replace("step // STAGES % 2)", "0)"),
    "the producer has one stage less": only_in("_load_tiles", "step % STAGES", "step % (STAGES - 1)"),
    "a stage is free while a wgmma reads it": lambda s: s.replace("warpgroup_mma_wait(1,", "warpgroup_mma_wait(2,"),
    "the wrong stage becomes free": lambda s: s.replace("count=1, pred=k > 0", "count=1, pred=k >= 0"),
    "a tile's last stage is never free": lambda s: s.replace(
        "mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)\n", "None\n"
    ),
    "one consumer frees a stage": lambda s: s.replace("new_barriers(STAGES, 2)", "new_barriers(STAGES, 1)"),
    "more bytes are expected than loaded": lambda s: s.replace("(BLOCK_M + PARTS", "(BLOCK_M + 1 + PARTS"),
    "the sums are read before they are complete": lambda s: s.replace("warpgroup_mma_wait(0,", "warpgroup_mma_wait(1,"),
    "a block is written while it is stored": only_in("_multiply_tiles", "tma.store_wait(0)  #", "#"),
    "a block is written before other threads know": only_in(
        "_multiply_tiles", "thread_barrier()\n        y_block", "y_block"
    ),
    "a block is stored without a fence": only_in("_multiply_tiles", "fence_async_shared()", "None"),
    "a block is stored without a barrier": only_in(
        "_multiply_tiles", "thread_barrier()\n        tma_store", "tma_store"
    ),
    "the program ends before its stores": only_in("_multiply_tiles", "\n    tma.store_wait(0)\n", "\n"),
    "the second consumer waits for steps that do not exist": without(
        "mbarrier.arrive(first_is_ahead, count=1, pred=step < lag)"
    ),
    "both consumers read the same rows": lambda s: s.replace("slice(WARPGROUP * ROWS,", "slice(0,"),
    "gate twice": lambda s: s.replace("[part * OUT + n, k]", "[n, k]"),
    "the sums start at the second step": lambda s: s.replace("use_acc=k > 0", "use_acc=k > 64"),
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", MUTANTS)
def test_the_simulation_finds_faults(name):
    change = MUTANTS[name]
    changed = False

    def change_and_see(source):
        nonlocal changed
        changed |= change(source) != source
        return change(source)

    found = False
    for number in range(60):
        tensors = small_case(number)
        try:
            found = not error(run(*tensors, number, change_and_see), expected(*tensors)) < 1e-3
        except SimulationError:
            found = True
        if found:
            break
    assert changed and found
