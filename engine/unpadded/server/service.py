"""The served models as endpoints use them: names, tasks, limits, and batches shared by all requests."""

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch

from unpadded import Embeddings, Engine
from unpadded.errors import OptionError
from unpadded.execution import cuda_graphs
from unpadded.execution.batcher import Batcher, Limits, Rows, Work, run_windows
from unpadded.execution.results import Ranked, Sparse, ranked
from unpadded.execution.runner import Runner
from unpadded.options import Plan, ScoreActivation
from unpadded.server.errors import HTTPError, check_maximum
from unpadded.server.metrics import Metrics, Usage
from unpadded.server.options import ServerOptions
from unpadded.tokenization.spans import SpannedText
from unpadded.tokenization.tokenizer import Pair
from unpadded.tokenization.truncation import CHARACTERS_PER_TOKEN
from unpadded.tokenization.windows import Text, Window

# Per text, and per /tokenize: tokenizing so many takes up to 2 s of a core and 0.3 GB (Chinese, BERT, Xeon, 2026-11).
MAX_CHARACTERS = 1 << 19
MAX_TOKEN_VECTORS = 32_768  # per request; with 768 dimensions, 96 MiB before they become JSON
MAX_SPARSE_WEIGHTS = 1 << 22  # per request, about 40 bytes of JSON each
# Clients of OpenAI's own models may send token ids of OpenAI's tokenizer.
OPENAI_MODEL_PREFIX = "text-embedding-"
# Names of one task in checkpoints, and in the APIs of Cohere, Voyage, nomic and Jina.
QUERIES = ("search_query", "query", "retrieval.query")
DOCUMENTS = ("search_document", "document", "passage", "retrieval.passage")
TASKS = (QUERIES, DOCUMENTS, ("clustering", "separation"))
MAX_RETRY_AFTER_SECONDS = 60
Item: TypeAlias = Text | Pair | SpannedText


