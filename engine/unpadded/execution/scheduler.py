"""Form batches under a token budget, for one caller or for several that wait. Integers only.

Each batch starts with the longest text and is filled with the longest text that still fits: this leaves few free
tokens, and texts of equal length are adjacent, which attention on a CPU groups by. The budget bounds memory.
"""

from bisect import bisect_right
from collections.abc import Sequence


class Backlog:
    """The texts of one caller that wait, as indices grouped by length."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.tokens = sum(lengths)
        self._by_length: dict[int, list[int]] = {}
        for index in range(len(lengths) - 1, -1, -1):
            self._by_length.setdefault(lengths[index], []).append(index)
        self._lengths = sorted(self._by_length)

    def take_longest(self, max_length: int | None = None) -> tuple[int, int] | None:
        """Remove the longest text of at most `max_length` tokens; return its index and length, or None."""
        fitting = len(self._lengths) if max_length is None else bisect_right(self._lengths, max_length)
        if not fitting:
            return None
        length = self._lengths[fitting - 1]
        index = self._by_length[length].pop()
        if not self._by_length[length]:
            del self._by_length[length], self._lengths[fitting - 1]
        self.tokens -= length
        return index, length


def schedule(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Return batches of indices into lengths; a batch holds at most token_budget tokens, or one longer text."""
    backlog = Backlog(lengths)
    batches = []
    while longest := backlog.take_longest():
        index, length = longest
        batch, free = [index], max(token_budget - length, 0)
        while fitting := backlog.take_longest(free):
            batch.append(fitting[0])
            free -= fitting[1]
        batches.append(batch)
    return batches


def next_batch(backlogs: Sequence[Backlog], token_budget: int) -> list[list[int]]:
    """Return the indices that each caller runs in the next batch: at most token_budget tokens, or one longer text.

    The batch is shared in rounds of one quantum of tokens per caller, so that a single query is in the next batch
    however many texts the other callers have queued. The first caller always gets its longest text; a caller that gets
    nothing must come first the next time.
    """
    taken: list[list[int]] = [[] for _ in backlogs]
    first = backlogs[0].take_longest()
    if first is None:
        return taken
    taken[0].append(first[0])
    free = token_budget - first[1]
    quantum = max(1, token_budget // len(backlogs))
    spent = first[1]  # by the first caller in the first round
    served = True
    while served and free > 0:
        served = False
        for backlog, indices in zip(backlogs, taken, strict=True):
            while spent < quantum:
                # A text longer than the quantum is taken only if the caller has taken none in this round.
                found = backlog.take_longest(min(quantum - spent, free)) or (
                    backlog.take_longest(free) if spent == 0 else None
                )
                if found is None:
                    break
                indices.append(found[0])
                free -= found[1]
                spent += found[1]
                served = True
            spent = 0
    return taken
