"""Variable-length attention: the Triton kernel, through pointers and descriptors, against the reference."""

import itertools
import sys

import pytest
import torch
from support.devices import DEVICE, DTYPES, HAS_CUDA, assert_matches, packed

from unpadded_kernels.attention import (
    attention,
    attention_reference,
    attention_triton,
    make_tile_map,
)
from unpadded_kernels.tiles import ATTENTION, attention_block_m, attention_tile

pytestmark = [
    pytest.mark.usefixtures("seed", "poison_empty"),
    # queries past the end of a text may see no key; their rows are never stored
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered"),
]
RAGGED = [[1, 257, 64], [1], [7], [128, 64], [5, 0, 70], [0, 0, 3, 0], [2] * 9, [129, 1, 1, 31]]


def variants(name, values):
    """Parametrize by values, dtype and kernel. fp32 takes no descriptors, so its two kernels are the same.

    In the interpreter only the first value runs in fp16 through pointers, whose branches are those of fp32.
    """
    cases = list(itertools.product(values, DTYPES, ["pointers", "descriptors"]))
    if not HAS_CUDA:
        cases = [case for case in cases if case[1:] in ((torch.float32, "pointers"), (torch.float16, "descriptors"))]
        cases.append((values[0], torch.float16, "pointers"))
    return pytest.mark.parametrize(f"{name}, dtype, kernel", cases, indirect=["kernel"], ids=str)


def inputs(lengths, heads, head_dim, dtype):
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, device=DEVICE, dtype=dtype)
    return qkv, packed(lengths), max(lengths, default=0), head_dim**-0.5


def slopes(heads):
    return torch.rand(heads, device=DEVICE)


def position_bias(heads, reach):
    return 2 * torch.randn(heads, 2 * reach + 1, device=DEVICE)


def expected(qkv, *rest):
    return attention_reference(qkv.float(), *rest)


@variants("lengths", RAGGED)
def test_matches_the_reference(lengths, dtype, kernel):
    arguments = inputs(lengths, 2, 32, dtype)
    assert_matches(attention_triton(*arguments), expected(*arguments))


@variants("head_dim", [16, 24, 64, 96, 128])
def test_head_dims(head_dim, dtype, kernel):
    arguments = inputs([70, 3], 3, head_dim, dtype)
    assert_matches(attention_triton(*arguments), expected(*arguments))


@variants("window", [0, 1, 20, 64, 500])
def test_windows(window, dtype, kernel):
    arguments = *inputs([1, 0, 260, 30], 1, 16, dtype), window
    assert_matches(attention_triton(*arguments), expected(*arguments))


@variants("window", [None, 33])
def test_alibi(window, dtype, kernel):
    arguments = *inputs([1, 0, 200, 30], 3, 16, dtype), window, slopes(3)
    assert_matches(attention_triton(*arguments), expected(*arguments))


def key_lengths(lengths, device=DEVICE):
    return torch.tensor(lengths, dtype=torch.int32, device=device)


@variants("window", [None, 20, 0])
def test_fewer_keys_than_queries(window, dtype, kernel):
    lengths, keys = [1, 70, 32, 260, 0, 130, 128, 33], [1, 1, 32, 128, 0, 129, 64, 31]  # at the borders of blocks
    arguments = *inputs(lengths, 2, 32, dtype), window, None
    found = attention_triton(*arguments, None, None, key_lengths(keys))
    assert_matches(found, expected(*arguments, None, None, key_lengths(keys)))
    if window == 0:  # a token sees itself or, if it is no key, nothing
        values = arguments[0][:, 2].flatten(1).clone()
        values[2:71] = 0
        assert torch.equal(found[:71], values[:71])


def test_fewer_keys_with_alibi(kernel):
    arguments = *inputs([70, 200], 3, 16, torch.float16), None, slopes(3), None, None, key_lengths([3, 150])
    assert_matches(attention_triton(*arguments), expected(*arguments))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, for the scores of the NaN