class Service:
    """The served models. Their batches wait in one queue and run one after another on the device."""

    def __init__(self, engines: Sequence[Engine], options: ServerOptions) -> None:
        backends = [engine._pipeline.backend for engine in engines]
        runners = [backend for backend in backends if isinstance(backend, Runner)]
        device = backends[0].describe()["device"]
        if len(backends) > 1 and len(runners) < len(backends):
            raise OptionError(f"several models need one device: {device}; pass one, or start a server for each model")
        for runner in runners[1:]:  # on one stream, a batch reuses the memory of the batches before it, of any model
            runner.encoder.lock, runner.encoder.stream = runners[0].encoder.lock, runners[0].encoder.stream
        self.options = options
        self.metrics = Metrics()
        self.backends, first = backends, backends[0]
        budget = min(engine._pipeline.token_budget for engine in engines)
        self.batcher = Batcher(budget, self.metrics.observe_batch, devices=first.devices, depth=first.depth)
        self.models = [ServedModel(engine, self) for engine in engines]
        self.names = tuple(dict.fromkeys(name for model in self.models for name in model.names))
        if len({model.name for model in self.models}) < len(engines):
            raise OptionError(f"two models have the same name: {', '.join(self.names)}; rename or omit one of them")
        if options.default_task is not None:
            for model in [model for model in self.models if model.default_task] or self.models[:1]:
                model.pipeline.plan(task=options.default_task)  # raises if no model has it
        self.created = int(time.time())
        self.device_type = re.split("[:,]", device)[0]
        batcher, watch = self.batcher, self.metrics.watch
        watch("devices", "devices that accept batches", lambda: self.ready_devices)
        watch("queued_requests", "requests waiting for a batch", lambda: batcher.queued_calls)
        watch("queued_tokens", "tokens waiting for a batch", lambda: batcher.queued_tokens)
        if self.device_type == "cuda" and runners:  # worker processes hold their own memory
            memory = partial(torch.cuda.memory_allocated, runners[0].device)
            watch("gpu_memory_bytes", "GPU memory held by tensors", memory)

    @property
    def ready_devices(self) -> int:
        """Devices that accept batches."""
        return min(backend.ready_devices for backend in self.backends)

    def find(self, name: str | None, *, head: str = "vector") -> "ServedModel":
        """Return the first model of a name, or of any, that is for this head, otherwise the first. 404 if unknown.

        name: a request's field `model`, which may have a task: nomic-embed-text-v1.5:search_query. None: of any name.
        """
        wanted = {name, (name or "").rpartition(":")[0]}
        found = [model for model in self.models if name is None or not wanted.isdisjoint(model.names)]
        if not found:
            raise HTTPError("unknown_model", f"the model is not served: {name!r}; use {' or '.join(self.names)}")
        return min(found, key=lambda model: not model.heads[head])

    def warm_up(self) -> None:
        """Run a small and a full batch of each model on every device, and on GPUs one batch per CUDA graph to capture.

        A model with scores runs batches of pairs: there are other graphs for its head and for two token types.
        """
        for model in self.models:
            vocabulary, length = model.checkpoint.spec.vocabulary, model.checkpoint.max_length
            score, pipeline = model.checkpoint.score, model.pipeline
            work = model.work(pipeline.plan() if score is None else pipeline.score_plan()[0])
            for tokens, texts in self.warm_up_sizes():
                ids = np.arange(tokens, dtype=np.int32) % vocabulary
                if score is not None and score.token_types:
                    ids[tokens // 2 :] = ~ids[tokens // 2 :]
                sequences = np.array_split(ids, max(texts, -(-tokens // length)))
                # One call per device, submitted together so that each device runs one.
                calls = [self.batcher.submit(sequences, work) for _ in range(pipeline.backend.devices)]
                for call in calls:
                    call.future.result()

    def warm_up_sizes(self) -> list[tuple[int, int]]:
        """Return the numbers of tokens and texts of the batches that `warm_up` runs."""
        token_budget = self.batcher.token_budget
        if self.device_type != "cuda":
            return [(1, 1), (token_budget, 1)]
        return [
            (tokens, texts)
            for tokens in (2**power for power in range(token_budget.bit_length()))
            for texts in cuda_graphs.TEXT_BUCKETS
            if texts == 1 or texts <= tokens <= cuda_graphs.TOKEN_BUCKETS[-1]
        ]

    def estimate_queue_seconds(self) -> int:
        """Return the seconds in which the queued tokens are processed, from 1 to MAX_RETRY_AFTER_SECONDS."""
        rate = self.batcher.tokens_per_second
        return max(1, min(MAX_RETRY_AFTER_SECONDS, math.ceil(self.batcher.queued_tokens / rate) if rate else 1))


class ServedModel:
    """One served model: its names, its limits, and its requests in batches shared with all others."""

    def __init__(self, engine: Engine, service: Service) -> None:
        self.service = service
        self.options, self.batcher = service.options, service.batcher
        self.engine = engine
        self.pipeline = engine._pipeline
        self.checkpoint = engine.checkpoint
        self.name = self.checkpoint.name
        self.names = tuple(dict.fromkeys([self.name, self.name.rpartition("/")[2], *self.options.alias]))
        self.default_task = self.options.default_task if self.options.default_task in self.checkpoint.prompts else None
        self.labels = () if self.checkpoint.score is None else self.checkpoint.score.labels
        sparse = self.checkpoint.sparse  # with log1p, as in SPLADE, the model is not trained for vectors
        has_vectors = not self.labels and not (sparse and sparse.log1p)
        self.heads = {"score": bool(self.labels), "sparse": sparse is not None, "vector": has_vectors}
        self.has_prompts = any(self.checkpoint.prompts.values())

    def task_of_name(self, name: str | None) -> str | None:
        """Return the task in a name of this model, see `Service.find`."""
        return None if name is None or name in self.names else name.rpartition(":")[2]

    def task_options(self, task: str | None, fallback: str | None = None) -> dict[str, Any]:
        """Return the options of `pipeline.plan` for a task, which may have another API's name; None: --default-task.

        fallback: the task without --default-task, of a model with prompts. Documents have no prompt in a model that has
        one for queries only.
        """
        task = task or self.default_task or (fallback if self.has_prompts else None)
        if task is None:
            return {}
        prompts = self.checkpoint.prompts
        group: tuple[str, ...] = next((group for group in TASKS if task in group), ())
        own = next((own for own in (task, *group) if own in prompts), None)
        if own is None and group == DOCUMENTS and not prompts.keys().isdisjoint(QUERIES):
            return {"prompt": ""}
        return {"task": own or task}

    async def embed(self, given: str | list[Any], usage: Usage, **options: Any) -> Embeddings:
        """Embed a request's texts. options: those of `_run`."""
        plan, results = await self._run(given, usage, self.pipeline.plan, **options)
        return self.pipeline.collect(results, plan)

    async def embed_chunks(self, documents: Sequence[Sequence[str]], usage: Usage, **options: Any) -> np.ndarray:
        """Embed chunks of documents, joined with line breaks: [chunks, dimensions] fp32. options: those of `_run`."""
        texts: list[SpannedText] = []
        for chunks in documents:
            ends = [end - 1 for end in accumulate(len(chunk) + 1 for chunk in chunks)]
            spans = ((end - len(chunk), end) for chunk, end in zip(chunks, ends, strict=True))
            texts.append(("\n".join(chunks), tuple(spans)))
        plan, results = await self._run(texts, usage, partial(self.pipeline.span_plan, None), **options)
        return self.pipeline.collect_spans(results, plan).vectors

    async def embed_sparse(self, given: str | list[Any], usage: Usage, **options: Any) -> Sparse:
        """Return the sparse weights of a request's texts. options: those of `_run`."""
        make_plan = partial(self.pipeline.sparse_plan, task=None, prompt=None)
        plan, results = await self._run(given, usage, make_plan, **options)
        found, what = self.pipeline.sparse(results, plan), "the response would have too many weights"
        check_maximum("too_many_inputs", what, len(found.ids), MAX_SPARSE_WEIGHTS, "weights", "send fewer texts")
        return found

    async def embed_tokens(self, given: str | list[Any], usage: Usage, **options: Any) -> list[np.ndarray]:
        """Return the last hidden states of each text, [tokens, hidden]. options: those of `_run`."""
        pipeline = self.pipeline
        _, results = await self._run(given, usage, lambda **own: pipeline.states_plan(pipeline.plan(**own)), **options)
        return [rows[i] for window, rows in results for i in window.first_sequences]

    async def rank(
        self, query: str, documents: Sequence[str], usage: Usage, *, top_n: int | None = None, **options: Any
    ) -> list[Ranked]:
        """Return the best `top_n` documents for a query, or all of them, best first. options: those of `score`."""
        if len(self.labels) > 1:
            raise HTTPError("no_scores", f"the model gives {len(self.labels)} scores per pair, not one; use /predict")
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
        if not self.labels:
            raise HTTPError("no_scores", f"{self.name} has no head for scores; serve a reranker or classifier")
        activation: ScoreActivation = "none" if raw_scores else "sigmoid" if len(self.labels) == 1 else "softmax"
        plan, activate = self.pipeline.score_plan(activation=activation, truncation=truncation)
        if self.task_of_name(model) is not None:
            raise HTTPError("invalid", f"scores have no task: {model!r}; use {self.name}")
        self._check_sizes(pairs)
        # A body can have many documents for one long query, which is tokenized with each of them.
        size, what = sum(map(_size, pairs)), "the pairs are too long"
        check_maximum("too_large", what, size, self.options.max_body, "characters", "send fewer documents")
        return activate(self.pipeline.collect(await self._run_plan(pairs, plan, usage, truncate), plan).vectors)

    async def _run(
        self,
        given: str | list[Any],
        usage: Usage,
        make_plan: Callable[..., Plan],
        *,
        model: str | None = None,
        task: str | None = None,
        truncate: bool | None = None,
        fallback_task: str | None = None,
        **options: Any,
    ) -> tuple[Plan, list[tuple[Window, Rows]]]:
        """Check a request's texts and run them.

        model: its name in the request, which may have a task. task, fallback_task: as in `task_options`. truncate: None
        follows --long-input. options: those of `make_plan`.
        """
        named = self.task_of_name(model)
        texts = self.texts(given)
        self._check_token_ids(texts, foreign=(model or "").startswith(OPENAI_MODEL_PREFIX))
        if named is not None and task not in (None, named):
            raise HTTPError("invalid", f"the request has two tasks: {named!r} in model, {task!r} in task; send one")
        plan = make_plan(**options, **self.task_options(named or task, fallback_task))
        return plan, await self._run_plan(texts, plan, usage, truncate)

    async def _run_plan(
        self, texts: Sequence[Item], plan: Plan, usage: Usage, truncate: bool | None
    ) -> list[tuple[Window, Rows]]:
        """Count texts, pairs or chunks and run them in shared batches; OverloadedError if that would be too late."""
        usage.texts += sum(map(_count, texts))
        usage.characters += sum(_size(text) for text in texts if isinstance(text, str | tuple))
        deadline = time.perf_counter() + self.options.deadline if self.options.deadline else math.inf
        limits, max_length = Limits(self.options.max_queued_tokens, deadline), self.checkpoint.max_length
        # Rejects most of what is too much before it is tokenized.
        maximum = math.inf if plan.vector_options.rows == "span" else max_length  # sections are not truncated
        estimate = sum(
            int(min(_size(text) // CHARACTERS_PER_TOKEN, maximum)) if isinstance(text, str | tuple) else len(text)
            for text in texts
        )
        self.batcher.check(estimate, limits)
        windows = self._counted(self.pipeline.reader.windows(cast(Any, texts), plan), usage, truncate, plan)
        work, size = self.work(plan), sum(map(_size, texts))
        return await run_windows(self.batcher, windows, work, size=size, limits=limits, timing=usage)

    def work(self, plan: Plan) -> Work:
        """Return the work of the pipeline with a key that no other model has."""
        work = self.pipeline.work(plan)
        return replace(work, key=(self, work.key))

    def texts(self, given: str | list[Any]) -> list[Any]:
        """Return the texts of a request's input: a string, one sequence of token ids, or several items.

        HTTPError for more texts or characters than a request may have.
        """
        kinds = {str} if isinstance(given, str) else {type(item) for item in given}
        if int in kinds and len(kinds) > 1:
            first = next(item for item in given if isinstance(item, int))
            raise OptionError(f"the input mixes token ids such as {first} with texts; put each text's ids in a list")
        texts: list[Any] = [given] if isinstance(given, str) or kinds == {int} else given
        self._check_sizes(texts)
        return texts

    def _check_sizes(self, texts: Sequence[Item]) -> None:
        """Raise HTTPError for more texts, pairs or chunks, or more characters of one, than a request may have."""
        count = sum(map(_count, texts))
        check_maximum("too_many_inputs", "too many texts", count, self.options.max_inputs, "texts", "send fewer")
        longest = max((_size(text) for text in texts if isinstance(text, str | tuple)), default=0)
        check_maximum("too_long", "a text is too long", longest, MAX_CHARACTERS, "characters", "split it")

    def _check_token_ids(self, texts: Sequence[Text | SpannedText], *, foreign: bool) -> None:
        """Raise HTTPError for token ids that the tokenizer does not make: those of another vocabulary."""
        for index, text in enumerate(texts):
            if not isinstance(text, str | tuple) and (foreign or not self.engine.tokenizer.could_return(text)):
                raise HTTPError(
                    "invalid",
                    f"text {index} is token ids that the served model's tokenizer does not make, special tokens "
                    f"included: {list(text[:8])}{' ...' if len(text) > 8 else ''}; send text (LangChain: "
                    "OpenAIEmbeddings(check_embedding_ctx_length=False))",
                )

    def _counted(self, windows: Iterator[Window], usage: Usage, truncate: bool | None, plan: Plan) -> Iterator[Window]:
        """Yield the same windows; count their tokens and check the limits as they are tokenized."""
        if truncate is None:
            truncate = self.options.long_input == "truncate"
        for window in windows:
            truncated = np.flatnonzero(window.truncated)
            if len(truncated) and not truncate:
                index, maximum = window.first_index + truncated[0], self.checkpoint.max_length
                message = f"text {index} is too long: more than {maximum} tokens; shorten it or request truncation"
                raise HTTPError("too_long", message)
            usage.truncated += len(truncated)
            usage.tokens += int(window.token_counts.sum())
            if plan.vector_options.head == "states":
                what = "the response would have too many token vectors"
                check_maximum("too_many_inputs", what, usage.tokens, MAX_TOKEN_VECTORS, "tokens", "send fewer")
            yield window


def _size(text: Item) -> int:
    """Return the characters of a text or of both texts of a pair, or the number of token ids."""
    return sum(len(part) for part in text if isinstance(part, str)) if isinstance(text, tuple) else len(text)


def _count(text: Item) -> int:
    """Return the number of spans of a text, or 1 without spans."""
    return len(text[1]) if isinstance(text, tuple) and isinstance(text[1], tuple) else 1
