"""The engine as endpoints use it: model names, limits, and batches shared by all requests."""

import math
import re
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, Unpack

import numpy as np
import torch

from unpadded import Embeddings, Engine
from unpadded.errors import OptionError
from unpadded.execution import cuda_graphs
from unpadded.execution.batcher import Limits, Rows, run_windows
from unpadded.execution.results import Ranked, ranked
from unpadded.execution.runner import Runner
from unpadded.options import EncodeKeywords, Plan, ScoreActivation
from unpadded.server.errors import HTTPError, check_maximum
from unpadded.server.metrics import Metrics, Usage
from unpadded.server.options import ServerOptions
from unpadded.tokenization.tokenizer import Pair
from unpadded.tokenization.truncation import CHARACTERS_PER_TOKEN
from unpadded.tokenization.windows import Text, Window

# Per text, and per /tokenize: tokenizing so many takes up to 2 s of a core and 0.3 GB (Chinese, BERT, Xeon, 2026-11).
MAX_CHARACTERS = 1 << 19
MAX_TOKEN_VECTORS = 32_768  # per request; with 768 dimensions, 96 MiB before they become JSON
# Clients of OpenAI's own models may send token ids of OpenAI's tokenizer.
OPENAI_MODEL_PREFIX = "text-embedding-"
MAX_RETRY_AFTER_SECONDS = 60