def test_tokens_that_are_no_keys_do_not_matter_to_others(kernel):
    qkv, *rest = inputs([70], 2, 32, torch.float16)
    clean = attention_triton(qkv, *rest, None, None, None, None, key_lengths([33]))
    alone = attention_triton(qkv[:33].clone(), packed([33]), 33, rest[-1])
    assert torch.equal(clean[:33], alone)
    qkv[33:] = float("nan")
    assert torch.equal(attention_triton(qkv, *rest, None, None, None, None, key_lengths([33]))[:33], clean[:33])


def test_the_kernel_in_gluon_computes_full_attention_only(monkeypatch):
    hopper = pytest.importorskip("unpadded_kernels.hopper.attention")
    calls = []
    monkeypatch.setattr(hopper, "attention_hopper", lambda *arguments: calls.append(arguments))
    module = sys.modules["unpadded_kernels.attention"]
    for name, value in (("generation", 90), ("chosen", "hopper"), ("is_supported", True)):
        monkeypatch.setattr(module, name, lambda *_, value=value: value)
    arguments = *inputs([40], 2, 32, torch.float16), None, None, None
    assert attention_triton(*arguments) is None and len(calls) == 1
    keys = key_lengths([7])
    assert_matches(attention_triton(*arguments, keys), expected(*arguments, keys))


def test_a_tile_map_with_keys(kernel):
    lengths, keys = [3, 140, 129], [3, 1, 100]
    arguments = *inputs(lengths, 2, 32, torch.float16), None, None
    block_m = attention_tile(torch.float16, 32, 80).block_m
    tile_map = make_tile_map(lengths, block_m, key_lengths(keys, "cpu"))
    assert tile_map[:, [1, 3]].unique(dim=0).tolist() == [[3, 3], [129, 100], [140, 1]]
    padded = torch.cat((tile_map, tile_map.new_zeros(2, 4))).to(DEVICE)
    whole = attention_triton(*arguments, None, None, key_lengths(keys))
    assert torch.equal(attention_triton(*arguments, padded, None, key_lengths(keys)), whole)
    with pytest.raises(ValueError, match="tile_map must have 3 columns, got 4: make it with key_lengths"):
        attention_triton(*arguments, padded)


@variants("reach", [20, 1, 91, 300])
def test_position_bias(reach, dtype, kernel):
    arguments = *inputs([1, 0, 200, 30], 3, 16, dtype), None, None, None, position_bias(3, reach)
    assert_matches(attention_triton(*arguments), expected(*arguments))


def test_position_bias_with_a_window_and_in_a_wider_table(kernel):
    arguments = *inputs([100, 7], 3, 16, torch.float32), 33, None, None, position_bias(3, 40)[:, 20:61]
    assert_matches(attention_triton(*arguments), expected(*arguments))


def test_position_bias_is_that_of_key_minus_query():
    """The heads see the key at distance 2, at -1, and those from 3 on; where there is none, all keys alike."""
    qkv = torch.zeros(6, 3, 3, 16, device=DEVICE)
    qkv[:, 2] = torch.arange(6.0, device=DEVICE)[:, None, None]
    bias = torch.full((3, 7), -1e4, device=DEVICE)
    bias[0, 3 + 2] = bias[1, 3 - 1] = bias[2, 3 + 3] = 0
    attended = attention_reference(qkv, packed([6]), 6, 0.25, position_bias=bias)[:, ::16]
    mean = 2.5
    seen = [[2, mean, 4], [3, 0, 4.5], [4, 1, 5], [5, 2, mean], [mean, 3, mean], [mean, 4, mean]]
    torch.testing.assert_close(attended, torch.tensor(seen, device=DEVICE))


def test_the_scale_is_used(kernel):
    qkv, cu_seqlens, max_seqlen, _ = inputs([70], 1, 32, torch.float32)
    for bias in (None, position_bias(1, 20)):
        arguments = qkv, cu_seqlens, max_seqlen, 0.7, None, None, None, bias
        assert_matches(attention_triton(*arguments), expected(*arguments))


