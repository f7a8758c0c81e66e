"""The attention kernel for sm_90, whose source is simulated: against the reference in fp64, under random schedules."""

import inspect
import random
import sys

import pytest
import torch
from support.devices import HAS_CUDA, TOLERANCE, packed

from unpadded_kernels import choices
from unpadded_kernels.attention import attention_reference, attention_triton, make_tile_map

pytest.importorskip("triton.experimental.gluon")
from support.barriers import SimulationError, recorded_launches, simulate

from unpadded_kernels.hopper import attention as hopper

attention_module = sys.modules["unpadded_kernels.attention"]  # the package's attribute is the op

pytestmark = [
    pytest.mark.usefixtures("seed", "poison_empty"),
    pytest.mark.skipif(HAS_CUDA, reason="simulates launches on CPU tensors"),
    # plain Triton's queries past the end of a text may see no key; their rows are never stored
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|All-NaN)"),
]
# part blocks of 1 and 127 keys, whole blocks only, a text of 1 token, several tiles per program
LENGTHS = [[1, 257, 64], [128], [255, 1], [5, 0, 70], [384, 128, 129]]
DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture
def small_blocks(monkeypatch):
    """Make tiles of 8 queries and 8 keys, and the shortest ring."""
    monkeypatch.setattr(hopper, "BLOCK_M", 8)
    monkeypatch.setattr(hopper, "BLOCK_N", 8)
    monkeypatch.setattr(hopper, "SLOTS", {16: 4})


def inputs(lengths, heads=2, head_dim=64, dtype=torch.float16):
    return torch.randn(sum(lengths), 3, heads, head_dim).to(dtype), make_tile_map(lengths, hopper.BLOCK_M)


def run(qkv, tile_map, slopes=None, seed=0, change=str):
    return simulate(lambda: hopper.attention_hopper(qkv, tile_map, qkv.shape[3] ** -0.5, slopes), seed, change)


def expected(qkv, lengths, slopes=None):
    return attention_reference(qkv.double(), packed(lengths), max(lengths), qkv.shape[3] ** -0.5, None, slopes)


def assert_matches(actual, expected):
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_matches_the_reference(lengths, dtype):
    qkv, tile_map = inputs(lengths, dtype=dtype)
    assert_matches(run(qkv, tile_map), expected(qkv, lengths))


@pytest.mark.parametrize("head_dim", [16, 32])
def test_head_dims(head_dim):
    qkv, tile_map = inputs([130, 3], head_dim=head_dim)
    assert_matches(run(qkv, tile_map), expected(qkv, [130, 3]))


def test_alibi():
    slopes = torch.rand(3)
    qkv, tile_map = inputs([300, 1, 128], heads=3)
    assert_matches(run(qkv, tile_map, slopes), expected(qkv, [300, 1, 128], slopes))


def test_large_scores_do_not_overflow():
    qkv, tile_map = inputs([200])
    qkv[:, :2] *= 30
    torch.testing.assert_close(run(qkv, tile_map).double(), expected(qkv, [200]), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_and_nan_in_the_neighbors_do_not_matter(dtype):
    qkv, tile_map = inputs([20, 200, 150], dtype=dtype)
    clean = run(qkv, tile_map)
    qkv[:20], qkv[220:] = float("inf"), float("nan")
    assert torch.equal(run(qkv, tile_map)[20:220], clean[20:220])


@pytest.mark.parametrize("programs", [1, 2, 5])
def test_a_text_does_not_depend_on_its_batch(programs, monkeypatch):
    lengths = [130, 1, 257, 64]
    qkv, tile_map = inputs(lengths)
    alone = [run(rows, make_tile_map([len(rows)], hopper.BLOCK_M)) for rows in qkv.split(lengths)]
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: programs)
    assert torch.equal(run(qkv, tile_map, seed=programs), torch.cat(alone))