class Service:
    """One served model."""

    def __init__(self, engine: Engine, options: ServerOptions) -> None:
        self.engine = engine
        self.pipeline = engine._pipeline
        self.backend = self.pipeline.backend
        if options.default_task is not None:
            self.pipeline.plan(task=options.default_task)
        self.options = options
        self.metrics = Metrics()
        self.batcher = self.pipeline.batcher(self.metrics.observe_batch)
        self.model_name = engine.checkpoint.name
        self.model_names = tuple(dict.fromkeys([self.model_name, self.model_name.rpartition("/")[2], *options.alias]))
        self.created = int(time.time())
        self.description = engine.describe()
        self.device_type = re.split("[:,]", str(self.description["device"]))[0]
        backend, batcher, watch = self.backend, self.batcher, self.metrics.watch
        watch("devices", "devices that accept batches", lambda: backend.ready_devices)
        watch("queued_requests", "requests waiting for a batch", lambda: batcher.queued_calls)
        watch("queued_tokens", "tokens waiting for a batch", lambda: batcher.queued_tokens)
        if isinstance(backend, Runner) and backend.device.type == "cuda":  # worker processes hold their own memory
            memory = partial(torch.cuda.memory_allocated, backend.device)
            watch("gpu_memory_bytes", "GPU memory held by tensors", memory)

    def warm_up(self) -> None:
        """Run a small and a full batch on every device; on GPUs, also one batch per CUDA graph to capture.

        A model with scores runs batches of pairs: there are other graphs for its head and for two token types.
        """
        vocabulary, length = self.engine.checkpoint.spec.vocabulary, self.engine.checkpoint.max_length
        head = self.engine.checkpoint.score
        work = self.pipeline.work(self.pipeline.plan() if head is None else self.pipeline.score_plan()[0])
        for tokens, texts in self.warm_up_sizes():
            ids = np.arange(tokens, dtype=np.int32) % vocabulary
            if head is not None and head.token_types:
                ids[tokens // 2 :] = ~ids[tokens // 2 :]
            sequences = np.array_split(ids, max(texts, -(-tokens // length)))
            # One call per device, submitted together so that each device runs one.
            calls = [self.batcher.submit(sequences, work) for _ in range(self.backend.devices)]
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
        if base not in self.model_names:
            raise HTTPError("unknown_model", f"the model is not served: {name!r}; use {' or '.join(self.model_names)}")
        self.pipeline.plan(task=task)  # raises for an unknown one
        return task

    def estimate_queue_seconds(self) -> int:
        """Return the seconds in which the model processes the queued tokens, from 1 to MAX_RETRY_AFTER_SECONDS."""
        rate = self.batcher.tokens_per_second
        return max(1, min(MAX_RETRY_AFTER_SECONDS, math.ceil(self.batcher.queued_tokens / rate) if rate else 1))

    async def embed(self, given: str | list[Any], usage: Usage, **options: Any) -> Embeddings:
        """Embed a request's texts. options: those of `_run`."""
        plan, results = await self._run(given, usage, **options)
        return self.pipeline.collect(results, plan)

    async def embed_tokens(self, given: str | list[Any], usage: Usage, **options: Any) -> list[np.ndarray]:
        """Return the last hidden states of each text, [tokens, hidden]. options: those of `_run`."""
        _, results = await self._run(given, usage, states=True, **options)
        return [rows[i] for window, rows in results for i in window.first_sequences]

    async def rank(
        self, query: str, documents: Sequence[str], usage: Usage, *, top_n: int | None = None, **options: Any
    ) -> list[Ranked]:
        """Return the best `top_n` documents for a query, or all of them, best first. options: those of `score`."""
        head = self.engine.checkpoint.score
        if head is not None and len(head.labels) > 1:
            raise HTTPError("no_scores", f"the model gives {len(head.labels)} scores per pair, not one; use /predict")
        return ranked(await self.score([(query, document) for document in documents], usage, **options), top_n)

    async def score(
        self,
        pairs: Sequence[Pair | str],
        usage: Usage,
        *,
        model: str | None = None,
        truncate: bool | None = None,
        truncation: Literal["right"] = "right",
        raw_scores: bool = False,
    ) -> np.ndarray:
        """Score a request's pairs and single texts: [n], or [n, labels] if there are several.

        The APIs define scores from 0 to 1, whatever the checkpoint's activation: a sigmoid of one label, a softmax over
        several. raw_scores: without either.
        """
        head = self.engine.checkpoint.score
        activation: ScoreActivation = "sigmoid" if head is not None and len(head.labels) == 1 else "softmax"
        try:
            plan, activate = self.pipeline.score_plan(
                activation="none" if raw_scores else activation, truncation=truncation
            )
        except OptionError as error:
            raise HTTPError("no_scores", str(error)) from error
        if self.task_of_model(model) is not None:
            raise HTTPError("invalid", f"scores have no task: {model!r}; use {self.model_name}")
        self._check_sizes(pairs)
        # A body can have many documents for one long query, which is tokenized with each of them.
        size, what = sum(map(_size, pairs)), "the pairs are too long"
        check_maximum("too_large", what, size, self.options.max_body, "characters", "send fewer documents")
        return activate(self.pipeline.collect(await self._run_plan(pairs, plan, usage, truncate), plan).vectors)

    async def _run(
        self,
        given: str | list[Any],
        usage: Usage,
        *,
        model: str | None = None,
        truncate: bool | None = None,
        fallback_task: str | None = None,
        states: bool = False,
        **options: Unpack[EncodeKeywords],
    ) -> tuple[Plan, list[tuple[Window, Rows]]]:
        """Check a request's texts and run them.

        model: its name in the request, which may have a task. truncate: None follows --long-input. fallback_task: the
        task without --default-task.
        """
        named, task = self.task_of_model(model), options.get("task")
        texts = self.texts(given)
        self._check_token_ids(texts, foreign=(model or "").startswith(OPENAI_MODEL_PREFIX))
        if named is not None and task not in (None, named):
            raise HTTPError("invalid", f"the request has two tasks: {named!r} in model, {task!r} in task; send one")
        options["task"] = named or task or self.options.default_task or fallback_task
        plan = self.pipeline.plan(**options)
        plan = self.pipeline.states_plan(plan) if states else plan
        return plan, await self._run_plan(texts, plan, usage, truncate)

    async def _run_plan(
        self, texts: Sequence[Text | Pair], plan: Plan, usage: Usage, truncate: bool | None
    ) -> list[tuple[Window, Rows]]:
        """Count texts or pairs and run them in batches shared with all requests.

        OverloadedError if they would not be done in time.
        """
        usage.texts += len(texts)
        usage.characters += sum(_size(text) for text in texts if isinstance(text, str | tuple))
        deadline = time.perf_counter() + self.options.deadline if self.options.deadline else math.inf
        limits, max_length = Limits(self.options.max_queued_tokens, deadline), self.engine.checkpoint.max_length
        # Rejects most of what is too much before it is tokenized.
        estimate = sum(
            min(_size(text) // CHARACTERS_PER_TOKEN, max_length) if isinstance(text, str | tuple) else len(text)
            for text in texts
        )
        self.batcher.check(estimate, limits)
        windows = self._count_windows(self.pipeline.reader.windows(texts, plan), usage, truncate, plan)
        work, size = self.pipeline.work(plan), sum(map(_size, texts))
        return await run_windows(self.batcher, windows, work, size=size, limits=limits, timing=usage)

    def texts(self, given: str | list[Any]) -> list[Text]:
        """Return the texts of a request's input: a string, strings, one sequence of token ids, or several.

        HTTPError for more texts or characters than a request may have.
        """
        kinds = {str} if isinstance(given, str) else {type(item) for item in given}
        if int in kinds and len(kinds) > 1:
            first = next(item for item in given if isinstance(item, int))
            raise OptionError(f"the input mixes token ids such as {first} with texts; put each text's ids in a list")
        texts: list[Text] = [given] if isinstance(given, str) or kinds == {int} else given
        self._check_sizes(texts)
        return texts

    def _check_sizes(self, texts: Sequence[Text | Pair]) -> None:
        """Raise HTTPError for more texts or pairs, or more characters of one, than a request may have."""
        check_maximum("too_many_inputs", "too many texts", len(texts), self.options.max_inputs, "texts", "send fewer")
        longest = max((_size(text) for text in texts if isinstance(text, str | tuple)), default=0)
        check_maximum("too_long", "a text is too long", longest, MAX_CHARACTERS, "characters", "split it")

    def _check_token_ids(self, texts: Sequence[Text], *, foreign: bool) -> None:
        """Raise HTTPError for token ids that the tokenizer does not make: those of another vocabulary."""
        for index, text in enumerate(texts):
            if not isinstance(text, str) and (foreign or not self.engine.tokenizer.could_return(text)):
                raise HTTPError(
                    "invalid",
                    f"text {index} is token ids that the served model's tokenizer does not make, special tokens "
                    f"included: {list(text[:8])}{' ...' if len(text) > 8 else ''}; send text (LangChain: "
                    "OpenAIEmbeddings(check_embedding_ctx_length=False))",
                )

    def _count_windows(
        self, windows: Iterator[Window], usage: Usage, truncate: bool | None, plan: Plan
    ) -> Iterator[Window]:
        """Yield the same windows; count their tokens and check the limits as they are tokenized."""
        if truncate is None:
            truncate = self.options.long_input == "truncate"
        for window in windows:
            truncated = np.flatnonzero(window.truncated)
            if len(truncated) and not truncate:
                index, maximum = window.first_index + truncated[0], self.engine.checkpoint.max_length
                message = f"text {index} is too long: more than {maximum} tokens; shorten it or request truncation"
                raise HTTPError("too_long", message)
            usage.truncated += len(truncated)
            usage.tokens += int(window.token_counts.sum())
            if plan.vector_options.rows == "token":
                what = "the response would have too many token vectors"
                check_maximum("too_many_inputs", what, usage.tokens, MAX_TOKEN_VECTORS, "tokens", "send fewer")
            yield window


def _size(text: Text | Pair) -> int:
    """Return the characters of a text or of both texts of a pair, or the number of token ids."""
    return len(text[0]) + len(text[1]) if isinstance(text, tuple) else len(text)
