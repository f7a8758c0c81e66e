"""Whose texts run next when several callers wait. Integers only.

A batch goes to the callers in rounds: each takes a quantum of tokens a round, so a caller of one query is in the next
batch however many texts the others have queued. Within a caller the longest text that fits goes first, as `schedule`
has it.
"""

from bisect import bisect_right
from collections.abc import Sequence


class Backlog:
    """The texts of one caller that wait, as indices by length."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.tokens = sum(lengths)
        self._by_length: dict[int, list[int]] = {}
        for index in range(len(lengths) - 1, -1, -1):
            self._by_length.setdefault(lengths[index], []).append(index)
        self._lengths = sorted(self._by_length)

    def take_longest(self, room: int | None = None) -> tuple[int, int] | None:
        """Index and length of the longest text of at most `room` tokens, or of any length."""
        fitting = len(self._lengths) if room is None else bisect_right(self._lengths, room)
        if not fitting:
            return None
        length = self._lengths[fitting - 1]
        index = self._by_length[length].pop()
        if not self._by_length[length]:
            del self._by_length[length], self._lengths[fitting - 1]
        self.tokens -= length
        return index, length


def next_batch(backlogs: Sequence[Backlog], token_budget: int) -> list[list[int]]:
    """What each caller may run now: at most token_budget tokens together, or one text of the first caller.

    The first caller always gets its longest text, so whoever goes without must come first the next time.
    """
    taken: list[list[int]] = [[] for _ in backlogs]
    first = backlogs[0].take_longest()
    if first is None:
        return taken
    taken[0].append(first[0])
    room = token_budget - first[1]
    quantum = max(1, token_budget // len(backlogs))
    spent = first[1]  # by the first caller in the first round
    served = True
    while served and room > 0:
        served = False
        for backlog, indices in zip(backlogs, taken, strict=True):
            while spent < quantum:
                # Past its quantum a caller takes one text only, and only where it has taken none in this round.
                found = backlog.take_longest(min(quantum - spent, room)) or (
                    backlog.take_longest(room) if spent == 0 else None
                )
                if found is None:
                    break
                indices.append(found[0])
                room -= found[1]
                spent += found[1]
                served = True
            spent = 0
    return taken
