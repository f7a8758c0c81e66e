"""The engine as endpoints use it: model names, limits, and batches shared by all requests."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Unpack

import numpy as np

from unpadded import Embeddings, Engine
from unpadded.errors import OptionError
from unpadded.execution import cuda_graphs
from unpadded.execution.batcher import Limits, Rows, Work, run_windows
from unpadded.options import EncodeKeywords, Plan
from unpadded.server.errors import HTTPError
from unpadded.server.metrics import Metrics, Usage
from unpadded.server.options import ServerOptions
from unpadded.tokenization.truncation import CHARACTERS_PER_TOKEN
from unpadded.tokenization.windows import Text, Window

# Per text, and per /tokenize: tokenizing so many takes up to 2 s of a core and 0.3 GB (Chinese, BERT, Xeon, 2026-11).
MAX_CHARACTERS = 1 << 19
MAX_TOKEN_VECTORS = 32_768  # per /embed_all; with 768 dimensions, 96 MiB before they become JSON
MAX_RETRY_AFTER_SECONDS = 60


class Service:
    """One served model."""

    def __init__(self, engine: Engine, options: ServerOptions) -> None:
        self.engine = engine
        self.pipeline = engine._pipeline
        if options.default_task is not None:
            self.pipeline.plan(task=options.default_task)
        self.options = options
        self.metrics = Metrics()
        self.batcher = self.pipeline.batcher(self.metrics.observe_batch)
        self.metrics.watch(self.pipeline, self.batcher)
        self.model_name = engine.checkpoint.name
        self.model_names = tuple(dict.fromkeys([self.model_name, self.model_name.rpartition("/")[2], *options.alias]))
        self.created = int(time.time())
        self.description = engine.describe()
        self.device_type = re.split("[:,]", str(self.description["device"]))[0]

    @property
    def ready(self) -> bool:
        """Whether at least one device accepts batches."""
        return self.pipeline.backend.ready_devices > 0

    def warm_up(self) -> None:
        """Run a small and a full batch on every device; on GPUs, also one batch per CUDA graph to capture."""
        vocabulary, length = self.engine.checkpoint.spec.vocabulary, self.engine.checkpoint.max_length
        work = self.pipeline.work(self.pipeline.plan())
        for tokens, texts in self.warm_up_sizes():
            ids = np.arange(tokens, dtype=np.int32) % vocabulary
            sequences = np.array_split(ids, max(texts, -(-tokens // length)))
            # One call per device, submitted together so that each device runs one.
            calls = [self.batcher.submit(sequences, work) for _ in range(self.pipeline.backend.devices)]
            for call in calls:
                call.future.result()

    def warm_up_sizes(self) -> list[tuple[int, int]]:
        """Return the numbers of tokens and texts of the batches that `warm_up` runs."""
        token_budget = self.pipeline.token_budget
        if self.device_type != "cuda":
            return [(1, 1), (token_budget, 1)]
        return [
            (tokens, texts)
            for tokens in (2**power for power in range(token_budget.bit_length()))
            for texts in cuda_graphs.TEXT_BUCKETS
            if texts == 1 or texts <= tokens <= cuda_graphs.TOKEN_BUCKETS[-1]
        ]

    def task_of_model(self, name: str | None) -> str | None:
        """Return the task in a model's name, such as nomic-embed-text-v1.5:search_query; 404 for an unknown model."""
        if name is None or name in self.model_names:
            return None
        base, _, task = name.rpartition(":")
        prompts = self.engine.checkpoint.prompts
        if base in self.model_names and task in prompts:
            return task
        if base in self.model_names:
            raise HTTPError("invalid", f"the task is unknown: {task!r}; use one of {', '.join(prompts) or 'none'}")
        raise HTTPError("unknown_model", f"the model is not served: {name!r}; use {' or '.join(self.model_names)}")

    def estimate_queue_seconds(self) -> int:
        """Return the seconds in which the model processes the queued tokens, from 1 to MAX_RETRY_AFTER_SECONDS."""
        rate = self.batcher.tokens_per_second
        return max(1, min(MAX_RETRY_AFTER_SECONDS, math.ceil(self.batcher.queued_tokens / rate) if rate else 1))

    async def embed(
        self, texts: Sequence[Text], usage: Usage, *, truncate: bool | None = None, **options: Unpack[EncodeKeywords]
    ) -> Embeddings:
        """Embed texts in batches shared with all other requests. truncate: None follows --long-input."""
        plan = self._plan(texts, usage, options)
        windows = self._count_windows(self.pipeline.reader.windows(texts, plan), usage, truncate)
        return self.pipeline.collect(await self._run(texts, windows, self.pipeline.work(plan), usage), plan)

    async def embed_tokens(
        self, texts: Sequence[Text], usage: Usage, *, truncate: bool | None = None, **options: Unpack[EncodeKeywords]
    ) -> list[np.ndarray]:
        """Return the last hidden states of each text: [tokens, hidden]."""
        plan = self._plan(texts, usage, options)
        windows = self._count_windows(
            self.pipeline.reader.windows(texts, plan), usage, truncate, max_tokens=MAX_TOKEN_VECTORS
        )
        results = await self._run(texts, windows, self.pipeline.work(plan, pooled=False), usage)
        return [rows[i] for window, rows in results for i in window.first_sequences]

    def _plan(self, texts: Sequence[Text], usage: Usage, options: EncodeKeywords) -> Plan:
        """Check the number and sizes of the texts, count them, and return the plan of their embedding."""
        self.check_inputs(texts)
        usage.texts += len(texts)
        usage.characters += sum(len(text) for text in texts if isinstance(text, str))
        if options.get("task") is None and "prompt" not in options:
            options["task"] = self.options.default_task
        return self.pipeline.plan(**options)

    async def _run(
        self, texts: Sequence[Text], windows: Iterator[Window], work: Work, usage: Usage
    ) -> list[tuple[Window, Rows]]:
        """Run windows in batches shared with all requests; OverloadedError if they would not be done in time."""
        deadline = time.perf_counter() + self.options.deadline if self.options.deadline else math.inf
        limits, max_length = Limits(self.options.max_queued_tokens, deadline), self.engine.checkpoint.max_length
        # Rejects most of what is too much before it is tokenized.
        estimate = sum(
            min(len(text) // CHARACTERS_PER_TOKEN, max_length) if isinstance(text, str) else len(text) for text in texts
        )
        self.batcher.check(estimate, limits)
        size = sum(map(len, texts))
        return await run_windows(self.batcher, windows, work, size=size, limits=limits, timing=usage.timing)

    def check_inputs(self, texts: Sequence[Text]) -> None:
        """Raise HTTPError for no texts, or for more texts or characters than a request may have."""
        if not texts:
            raise HTTPError("invalid", "the input is empty: []; send at least one text")
        if len(texts) > self.options.max_inputs:
            raise HTTPError(
                "too_many_inputs",
                f"the input has too many texts: {len(texts)}, maximum {self.options.max_inputs}; send fewer",
            )
        check_characters([len(text) for text in texts if isinstance(text, str)])

    def _count_windows(
        self, windows: Iterator[Window], usage: Usage, truncate: bool | None, max_tokens: int | None = None
    ) -> Iterator[Window]:
        """Yield the same windows; count their tokens and check the limits as they are tokenized."""
        if truncate is None:
            truncate = self.options.long_input == "truncate"
        for window in windows:
            truncated = np.flatnonzero(window.truncated)
            if len(truncated) and not truncate:
                raise HTTPError(
                    "too_long",
                    f"text {window.first_index + truncated[0]} is too long: more than "
                    f"{self.engine.checkpoint.max_length} tokens; shorten it or request truncation",
                )
            usage.truncated += len(truncated)
            usage.tokens += int(window.token_counts.sum())
            if max_tokens is not None and usage.tokens > max_tokens:
                raise HTTPError(
                    "too_many_inputs",
                    f"the response would have too many token vectors: {usage.tokens}, maximum {max_tokens}; "
                    "send fewer texts",
                )
            yield window


def check_characters(counts: Iterable[int]) -> None:
    """Raise HTTPError if a text has too many characters."""
    if (most := max(counts, default=0)) > MAX_CHARACTERS:
        raise HTTPError("too_long", f"a text is too long: {most} characters, maximum {MAX_CHARACTERS}; split it")


def to_texts(value: str | list[Any]) -> list[Text]:
    """Convert a request's input (a string, strings, one sequence of token ids, or several) to a list of texts."""
    if isinstance(value, str):
        return [value]
    if value and all(isinstance(item, int) for item in value):
        return [value]
    index = next((index for index, item in enumerate(value) if isinstance(item, int)), None)
    if index is not None:
        raise OptionError(
            f"the input mixes token ids with texts: {value[index]} at {index}; put each text's ids in a list"
        )
    return value
