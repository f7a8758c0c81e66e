"""The engine as endpoints use it: its names, its limits, and batches shared over all requests."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import numpy as np

from unpadded import Embeddings, Engine
from unpadded.errors import OptionError
from unpadded.execution import cuda_graphs
from unpadded.execution.batcher import Timing, run_windows
from unpadded.options import EncodeKeywords
from unpadded.server.errors import Problem
from unpadded.server.metrics import Metrics
from unpadded.server.options import ServerOptions
from unpadded.tokenization.windows import Text, Window

# Token vectors of one /embed_all, which are as many floats as dimensions each: 32768 x 768 is 96 MiB before JSON.
MAX_TOKEN_VECTORS = 32_768
LONGEST_WAIT = 60  # seconds that Retry-After may say


@dataclass
class Usage:
    """What one exchange came to; filled by Service as it goes, read for headers, metrics and the log."""

    texts: int = 0
    characters: int = 0
    tokens: int = 0
    truncated: int = 0
    timing: Timing = field(default_factory=Timing)


class Service:
    """One model that is served."""

    def __init__(self, engine: Engine, options: ServerOptions) -> None:
        if options.default_task is not None:
            engine._pipeline.plan(task=options.default_task)
        self.engine = engine
        self.pipeline = engine._pipeline
        self.options = options
        self.metrics = Metrics()
        self.batcher = engine._pipeline.batcher(self.metrics.observe_batch)
        self.metrics.watch(self.pipeline, self.batcher)
        self.name = engine.checkpoint.name
        self.names = tuple(dict.fromkeys([self.name, self.name.rpartition("/")[2], *options.alias]))
        self.created = int(time.time())
        self.described = engine.describe()
        self.device = re.split("[:,]", str(self.described["device"]))[0]

    def warm_up(self) -> None:
        """Run a small and a full batch on every device; on GPUs also sizes between, each of which they prepare."""
        vocabulary, length = self.engine.checkpoint.spec.vocabulary, self.engine.checkpoint.max_length
        work = self.pipeline.vector_work(self.pipeline.plan())
        for tokens, texts in self._sizes():
            ids = np.arange(tokens, dtype=np.int32) % vocabulary
            sequences = np.array_split(ids, max(texts, -(-tokens // length)))
            # side by side, so that each device has one
            calls = [self.batcher.submit(sequences, work) for _ in range(self.pipeline.backend.parallelism)]
            for call in calls:
                call.future.result()

    def _sizes(self) -> Iterator[tuple[int, int]]:
        """Tokens and texts of the batches of `warm_up`."""
        budget = self.pipeline.token_budget
        if self.device != "cuda":
            yield from ((1, 1), (budget, 1))
            return
        for tokens in (2**power for power in range(budget.bit_length())):
            yield from (
                (tokens, texts)
                for texts in cuda_graphs.TEXTS
                if texts == 1 or texts <= tokens <= cuda_graphs.TOKENS[-1]
            )

    def resolve(self, name: str | None) -> str | None:
        """The task that a model's name asks for, as in nomic-embed-text-v1.5:search_query. 404 for another model."""
        if name is None or name in self.names:
            return None
        base, _, task = name.rpartition(":")
        if base in self.names and task in self.engine.checkpoint.prompts:
            return task
        raise Problem("unknown_model", f"the model is not served here: {name!r}; use {' or '.join(self.names)}")

    def retry_after(self) -> int:
        """Seconds in which the model can have done what is queued."""
        rate = self.metrics.tokens_per_second
        return max(1, min(LONGEST_WAIT, math.ceil(self.batcher.queued_tokens / rate) if rate else 1))

    async def embed(
        self, texts: Sequence[Text], usage: Usage, *, refuse_long: bool | None = None, **options: Unpack[EncodeKeywords]
    ) -> Embeddings:
        """Embed in batches shared with every other request."""
        self._count(texts, usage)
        if options.get("task") is None and "prompt" not in options:
            options["task"] = self.options.default_task
        plan = self.pipeline.plan(**options)
        windows = self._windows(self.pipeline.windows(texts, plan), usage, self._refuses(refuse_long))
        done = await run_windows(
            self.batcher,
            windows,
            self.pipeline.vector_work(plan),
            max_queued_tokens=self.options.max_queued_tokens,
            timing=usage.timing,
        )
        return self.pipeline.collect(done, plan)

    async def embed_tokens(
        self, texts: Sequence[Text], usage: Usage, *, refuse_long: bool | None = None, **options: Unpack[EncodeKeywords]
    ) -> list[np.ndarray]:
        """The last hidden states of each text: [tokens, hidden]."""
        self._count(texts, usage)
        plan = self.pipeline.plan(**options)
        windows = self._windows(
            self.pipeline.windows(texts, plan), usage, self._refuses(refuse_long), max_tokens=MAX_TOKEN_VECTORS
        )
        done = await run_windows(
            self.batcher,
            windows,
            self.pipeline.token_work(plan),
            max_queued_tokens=self.options.max_queued_tokens,
            timing=usage.timing,
        )
        return [row for _, rows in done for row in rows]

    def _refuses(self, asked: bool | None) -> bool:
        return self.options.long_input == "refuse" if asked is None else asked

    def _count(self, texts: Sequence[Text], usage: Usage) -> None:
        if not texts:
            raise Problem("invalid", "the input is empty: []; send at least one text")
        if len(texts) > self.options.max_inputs:
            raise Problem(
                "too_many_inputs",
                f"the input holds too many texts: {len(texts)}, at most {self.options.max_inputs}; send fewer",
            )
        usage.texts += len(texts)
        usage.characters += sum(len(text) for text in texts if isinstance(text, str))

    def _windows(
        self, windows: Iterator[Window], usage: Usage, refuse_long: bool, max_tokens: int | None = None
    ) -> Iterator[Window]:
        """Judge and count windows as they are tokenized."""
        for window in windows:
            truncated = np.flatnonzero(window.truncated)
            if refuse_long and len(truncated):
                raise Problem(
                    "too_long",
                    f"text {window.first_index + truncated[0]} is too long: more than "
                    f"{self.engine.checkpoint.max_length} tokens; shorten it or ask for truncation",
                )
            usage.truncated += len(truncated)
            usage.tokens += sum(map(len, window.sequences))
            if max_tokens is not None and usage.tokens > max_tokens:
                raise Problem(
                    "too_many_inputs",
                    f"the answer would hold too many token vectors: {usage.tokens}, at most {max_tokens} are given; "
                    "send fewer texts",
                )
            yield window


def as_texts(given: str | list[Any]) -> list[Text]:
    """A string, strings, one sequence of token ids or several -> texts."""
    if isinstance(given, str):
        return [given]
    if given and all(isinstance(item, int) for item in given):
        return [given]
    wrong = next((index for index, item in enumerate(given) if isinstance(item, int)), None)
    if wrong is not None:
        raise OptionError(
            f"the input mixes token ids with texts: {given[wrong]} at {wrong}; put each text's ids in a list"
        )
    return given