def test_tiles_of_a_captured_graph(small_blocks):
    """A map ends in empty tiles, and may hold only some of the tiles."""
    qkv, tile_map = inputs([3, 20, 9], head_dim=16)
    whole = run(qkv, tile_map)
    assert torch.equal(run(qkv, torch.cat((tile_map, tile_map.new_zeros(5, 3)))), whole)
    assert run(qkv, tile_map.new_zeros(4, 3)).isnan().all()
    last = torch.tensor([[3, 20, 2]], dtype=torch.int32)
    partial = run(qkv, last)
    assert torch.equal(partial[19:23], whole[19:23])
    assert partial[:19].isnan().all() and partial[23:].isnan().all()


def test_padded_rows_of_qkv_are_read_in_place():
    qkv, tile_map = inputs([70, 5])
    wide = torch.full((75, 4, 2, 64), float("nan"), dtype=qkv.dtype)
    wide[:, :3] = qkv
    assert torch.equal(run(wide[:, :3], tile_map), run(qkv, tile_map))


def one_schedule(seed, monkeypatch, change=str):
    """Check one of some texts of a few blocks. Often the others are NaN; the map may end in empty tiles."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: chance.choice((1, 1, 3)))
    lengths = [chance.choice((1, 3, 8, 8, 17, 30)) for _ in range(chance.randint(1, 4))]
    qkv, tile_map = inputs(lengths, heads=1, head_dim=16)
    tile_map = torch.cat((tile_map, tile_map.new_zeros(chance.randint(0, 2), 3)))
    text = chance.randrange(len(lengths))
    rows = slice(sum(lengths[:text]), sum(lengths[: text + 1]))
    if chance.random() < 0.7:
        qkv[: rows.start], qkv[rows.stop :] = float("nan"), float("nan")
    assert_matches(run(qkv, tile_map, seed=seed, change=change)[rows], expected(qkv[rows], lengths[text : text + 1]))


@pytest.mark.parametrize("seeds", [range(250), pytest.param(range(250, 2000), marks=pytest.mark.slow)], ids=str)
def test_random_schedules(seeds, small_blocks, monkeypatch):
    for seed in seeds:
        one_schedule(seed, monkeypatch)


MUTANTS = {
    "the producer does not wait for q": ("mbarrier.wait(q_empty", "(lambda *_: 0)(q_empty"),
    "the producer does not wait for k and v": ("mbarrier.wait(kv_empty", "(lambda *_: 0)(kv_empty"),
    "the producer waits for the other phase": ("& 1 ^ 1", "& 1"),
    "the consumers wait for the other phase": ("& 1, pred", "& 1 ^ 1, pred"),
    "the producer expects half of q": ("2 * ROWS * HEAD_DIM * 2", "ROWS * HEAD_DIM * 2"),
    "q is not released": ("mbarrier.arrive(q_empty.index(q_slot), count=1)", "pass"),
    "k is released before its wgmma ended": (
        """scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(kv_empty.index(k_slot), count=1)""",
        """mbarrier.arrive(kv_empty.index(k_slot), count=1)
            scores = warpgroup_mma_wait(0, deps=(scores,))""",
    ),
    "v is released before its wgmma ended": (
        """acc, weights = warpgroup_mma_wait(0, deps=(next_acc, next_weights))
                mbarrier.arrive(kv_empty.index(v_slot), count=1)""",
        """mbarrier.arrive(kv_empty.index(v_slot), count=1)
                acc, weights = warpgroup_mma_wait(0, deps=(next_acc, next_weights))""",
    ),
    "q is not awaited": ("q_slot = _wait_full(q_full, tile, 2)", "q_slot = tile % 2"),
    "the first k is not awaited": ("k_slot = _wait_full(kv_full, item, SLOTS)", "k_slot = item % SLOTS"),
    "the second k is not awaited": ("_wait_full(kv_full, item + 2, SLOTS, blocks > 1)", "pass"),
    "the next k is not awaited": ("_wait_full(kv_full, item + 2, SLOTS, block + 1 < blocks)", "pass"),
    "a k after the last is awaited": ("block + 1 < blocks)", "True)"),
    "the first v is not awaited": ("v_slot = _wait_full(kv_full, item + 1, SLOTS)", "v_slot = (item + 1) % SLOTS"),
    "the next v is not awaited": ("                _wait_full(kv_full, item + 1, SLOTS)\n", ""),
    "the ring is shorter than a consumer needs": ("item % SLOTS", "item % (SLOTS - 1)"),
    "one consumer releases a slot": ("new_barriers(SLOTS, 2)", "new_barriers(SLOTS, 1)"),
    "no consumer has the first turn": ("mbarrier.arrive(turn.index(0), count=1)", "pass"),
    "a consumer keeps the turn": ("turn.index(1 - CONSUMER)", "turn.index(CONSUMER)"),
    "the cleared rows have no fence": ("fence_async_shared()\n                thread_barrier()", "thread_barrier()"),
    "the cleared rows have no barrier": ("thread_barrier()", "pass"),
    "the next text's values are not cleared": ("if length - key < BLOCK_N:", "if False:"),
    "the next text's scores are not masked": ("(n < length - key)", "(n < BLOCK_N)"),
    "empty tiles are computed": ("if block_m * (2 * ROWS) < length:", "if True:"),
    "the tile ahead is another": ("next_work = gl.minimum(work + gl", "next_work = gl.minimum(work + 1 + gl"),
    "earlier values are not scaled": ("acc = acc * gl.convert_layout(decay, row_layout)[:, None]", "pass"),
    "earlier weights are not scaled": ("total * decay", "total"),
    "a consumer has the other's queries": ("q_slot * 2 + CONSUMER", "q_slot * 2 + 1 - CONSUMER"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_simulation_finds(mutant, small_blocks, monkeypatch):
    text, replacement = MUTANTS[mutant]
    assert text in inspect.getsource(hopper)

    def change(source):
        return source.replace(text, replacement)

    with pytest.raises((SimulationError, AssertionError)):
        for seed in range(100):
            one_schedule(seed, monkeypatch, change)


@pytest.fixture
def sm_90(monkeypatch):
    """Let the op see a device of compute capability 9.0; return the names of the kernels that it launches."""
    for module in (attention_module, choices):
        monkeypatch.setattr(module, "generation", lambda device: 90)
    return recorded_launches(monkeypatch, attention_module, "launch_attention", hopper, "attention_hopper")


def test_the_op_launches_the_kernel_of_its_choice(sm_90):
    lengths = [70, 3]
    qkv, tile_map = inputs(lengths, heads=1, head_dim=16)
    arguments = qkv, packed(lengths), 70, 0.25, None
    for slopes in (None, torch.rand(1)):
        del sm_90[:]
        plain = attention_triton(*arguments, slopes)
        with choices.override(attention="hopper"):
            first, second = attention_triton(*arguments, slopes), attention_triton(*arguments, slopes, tile_map)
        assert sm_90 == ["triton", "hopper", "hopper"]
        assert torch.equal(first, second)
        assert_matches(first, plain.double())


@pytest.mark.parametrize("case", ["fp32", "window", "position bias", "head_dim 24", "head_dim 128", "not packed"])
def test_other_attention_takes_plain_triton(case, sm_90):
    dtype = torch.float32 if case == "fp32" else torch.float16
    head_dim = int(case.split()[1]) if case.startswith("head_dim") else 16
    qkv, _ = inputs([9], heads=2, head_dim=head_dim, dtype=dtype)
    if case == "not packed":
        qkv = torch.randn(9, 3, 3, 16).to(dtype)[:, :, :2]
    with choices.override(attention="hopper"):
        bias = torch.zeros(2, 9) if case == "position bias" else None
        attention_triton(qkv, packed([9]), 9, 0.25, 3 if case == "window" else None, position_bias=bias)
    assert sm_90 == ["triton"]