@variants("window", [None, 20])
def test_a_text_does_not_depend_on_its_batch(window, dtype, kernel):
    lengths = [130, 1, 200, 64]
    qkv, cu_seqlens, max_seqlen, scale = inputs(lengths, 2, 32, dtype)
    bias = None if window else position_bias(2, 91)
    whole = attention_triton(qkv, cu_seqlens, max_seqlen, scale, window, position_bias=bias)
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        rows = slice(start, start + length)
        alone = attention_triton(qkv[rows], packed([length]), length, scale, window, position_bias=bias)
        assert torch.equal(whole[rows], alone)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, for the rows of the neighbors
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_and_nan_in_the_neighbors_do_not_matter(dtype, kernel):
    qkv, cu_seqlens, max_seqlen, scale = inputs([20, 70, 20], 2, 32, dtype)
    clean = attention_triton(qkv, cu_seqlens, max_seqlen, scale)
    qkv[:20], qkv[90:] = float("inf"), float("nan")
    assert torch.equal(attention_triton(qkv, cu_seqlens, max_seqlen, scale)[20:90], clean[20:90])


def test_large_scores_do_not_overflow(kernel):
    qkv, cu_seqlens, max_seqlen, scale = inputs([100, 7], 2, 32, torch.float16)
    qkv[:, :2] *= 30
    actual = attention_triton(qkv, cu_seqlens, max_seqlen, scale)
    torch.testing.assert_close(actual.float(), expected(qkv, cu_seqlens, max_seqlen, scale), atol=1e-2, rtol=1e-2)


def test_no_tokens(kernel):
    assert attention_triton(*inputs([0, 0], 2, 32, torch.float16)).shape == (0, 64)


def test_strided_qkv_is_read_in_place(kernel):
    qkv, cu_seqlens, max_seqlen, scale = inputs([5, 70], 2, 32, torch.float32)
    wide = torch.randn(75, 4, 3, 48, device=DEVICE)
    wide[:, :3, 1:, 8:40] = qkv
    arguments = cu_seqlens, max_seqlen, scale
    assert_matches(attention_triton(wide[:, :3, 1:, 8:40], *arguments), expected(qkv, *arguments))


@pytest.mark.parametrize("lengths", [[1, 4], [4, 1]], ids=str)  # within a text, and at its first token
def test_tokens_past_two_to_the_31_elements(lengths, far_tokens, kernel):
    arguments = far_tokens.unflatten(1, (3, 2, 32)), packed(lengths), 4, 0.2
    assert_matches(attention_triton(*arguments), expected(*arguments))


def test_a_tile_map_made_on_the_host(kernel):
    lengths = [3, 0, 140, 129]
    arguments = *inputs(lengths, 2, 32, torch.float16), None, None
    block_m = attention_tile(torch.float16, 32, 80).block_m
    tile_map = make_tile_map(lengths, block_m).to(DEVICE)
    assert torch.equal(attention_triton(*arguments, tile_map), attention_triton(*arguments))
    padded = torch.cat((tile_map, tile_map.new_zeros(2, 3)))  # as in a captured graph
    assert torch.equal(attention_triton(*arguments, padded), attention_triton(*arguments))


def test_a_tile_map_of_some_blocks(kernel):
    lengths = [3, 0, 140, 129]
    arguments = *inputs(lengths, 2, 32, torch.float16), None, None
    tile_map = torch.tensor([[0, 3, 0], [143, 129, 1]], dtype=torch.int32, device=DEVICE)
    partial, whole = attention_triton(*arguments, tile_map), attention_triton(*arguments)
    for rows in (slice(0, 3), slice(271, 272)):
        assert torch.equal(partial[rows], whole[rows])
    assert partial[3:271].isnan().all()


