"""Embedding gather + LayerNorm: the Triton kernel against its reference."""

import pytest
import torch
from conftest import DEVICE, DTYPES, assert_matches

from unpadded_kernels.embedding import embedding, embedding_reference, embedding_triton

pytestmark = pytest.mark.usefixtures("seed", "poison_empty")
EPS = 1e-12
VOCABULARY, POSITIONS = 61, 40


def inputs(tokens, hidden, dtype, token_type=True, position=True):
    input_ids = torch.randint(VOCABULARY, (tokens,), device=DEVICE, dtype=torch.int32)
    positions = torch.randint(POSITIONS, (tokens,), device=DEVICE, dtype=torch.int32)
    word = torch.randn(VOCABULARY, hidden, device=DEVICE, dtype=dtype)
    table = torch.randn(POSITIONS, hidden, device=DEVICE, dtype=dtype)
    row, weight, bias = torch.randn(3, hidden, device=DEVICE, dtype=dtype)
    return input_ids, positions, word, row if token_type else None, table if position else None, weight, bias


def expected(input_ids, positions, *tensors):
    return embedding_reference(input_ids, positions, *(t if t is None else t.float() for t in tensors), EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("token_type, position", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("tokens, hidden", [(1, 384), (33, 768), (9, 100)])
def test_matches_the_reference(tokens, hidden, token_type, position, dtype):
    tensors = inputs(tokens, hidden, dtype, token_type, position)
    assert_matches(embedding_triton(*tensors, EPS), expected(*tensors))


def test_the_first_and_the_last_row_of_every_table():
    tensors = list(inputs(4, 96, torch.float32))
    tensors[0] = torch.tensor([0, VOCABULARY - 1, 0, VOCABULARY - 1], device=DEVICE, dtype=torch.int32)
    tensors[1] = torch.tensor([0, 0, POSITIONS - 1, POSITIONS - 1], device=DEVICE, dtype=torch.int32)
    assert_matches(embedding_triton(*tensors, EPS), expected(*tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(dtype):
    input_ids, positions, *tables = inputs(50, 384, dtype)
    whole = embedding_triton(input_ids, positions, *tables, EPS)
    assert torch.equal(whole[7:8], embedding_triton(input_ids[7:8], positions[7:8], *tables, EPS))


def test_eps_counts_where_the_variance_is_small():
    input_ids, positions, *tables = inputs(5, 96, torch.float32)
    tables = [*(table * 1e-4 for table in tables[:3]), *tables[3:]]
    for eps in (1e-5, 1e-12):
        arguments = input_ids, positions, *tables, eps
        assert_matches(embedding_triton(*arguments), embedding_reference(*arguments))


def test_no_tokens():
    assert embedding_triton(*inputs(0, 384, torch.float32), EPS).shape == (0, 384)


def test_strided_tables_are_read_in_place():
    tensors = list(inputs(9, 96, torch.float32))
    same = expected(*tensors)
    for at, rows in ((2, VOCABULARY), (4, POSITIONS)):
        wide = torch.randn(rows, 200, device=DEVICE)
        wide[:, 8:104] = tensors[at]
        tensors[at] = wide[:, 8:104]
    assert_matches(embedding_triton(*tensors, EPS), same)


def test_refuses_tables_that_are_not_contiguous():
    input_ids, positions, _, *rest = inputs(4, 96, torch.float32)
    word = torch.randn(96, VOCABULARY, device=DEVICE).t()
    with pytest.raises(ValueError, match=r"rows must be contiguous and 96 wide, got word of \(61, 96\)"):
        embedding_triton(input_ids, positions, word, *rest, EPS)


def test_refuses_strided_ids():
    input_ids, positions, *rest = inputs(8, 96, torch.float32)
    with pytest.raises(ValueError, match="input_ids and positions must be contiguous"):
        embedding_triton(input_ids[::2], positions[::2], *rest, EPS)


def test_op_contract(monkeypatch):
    monkeypatch.undo()  # opcheck compares what torch.empty returns
    torch.library.opcheck(embedding, (*inputs(5, 96, torch.float32), EPS))
    torch.library.opcheck(embedding, (*inputs(5, 96, torch.float32, False, False), EPS))
