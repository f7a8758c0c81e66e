"""The maximum logit of every vocabulary entry per text: the Triton kernel and the CPU body against the reference."""

import pytest
import torch
from support.devices import DEVICE, DTYPES, assert_matches, packed, pairwise

from unpadded_kernels import avx512, vocabulary_max
from unpadded_kernels.vocabulary_max import CPU_BLOCK, vocabulary_max_reference, vocabulary_max_triton

pytestmark = pytest.mark.usefixtures("seed", "poison_empty")
RAGGED = [[1], [7, 0, 64], [65, 1], [0, 130, 3], [2] * 9, [0, 0]]


def inputs(lengths, hidden, vocabulary, dtype, device=DEVICE):
    """Return arguments with which about half of the maxima of a text of few tokens are below zero."""
    x = torch.randn(sum(lengths), hidden, device=device).to(dtype)
    weight = (torch.randn(vocabulary, hidden, device=device) * hidden**-0.5).to(dtype)
    return x, weight, torch.randn(vocabulary, device=device) - 1, packed(lengths).to(device)


def expected(x, weight, bias, cu_seqlens):
    return vocabulary_max_reference(x.float(), weight.float(), bias, cu_seqlens)


def test_the_reference_is_the_formula_of_splade():
    x, weight, bias, cu_seqlens = inputs([3, 5], 16, 40, torch.float32)
    logits = x @ weight.T + bias
    weights = torch.stack([logits[:3].relu().log1p().amax(0), logits[3:].relu().log1p().amax(0)])
    assert_matches(vocabulary_max_reference(x, weight, bias, cu_seqlens).log1p(), weights)
    assert 0 < (weights == 0).sum() < weights.numel()


@pytest.mark.parametrize("lengths, dtype, hidden, vocabulary", pairwise(RAGGED, DTYPES, [96, 40], [130, 600]), ids=str)
def test_matches_the_reference(lengths, dtype, hidden, vocabulary):
    arguments = inputs(lengths, hidden, vocabulary, dtype)
    assert_matches(vocabulary_max_triton(*arguments), expected(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_text_does_not_depend_on_its_batch(dtype):
    lengths = [70, 1, 130, 20]
    x, weight, bias, cu_seqlens = inputs(lengths, 40, 130, dtype)
    whole = vocabulary_max_triton(x, weight, bias, cu_seqlens)
    for text, rows in enumerate(x.split(lengths)):
        alone = vocabulary_max_triton(rows, weight, bias, packed([len(rows)]))
        assert torch.equal(whole[text : text + 1], alone)


def test_no_texts():
    x, weight, bias, cu_seqlens = inputs([], 40, 130, torch.float32)
    assert vocabulary_max_triton(x, weight, bias, cu_seqlens).shape == (0, 130)


def test_strided_rows_are_read_in_place():
    x, weight, bias, cu_seqlens = inputs([5, 20], 40, 130, torch.float32)
    wide_x, wide_weight = torch.randn(25, 100, device=DEVICE), torch.randn(130, 100, device=DEVICE)
    wide_x[:, 8:48], wide_weight[:, 4:44] = x, weight
    found = vocabulary_max_triton(wide_x[:, 8:48], wide_weight[:, 4:44], bias, cu_seqlens)
    assert_matches(found, expected(x, weight, bias, cu_seqlens))


def test_tokens_past_two_to_the_31_elements(far_tokens):
    weight = torch.randn(130, far_tokens.shape[1], device=DEVICE).to(far_tokens.dtype)
    arguments = far_tokens, weight, torch.zeros(130, device=DEVICE), packed([1, 4])
    assert_matches(vocabulary_max_triton(*arguments), expected(*arguments))


@pytest.mark.parametrize("op", [vocabulary_max_triton, vocabulary_max, vocabulary_max_reference])
def test_a_text_with_nan_is_not_finite_and_others_are(op):
    x, weight, bias, cu_seqlens = inputs([4, 90, 4], 40, 130, torch.float32)
    x[50, 3] = float("nan")
    y = op(x, weight, bias, cu_seqlens)
    assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


def test_invalid_arguments_raise():
    x, weight, bias, cu_seqlens = inputs([4, 36], 40, 40, torch.float32)
    for arguments, name in (
        ((x.t(), weight, bias, cu_seqlens), "x"),
        ((x, weight.t(), bias, cu_seqlens), "weight"),
        ((x, weight[:, :20], bias, cu_seqlens), "weight"),
        ((x, weight, bias[:20], cu_seqlens), "bias"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} must be .* with contiguous rows"):
            vocabulary_max_triton(*arguments)


@pytest.fixture(params=["avx512", "onednn"])
def cpu(request, monkeypatch):
    """Run the kernel for AVX-512 if the processor has it, and the body for other processors."""
    if request.param == "onednn":
        monkeypatch.setattr(avx512, "supports", lambda dtype: False)


LONG = [CPU_BLOCK + 300, 0, 3, CPU_BLOCK - 100, 40]


@pytest.mark.parametrize("lengths", [LONG, [CPU_BLOCK, 1], [3], []], ids=str)
def test_the_cpu_body_matches_the_reference(lengths, cpu):
    arguments = inputs(lengths, 24, CPU_BLOCK + 200, torch.float32, device="cpu")
    assert_matches(vocabulary_max(*arguments), vocabulary_max_reference(*arguments))


def test_the_cpu_body_in_bf16(cpu):
    arguments = inputs(LONG, 24, 300, torch.bfloat16, device="cpu")
    y = vocabulary_max(*arguments)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected(*arguments), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_text_does_not_depend_on_its_batch_on_a_cpu(dtype, cpu):
    x, weight, bias, cu_seqlens = inputs(LONG, 72, 300, dtype, device="cpu")
    whole = vocabulary_max(x, weight, bias, cu_seqlens)
    for text, rows in enumerate(x.split(LONG)):
        alone = vocabulary_max(rows, weight, bias, torch.tensor([0, len(rows)], dtype=torch.int32))
        assert torch.equal(whole[text : text + 1], alone)