def test_the_tile_map_has_the_longest_texts_first_and_no_empty_tile():
    long, longer, small = [[3, 300, block] for block in range(3)], [[431, 129, 0], [431, 129, 1]], [[303, 128, 0]]
    assert make_tile_map([3, 0, 300, 128, 129], 128).tolist() == [*long, *longer, *small, [0, 3, 0]]
    assert make_tile_map([], 128).shape == (0, 3)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_all_generations_take_the_same_tile_map(dtype, head_dim):
    """The host makes the map before it knows whether qkv fits a descriptor."""
    generations = {generation for _, _, generation in ATTENTION}
    assert len({attention_tile(dtype, head_dim, generation).block_m for generation in generations}) == 1
    assert attention_block_m(dtype, head_dim, torch.device(DEVICE)) == attention_tile(dtype, head_dim, 80).block_m


def test_invalid_arguments_raise():
    qkv, cu_seqlens, max_seqlen, scale = inputs([32], 2, 32, torch.float32)
    with pytest.raises(ValueError, match=r"qkv must be \(32, 3, 32, 2\) with contiguous rows"):
        attention_triton(qkv.transpose(2, 3), cu_seqlens, max_seqlen, scale)
    with pytest.raises(ValueError, match="scale must be positive, got 0: use"):
        attention_triton(qkv, cu_seqlens, max_seqlen, 0)
    with pytest.raises(ValueError, match="window must be 0 tokens or more, got -1"):
        attention_triton(qkv, cu_seqlens, max_seqlen, scale, -1)
    for bias in (torch.zeros(2, 8, device=DEVICE), torch.zeros(3, 9, device=DEVICE)):
        with pytest.raises(ValueError, match=r"position_bias must be \(2, 9\) with contiguous rows"):
            attention_triton(qkv, cu_seqlens, max_seqlen, scale, position_bias=bias)
    with pytest.raises(ValueError, match="no kernel for head_dim 256"):
        attention_triton(torch.randn(4, 3, 1, 256, device=DEVICE), packed([4]), 4, scale)


def test_op_contract(monkeypatch):
    monkeypatch.undo()  # opcheck compares what torch.empty returns
    arguments = inputs([5, 2], 2, 32, torch.float32)
    torch.library.opcheck(attention, arguments)
    torch.library.opcheck(attention, (*arguments, 3, slopes(2)))
    torch.library.opcheck(attention, (*arguments, None, None, None, None, key_lengths([2, 1])))
    torch.library.opcheck(attention, (*arguments, None, None, None, position_bias(2, 3)))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_mixed_lengths_to_8192_in_one_launch(head_dim, kernel):
    arguments = inputs([1, 8192, 0, 2, 4097, 512, 33], 12, head_dim, torch.float16)
    assert_matches(attention_triton(*arguments), expected(*arguments))


@pytest.mark.gpu
def test_a_captured_graph_follows_its_inputs(kernel):
    lengths, others = [70, 200, 7], [130, 7, 140]
    qkv, cu_seqlens, max_seqlen, scale = inputs(lengths, 2, 64, torch.float16)
    block_m = attention_block_m(qkv.dtype, 64, qkv.device)
    tiles = max(len(make_tile_map(lengths, block_m)), len(make_tile_map(others, block_m)))

    def padded_map(lengths):
        tile_map = make_tile_map(lengths, block_m)
        return torch.cat((tile_map, tile_map.new_zeros(tiles - len(tile_map), 3))).to(DEVICE)

    tile_map = padded_map(lengths)
    attention_triton(qkv, cu_seqlens, max_seqlen, scale, tile_map=tile_map)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_triton(qkv, cu_seqlens, max_seqlen, scale, tile_map=tile_map)
    qkv.normal_()
    cu_seqlens.copy_(packed(others))
    tile_map.copy_(padded_map(others))
    graph.replay()
    assert_matches(out, expected(qkv, packed(others), 140, scale))
