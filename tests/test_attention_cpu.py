"""CPU attention with a window or biases: against the reference, and bit for bit in any batch."""

import itertools

import pytest
import torch
from support.devices import TOLERANCE, assert_matches

from unpadded_kernels import avx512
from unpadded_kernels.attention import attention_reference
from unpadded_kernels.attention_cpu import attention_cpu

pytestmark = pytest.mark.usefixtures("seed")
LENGTHS = [1, 2, 7, 64, 65, 66, 65, 129, 130, 513, 700]
HEADS, HEAD_DIM, SCALE = 3, 32, 32**-0.5
SLOPES = torch.tensor([0.5, 0.0625, 0.25])
TABLE = 2 * torch.randn(HEADS, 183, generator=torch.Generator().manual_seed(0))
BIASES = pytest.mark.parametrize(
    "window, slopes, table",
    [
        (64, None, None),
        (5, None, None),
        (0, None, None),
        (None, SLOPES, None),
        (64, SLOPES, None),
        (None, None, TABLE),
        (64, SLOPES, TABLE),
    ],
    ids=["window of 64", "of 5", "of 0", "ALiBi", "ALiBi and window", "table", "all"],
)


@pytest.fixture(autouse=True, params=["avx512", "torch"])
def kernel(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(avx512, "supports", lambda dtype: False)
    elif not avx512.supports(torch.float32):
        pytest.skip("needs AVX-512 and a C compiler")


def packed_qkv(lengths, dtype):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return torch.randn(sum(lengths), 3, HEADS, HEAD_DIM).to(dtype), cu_seqlens


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@BIASES
def test_matches_the_reference(window, slopes, table, dtype):
    qkv, cu_seqlens = packed_qkv(LENGTHS, dtype)
    arguments = cu_seqlens, 700, SCALE, window, slopes, None, table
    actual = attention_cpu(qkv, *arguments)
    assert actual.dtype == dtype
    assert_matches(actual, attention_reference(qkv.float(), *arguments))


KEYS = [1, 1, 7, 3, 65, 64, 1, 100, 130, 512, 40]
FEWER_KEYS = pytest.mark.parametrize("window, slopes", [(None, None), (5, None), (0, None), (64, SLOPES)])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@FEWER_KEYS
def test_fewer_keys_than_queries(window, slopes, dtype):
    qkv, cu_seqlens = packed_qkv(LENGTHS, dtype)
    keys = torch.tensor(KEYS, dtype=torch.int32)
    actual = attention_cpu(qkv, cu_seqlens, 700, SCALE, window, slopes, None, None, keys)
    assert_matches(actual, attention_reference(qkv.float(), cu_seqlens, 700, SCALE, window, slopes, None, None, keys))
    for text, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        alone, only = torch.tensor([0, stop - start], dtype=torch.int32), keys[text : text + 1]
        if KEYS[text] == LENGTHS[text]:
            only = None  # as in a batch of whole texts
        one = attention_cpu(qkv[start:stop].clone(), alone, stop - start, SCALE, window, slopes, None, None, only)
        assert torch.equal(one, actual[start:stop]), stop - start


def test_the_reference_ignores_tokens_that_are_no_keys():
    qkv, cu_seqlens = packed_qkv([9], torch.float64)
    found = attention_reference(qkv, cu_seqlens, 9, SCALE, 2, None, None, None, torch.tensor([4]))
    for query in range(9):
        q, keys = qkv[query, 0], slice(max(0, query - 2), min(4, query + 3))
        weights = torch.einsum("hd,khd->hk", q, qkv[keys, 1]).mul(SCALE).softmax(1)
        torch.testing.assert_close(found[query].view(HEADS, -1), torch.einsum("hk,khd->hd", weights, qkv[keys, 2]))


def test_a_wide_window_masks_whole_blocks_of_keys():
    """torch's kernel computes 512 keys at a time: for some queries, the first 512 of their block are outside."""
    qkv, cu_seqlens = packed_qkv([1000], torch.float32)
    arguments = qkv, cu_seqlens, 1000, SCALE, 300
    assert_matches(attention_cpu(*arguments), attention_reference(*arguments))


def test_the_mask_runs_in_a_fused_kernel():
    """A mask of three dimensions would have the same values, and take twice the time."""
    qkv, cu_seqlens = packed_qkv([100, 100, 3], torch.float32)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):  # raises if it cannot run
        attention_cpu(qkv, cu_seqlens, 100, SCALE, 5, SLOPES, None, TABLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@BIASES
def test_a_text_does_not_depend_on_its_batch(window, slopes, table, dtype):
    qkv, cu_seqlens = packed_qkv(LENGTHS, dtype)
    whole = attention_cpu(qkv, cu_seqlens, 700, SCALE, window, slopes, None, table)
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        alone = torch.tensor([0, stop - start], dtype=torch.int32)
        one = attention_cpu(qkv[start:stop].clone(), alone, stop - start, SCALE, window, slopes, None, table)
        assert torch.equal(one, whole[start:stop]), stop - start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window, slopes, keys", [(3, None, None), (None, SLOPES, None), (None, None, 4)])
def test_short_texts_of_equal_length_do_not_depend_on_their_batch(window, slopes, keys, dtype):
    for length in (5, 7, 8, 9, 16):
        qkv, cu_seqlens = packed_qkv([length] * 5, dtype)
        counts = None if keys is None else torch.tensor([keys, 1, 2, 3, keys])
        whole = attention_cpu(qkv, cu_seqlens, length, SCALE, window, slopes, None, None, counts)
        for text, rows in enumerate(qkv.split(length)):
            alone, only = (
                torch.tensor([0, length], dtype=torch.int32),
                counts if keys is None else counts[text : text + 1],
            )
            one = attention_cpu(rows.clone(), alone, length, SCALE, window, slopes, None, None, only)
            assert torch.equal(one, whole[text * length : (text + 1) * length]), (length, text)


def test_alibi_in_bf16_keeps_fp32_distances():
    """bf16 represents distances past 256 inexactly; a rounded bias would move the weights."""
    qkv = torch.zeros(600, 3, 1, 16, dtype=torch.bfloat16)
    qkv[:, 2, 0, 0] = torch.arange(600) % 2  # the values of adjacent keys differ
    cu_seqlens, slopes = torch.tensor([0, 600], dtype=torch.int32), torch.tensor([0.01])
    expected = attention_reference(qkv.float(), cu_seqlens, 600, 1.0, None, slopes)
    actual = attention_cpu(qkv, cu_seqlens, 600, 1.0, None, slopes)
    torch.testing.assert_close(actual.float(), expected, atol=4e-3, rtol=4e-3)
