"""Pooling over cu_seqlens and over padded rows, and the steps after it: Triton kernels against their references."""

import pytest
import torch
import torch.nn.functional as F
from support.devices import DEVICE, DTYPES, assert_matches, packed, pairwise

from unpadded_kernels.matryoshka import matryoshka, matryoshka_reference, matryoshka_triton
from unpadded_kernels.pooling import (
    masked_mean_pool,
    masked_mean_pool_reference,
    masked_mean_pool_triton,
    mean_pool,
    mean_pool_reference,
    mean_pool_triton,
)

pytestmark = pytest.mark.usefixtures("seed", "poison_empty")
RAGGED = [[1], [7], [1, 513, 64], [128, 129, 127, 256], [5, 0, 130], [0, 0, 3, 0], [2] * 40, [1100, 1]]


def inputs(lengths, hidden, dtype):
    return torch.randn(sum(lengths), hidden, device=DEVICE, dtype=dtype), packed(lengths)


@pytest.mark.parametrize("lengths, dtype", pairwise(RAGGED, DTYPES), ids=str)
def test_matches_the_reference(lengths, dtype):
    hidden, cu_seqlens = inputs(lengths, 192, dtype)
    hidden += 1  # so that a mean without some of the rows differs
    assert_matches(mean_pool_triton(hidden, cu_seqlens), mean_pool_reference(hidden.float(), cu_seqlens))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_text_does_not_depend_on_its_batch(dtype):
    lengths = [130, 1, 600, 77]
    hidden, cu_seqlens = inputs(lengths, 192, dtype)
    whole = mean_pool_triton(hidden, cu_seqlens)
    for text, (start, length) in enumerate(zip(cu_seqlens.tolist(), lengths, strict=False)):
        alone = mean_pool_triton(hidden[start : start + length], packed([length]))
        assert torch.equal(whole[text : text + 1], alone)


def test_no_tokens_and_no_texts():
    hidden, cu_seqlens = inputs([0, 0], 96, torch.float32)
    assert torch.equal(mean_pool_triton(hidden, cu_seqlens), torch.zeros(2, 96, device=DEVICE))
    assert mean_pool_triton(hidden, packed([])).shape == (0, 96)


def test_strided_tokens_are_read_in_place():
    hidden, cu_seqlens = inputs([5, 200], 96, torch.float32)
    wide = torch.randn(205, 300, device=DEVICE)
    wide[:, 8:104] = hidden
    assert_matches(mean_pool_triton(wide[:, 8:104], cu_seqlens), mean_pool_reference(hidden, cu_seqlens))


def test_tokens_past_two_to_the_31_elements(far_tokens):
    cu_seqlens = packed([1, 4])
    assert_matches(mean_pool_triton(far_tokens, cu_seqlens), mean_pool_reference(far_tokens.float(), cu_seqlens))


def test_invalid_arguments_raise():
    hidden, cu_seqlens = inputs([4, 92], 96, torch.float32)
    with pytest.raises(ValueError, match=r"hidden must be .* with contiguous rows"):
        mean_pool_triton(hidden.t(), cu_seqlens)


@pytest.mark.parametrize(
    "shape, normalize, layer_norm",
    pairwise([(768, 768), (768, 256), (100, 37), (96, 1)], [False, True], [False, True]),
)
def test_steps_after_pooling(shape, normalize, layer_norm):
    width, dimensions = shape
    pooled = torch.randn(5, width, device=DEVICE) * 1e-2
    pooled[3] = 0
    arguments = layer_norm, dimensions, normalize
    actual = matryoshka_triton(pooled, *arguments)
    assert_matches(actual, matryoshka_reference(pooled, *arguments))
    for row in range(5):
        assert torch.equal(matryoshka_triton(pooled[row : row + 1], *arguments)[0], actual[row])
    assert matryoshka_triton(pooled[:0], *arguments).shape == (0, dimensions)


def test_steps_after_pooling_reject_invalid_arguments():
    for dimensions in (0, 97):
        with pytest.raises(ValueError, match=f"between 1 and 96, got {dimensions}"):
            matryoshka_triton(torch.zeros(2, 96, device=DEVICE), False, dimensions, True)
    with pytest.raises(ValueError, match="pooled must be contiguous"):
        matryoshka_triton(torch.zeros(2, 96, device=DEVICE).t(), False, 2, True)


