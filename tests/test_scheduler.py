"""Every index is scheduled once, within the budget, and no waiting text would fit into a batch."""

import random
from pathlib import Path

import pytest

from unpadded.execution.scheduler import schedule


@pytest.mark.parametrize("seed", range(20))
def test_every_text_is_scheduled_once_within_the_budget(seed):
    draw = random.Random(seed)
    lengths = [draw.choice([1, 5, 40, draw.randint(1, 8192)]) for _ in range(draw.randint(1, 300))]
    budget = draw.choice([1, 100, 4096, 100_000])
    batches = schedule(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    waiting = sorted(lengths)
    for batch in batches:
        tokens = [lengths[index] for index in batch]
        assert sum(tokens) <= budget or len(tokens) == 1
        assert tokens == sorted(tokens, reverse=True)
        for length in tokens:
            waiting.remove(length)
        assert not waiting or len(tokens) == 1 < budget < tokens[0] or sum(tokens) + waiting[0] > budget


@pytest.mark.parametrize(
    ("budget", "filled", "partly"), [(2048, 0.99, 50), (8192, 0.995, 1), (16384, 0.998, 1), (32768, 0.99, 1)]
)
def test_batches_of_real_lengths_are_full(budget, filled, partly):
    """Lengths of one window of documents. A text longer than the budget counts as a full batch."""
    words = (Path(__file__).parents[1] / "bench" / "lengths.txt").read_text().split()
    lengths = [min(int(word), 8192) for word in words]
    tokens = [sum(lengths[index] for index in batch) for batch in schedule(lengths, budget)]
    assert sum(tokens) / sum(max(budget, count) for count in tokens) > filled
    assert sum(count < 0.9 * budget for count in tokens) <= partly


def test_short_texts_fill_the_batches_of_long_ones():
    assert schedule([10, 90, 60, 40, 5], 100) == [[1, 0], [2, 3], [4]]


def test_equal_lengths_keep_the_callers_order():
    assert schedule([7, 7, 7, 7], 14) == [[0, 1], [2, 3]]


def test_no_texts_make_no_batches():
    assert schedule([], 100) == []
