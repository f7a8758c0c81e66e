"""Form batches under a token budget, for one caller or for several that wait. Integers only.

Each batch starts with the longest text and is filled with the longest text that still fits: this leaves few free
tokens, and texts of equal length are adjacent, which attention on a CPU groups by. The budget bounds memory.
"""

import sys
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Generic, TypeVar

MAX_MISSES = 16  # callers without a text that fits, after which a batch is not filled further


class Backlog:
    """The texts of one caller that wait. `tokens` is their total length."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.tokens = sum(lengths)
        self.rank = (0, 0)  # tokens and number in a CallerQueue, which sets it
        self.waiting = sorted((length, -index) for index, length in enumerate(lengths))  # of equal ones, the first last

    def take_longest(self, max_length: int = sys.maxsize) -> tuple[int, int] | None:
        """Remove the longest text of at most `max_length` tokens; return its index and length, or None."""
        fitting = bisect_right(self.waiting, (max_length, 0))
        if not fitting:
            return None
        length, index = self.waiting.pop(fitting - 1)
        self.tokens -= length
        return -index, length


Caller = TypeVar("Caller", bound=Backlog)


class CallerQueue(Generic[Caller]):
    """The callers that wait, by age and by the number of tokens that they have left."""

    def __init__(self) -> None:
        self._by_age: dict[int, Caller] = {}  # by number
        self._ranks: list[tuple[int, int]] = []  # (tokens, number), sorted

    def __contains__(self, caller: Caller) -> bool:
        return caller.rank[1] in self._by_age

    def __len__(self) -> int:
        return len(self._by_age)

    def add(self, caller: Caller, number: int) -> None:
        """Add a caller; number: that of the last one plus at least 1."""
        self._by_age[number] = caller
        caller.rank = (caller.tokens, number)
        insort(self._ranks, caller.rank)

    def update(self, caller: Caller, *, dropped: bool = False) -> None:
        """Move a caller to its new place after some of its texts were taken; remove it if none is left or `dropped`."""
        del self._ranks[bisect_left(self._ranks, caller.rank)]
        if caller.waiting and not dropped:
            self.add(caller, caller.rank[1])
        else:
            del self._by_age[caller.rank[1]]

    def oldest(self) -> Iterator[Caller]:
        return iter(self._by_age.values())

    def shortest(self) -> Iterator[Caller]:
        return (self._by_age[number] for _, number in self._ranks)

    def count_up_to(self, tokens: int) -> int:
        """Return the number of callers with at most this many tokens left."""
        return bisect_right(self._ranks, (tokens, sys.maxsize))


def schedule(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Return batches of indices into lengths; a batch holds at most token_budget tokens, or one longer text."""
    backlog = Backlog(lengths)
    batches = []
    while backlog.waiting:
        batches.append([index for _, index in next_batch(backlog, (), (backlog,), token_budget)])
    return batches


def is_short(tokens: int, token_budget: int) -> bool:
    """Return whether a caller with this many tokens left may overtake older ones."""
    return 4 * tokens <= token_budget


def next_batch(
    first: Caller, shortest: Iterable[Caller], oldest: Iterable[Caller], token_budget: int
) -> list[tuple[Caller, int]]:
    """Return (caller, index) for each text of the next batch: at most token_budget tokens, or one longer text.

    shortest: the callers, those with the fewest tokens first. oldest: the same, in the order of their arrival.
    The batch starts with the longest text of `first`. Up to half of it goes to the short callers (`is_short`), so that
    a query is in the next batch however many texts others have queued. The oldest callers fill it up, so that callers
    with equal work finish one after another instead of all at the end.
    """
    longest = first.take_longest()
    assert longest is not None, "the first caller has no text"
    batch, free = [(first, longest[0])], token_budget - longest[1]
    short = takewhile(lambda caller: is_short(caller.tokens, token_budget), shortest)
    for callers, limit in ((short, token_budget // 2), (oldest, token_budget)):
        limit, misses = min(limit, free), 0
        for caller in callers:
            if limit <= 0 or misses > MAX_MISSES:
                break
            fitting = caller.take_longest(limit)
            misses += fitting is None
            while fitting is not None:
                batch.append((caller, fitting[0]))
                limit, free = limit - fitting[1], free - fitting[1]
                fitting = caller.take_longest(limit)
    return batch