def padded(lengths, max_seqlen, width, dtype):
    hidden = torch.randn(len(lengths), max_seqlen, width, device=DEVICE, dtype=dtype) + 1
    mask = (torch.arange(max_seqlen, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]).long()
    return hidden, mask


def model_card(hidden, mask):
    """Compute mean_pooling and F.normalize as in the model card of nomic-embed-text."""
    expanded = mask.unsqueeze(-1).expand(hidden.size()).float()
    pooled = torch.sum(hidden * expanded, 1) / torch.clamp(expanded.sum(1), min=1e-9)
    return F.normalize(pooled, p=2, dim=1)


@pytest.mark.parametrize(
    "width, lengths, dtype", pairwise([192, 100], [([1], 1), ([7, 1, 300], 300), ([130, 0, 128], 131)], DTYPES), ids=str
)
def test_padded_matches_the_reference(width, lengths, dtype):
    hidden, mask = padded(*lengths, width, dtype)
    for normalize in (False, True):
        expected = masked_mean_pool_reference(hidden.float(), mask, normalize)
        assert_matches(masked_mean_pool_triton(hidden, mask, normalize), expected)


def test_padded_matches_the_model_card():
    hidden, mask = padded([7, 1, 150], 150, 96, torch.float32)
    assert_matches(masked_mean_pool_triton(hidden, mask, True), model_card(hidden, mask))
    assert_matches(masked_mean_pool(hidden, mask, True), model_card(hidden, mask))


def test_padded_accepts_any_mask():
    hidden, mask = padded([9, 140], 140, 96, torch.float32)
    mask = mask * torch.randint(2, mask.shape, device=DEVICE)  # with holes, as of left padding or special tokens
    expected = masked_mean_pool_reference(hidden, mask, False)
    for kind in (torch.bool, torch.int32, torch.float32):
        assert_matches(masked_mean_pool_triton(hidden, mask.to(kind), False), expected)


def test_padded_depends_neither_on_masked_tokens_nor_on_other_texts():
    hidden, mask = padded([40, 260], 260, 96, torch.float32)
    expected = masked_mean_pool_triton(hidden[:1, :40].contiguous(), mask[:1, :40], True)
    hidden[0, 40:] = float("nan")
    assert torch.equal(masked_mean_pool_triton(hidden, mask, True)[:1], expected)


def test_padded_strided_texts_and_tokens_are_read_in_place():
    hidden, mask = padded([40, 200], 200, 96, torch.float32)
    wide_hidden = torch.randn(2, 210, 100, device=DEVICE)
    wide_mask = torch.randint(2, (2, 210), device=DEVICE)
    wide_hidden[:, :200, 4:], wide_mask[:, :200] = hidden, mask
    actual = masked_mean_pool_triton(wide_hidden[:, :200, 4:], wide_mask[:, :200], False)
    assert_matches(actual, masked_mean_pool_reference(hidden, mask, False))


def test_padded_without_texts_or_tokens():
    hidden, mask = padded([0, 0], 0, 96, torch.float32)
    assert torch.equal(masked_mean_pool_triton(hidden, mask, True), torch.zeros(2, 96, device=DEVICE))
    assert masked_mean_pool_triton(hidden[:0], mask[:0], True).shape == (0, 96)


def test_padded_invalid_arguments_raise():
    hidden, mask = padded([4, 5], 5, 96, torch.float32)
    with pytest.raises(ValueError, match=r"mask must be \(2, 5\) with contiguous rows, got \(2, 4\)"):
        masked_mean_pool_triton(hidden, mask[:, :4], True)
    with pytest.raises(ValueError, match=r"hidden must be .* with contiguous rows"):
        masked_mean_pool_triton(hidden.transpose(1, 2), mask.new_ones(2, 96), True)


def test_op_contracts(monkeypatch):
    monkeypatch.undo()  # opcheck compares what torch.empty returns
    hidden, cu_seqlens = inputs([2, 3], 96, torch.float32)
    torch.library.opcheck(mean_pool, (hidden, cu_seqlens))
    torch.library.opcheck(matryoshka, (hidden, True, 64, True))
    torch.library.opcheck(matryoshka, (hidden, False, 96, False))
    torch.library.opcheck(masked_mean_pool, (*padded([2, 3], 3, 96, torch.float32), True))
