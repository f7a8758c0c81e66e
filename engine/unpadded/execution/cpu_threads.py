"""Threads that compute the parts of a batch on a CPU, each on one core.

Cores that share every operation wait for each other at its end, above all on a busy machine (bench/NOTES.md). On many
cores the threads would wait for Python's global lock instead, so each part must have more tokens.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch

# A batch whose largest part has more than this many times the mean number of tokens is computed by all cores together.
BALANCED = 1.25
# Tokens per part and core from which parts are faster (MiniLM, EPYC, 2 cores, 2026-11: equal at 256 tokens in all).
MIN_TOKENS = 64
MAX_CORES = 7  # torch's attention has other bits with 8 threads than with 1 to 7 (fp32, Xeon, 2026-11)
Result = TypeVar("Result")


class CpuThreads:
    """One thread per core that torch may use. Only one thread at a time may call `map`."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._owner = (0, 0)  # the process and the number of threads of the pool

    def map(self, run: Callable[[range], Result], lengths: Sequence[int]) -> list[Result]:
        """Return run(part) for consecutive parts of texts of these lengths, after all of them have ended.

        Raises the first error of a part.
        """
        cores = torch.get_num_threads()
        parts = split(lengths, cores if cores <= MAX_CORES else 1)
        if len(parts) == 1:
            return [run(parts[0])]
        if self._pool is None or self._owner != (os.getpid(), cores):
            self._pool = ThreadPoolExecutor(cores, "unpadded-cpu", _use_one_core, (cores,))
            self._owner = (os.getpid(), cores)
            ready = threading.Barrier(cores)  # of all threads, whose starts change the number of threads for a moment
            wait([self._pool.submit(ready.wait) for _ in range(cores)])
        started = [self._pool.submit(run, part) for part in parts]
        wait(started)
        return [future.result() for future in started]


def split(lengths: Sequence[int], cores: int) -> list[range]:
    """Return up to one range of texts per core with about equal numbers of tokens, or one if that is not faster."""
    ends = np.cumsum(lengths)
    shares = ends[-1] * np.arange(1, cores) / cores
    cuts = [0, *np.searchsorted(ends - np.array(lengths) / 2, shares).tolist(), len(lengths)]
    parts = [range(start, end) for start, end in pairwise(cuts) if start < end]
    largest = max(sum(lengths[part.start : part.stop]) for part in parts)
    faster = ends[-1] >= MIN_TOKENS * cores**2 and cores * largest <= BALANCED * ends[-1]
    return parts if faster else [range(len(lengths))]


def _use_one_core(cores: int) -> None:
    """Let torch use one core in this thread, and as many as before, `cores`, in threads that start later."""
    torch.get_num_threads()  # otherwise the first operation in this thread gives it the number of later threads
    torch.set_num_threads(1)
    ThreadPoolExecutor(1).submit(torch.set_num_threads, cores).result()
