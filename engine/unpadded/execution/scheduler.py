"""Lengths -> batches under a token budget. Integers only.

Longest first, and each batch is filled with the longest text that still fits: long texts leave no holes, and texts of
equal length lie side by side, which is what attention on a CPU groups by. Memory follows the budget, not the lengths.
"""

from bisect import bisect_right
from collections.abc import Sequence


def schedule(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Batches of indices into lengths, every index once; a batch holds at most token_budget tokens, or one text."""
    by_length: dict[int, list[int]] = {}
    for index in range(len(lengths) - 1, -1, -1):
        by_length.setdefault(lengths[index], []).append(index)
    waiting = sorted(by_length)
    batches = []
    while waiting:
        batch: list[int] = []
        room = max(token_budget, waiting[-1])
        while fitting := bisect_right(waiting, room):
            length = waiting[fitting - 1]
            batch.append(by_length[length].pop())
            room -= length
            if not by_length[length]:
                del waiting[fitting - 1]
        batches.append(batch)
    return batches
