"""Embedding gather + LayerNorm: the Triton kernel against its reference."""

import pytest
import torch
from support.devices import DEVICE, DTYPES, assert_matches, pairwise, with_dtypes

from unpadded_kernels.embedding import embedding, embedding_reference, embedding_triton

pytestmark = pytest.mark.usefixtures("seed", "poison_empty")
EPS = 1e-12
VOCABULARY, POSITIONS, TYPES = 61, 40, 3


def inputs(tokens, hidden, dtype, types="given", position=True):
    """types: token types "given", all "zero" by omission, or None for no table of types."""

    def rows(count):
        return torch.randn(count, hidden, device=DEVICE, dtype=dtype)

    def ids(limit):
        return torch.randint(limit, (tokens,), device=DEVICE, dtype=torch.int32)

    token_types, token_type = ids(TYPES) if types == "given" else None, rows(TYPES) if types else None
    tables = rows(VOCABULARY), token_type, rows(POSITIONS) if position else None
    return ids(VOCABULARY), ids(POSITIONS), token_types, *tables, *rows(2)


def expected(input_ids, positions, token_types, *tensors):
    tensors = (tensor if tensor is None else tensor.float() for tensor in tensors)
    return embedding_reference(input_ids, positions, token_types, *tensors, EPS)


@pytest.mark.parametrize(
    "shape, types, position, dtype",
    pairwise([(1, 384), (33, 768), (9, 100)], ["given", "zero", None], [True, False], DTYPES),
)
def test_matches_the_reference(shape, types, position, dtype):
    tensors = inputs(*shape, dtype, types, position)
    assert_matches(embedding_triton(*tensors, EPS), expected(*tensors))


def test_the_reference_is_the_published_formula():
    input_ids, positions, token_types, word, token_type, position, weight, bias = inputs(9, 96, torch.float32)
    for t in range(9):
        for types, row in ((token_types, token_type[token_types[t]]), (None, token_type[0])):
            x = (word[input_ids[t]] + row + position[positions[t]]).double()
            y = (x - x.mean()) / x.std(correction=0) * weight + bias
            actual = embedding_reference(input_ids, positions, types, word, token_type, position, weight, bias, EPS)
            assert_matches(actual[t], y)


def test_the_first_and_the_last_row_of_every_table():
    tensors = list(inputs(8, 96, torch.float32))
    for at, (limit, period) in enumerate([(VOCABULARY, 1), (POSITIONS, 2), (TYPES, 4)]):
        ends = [0] * period + [limit - 1] * period
        tensors[at] = torch.tensor(ends * (4 // period), device=DEVICE, dtype=torch.int32)
    assert_matches(embedding_triton(*tensors, EPS), expected(*tensors))


@pytest.mark.parametrize("op, dtype", with_dtypes([embedding_triton, embedding_reference]))
def test_types_of_zero_equal_no_types_bit_for_bit(op, dtype):
    input_ids, positions, token_types, *tables = inputs(20, 384, dtype)
    with_zeros = op(input_ids, positions, torch.zeros_like(token_types), *tables, EPS)
    assert torch.equal(with_zeros, op(input_ids, positions, None, *tables, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(dtype):
    *ids, word, token_type, position, weight, bias = inputs(50, 384, dtype)
    tables = word, token_type, position, weight, bias
    whole = embedding_triton(*ids, *tables, EPS)
    assert torch.equal(whole[7:8], embedding_triton(*(one[7:8] for one in ids), *tables, EPS))


def test_eps_is_used_when_the_variance_is_small():
    tensors = [value * 1e-4 if 3 <= at < 6 else value for at, value in enumerate(inputs(5, 96, torch.float32))]
    for eps in (1e-5, 1e-12):
        assert_matches(embedding_triton(*tensors, eps), embedding_reference(*tensors, eps))


def test_no_tokens():
    assert embedding_triton(*inputs(0, 384, torch.float32), EPS).shape == (0, 384)


def test_strided_tables_are_read_in_place():
    tensors = list(inputs(9, 96, torch.float32))
    same = expected(*tensors)
    for at, rows in ((3, VOCABULARY), (4, TYPES), (5, POSITIONS)):
        wide = torch.randn(rows, 200, device=DEVICE)
        wide[:, 8:104] = tensors[at]
        tensors[at] = wide[:, 8:104]
    assert_matches(embedding_triton(*tensors, EPS), same)


def test_strided_rows_of_a_table_raise():
    *ids, _, token_type, position, weight, bias = inputs(4, 96, torch.float32)
    word = torch.randn(96, VOCABULARY, device=DEVICE).t()
    with pytest.raises(ValueError, match=r"word must be \(61, 96\) with contiguous rows, got \(61, 96\), strides"):
        embedding_triton(*ids, word, token_type, position, weight, bias, EPS)


def test_strided_ids_and_ids_of_other_lengths_raise():
    *ids, word, token_type, position, weight, bias = inputs(8, 96, torch.float32)
    tables = word, token_type, position, weight, bias
    for at, name in enumerate(["input_ids", "positions", "token_types"]):
        strided = [one[::2] if at == i else one[:4].contiguous() for i, one in enumerate(ids)]
        with pytest.raises(ValueError, match=rf"{name} must be \(\d,\) with contiguous rows"):
            embedding_triton(*strided, *tables, EPS)
    with pytest.raises(ValueError, match=r"token_types must be \(8,\) with contiguous rows, got \(7,\)"):
        embedding_triton(*ids[:2], ids[2][:7], *tables, EPS)


def test_a_table_of_one_row_has_two_dimensions():
    *ids, word, token_type, position, weight, bias = inputs(4, 96, torch.float32)
    with pytest.raises(ValueError, match=r"token_type must be \(96, 96\) with contiguous rows, got \(96,\)"):
        embedding_triton(*ids, word, token_type[0], position, weight, bias, EPS)


def test_op_contract(monkeypatch):
    monkeypatch.undo()  # opcheck compares what torch.empty returns
    torch.library.opcheck(embedding, (*inputs(5, 96, torch.float32), EPS))
    torch.library.opcheck(embedding, (*inputs(5, 96, torch.float32, "zero"), EPS))
    torch.library.opcheck(embedding, (*inputs(5, 96, torch.float32, None, False), EPS))
