"""The steps from texts to embeddings, which `Engine`, the server, bulk jobs and integrations share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, Unpack

import numpy as np

from unpadded.checkpoint.reader import Checkpoint
from unpadded.errors import OptionError, OutputError
from unpadded.execution.backend import Backend, PendingVectors
from unpadded.execution.batcher import Batcher, Observe, Rows, Work
from unpadded.execution.runner import Runner
from unpadded.execution.scheduler import schedule
from unpadded.options import EncodeKeywords, EncodeOptions, Plan, make_plan
from unpadded.quantization import quantize
from unpadded.tokenization.tokenizer import Tokenizer
from unpadded.tokenization.windows import Text, Window, WindowReader

Advance = Callable[[int, int], object]  # called with the number of texts and of tokens that were embedded
Item = TypeVar("Item")


@dataclass(frozen=True)
class Embeddings:
    """The vectors of texts, with the number of tokens of each text and whether it was truncated."""

    vectors: np.ndarray  # [n, dimensions] in the requested precision
    token_counts: np.ndarray  # [n] int64: tokens embedded, including prompt and special tokens
    truncated: np.ndarray  # [n] bool


class EmbeddingPipeline:
    """Reads texts in windows, schedules them into batches, runs these on a backend and puts the rows in order."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, backend: Backend, token_budget: int) -> None:
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.backend = backend
        self.token_budget = token_budget
        self._reader = WindowReader(checkpoint, tokenizer)

    @property
    def runner(self) -> Runner:
        """The runner that holds the weights; OptionError if they are in worker processes."""
        if not isinstance(self.backend, Runner):
            raise OptionError(
                f"the weights are not in this process: device={self.backend.describe()['device']!r}; load the model on "
                "one device"
            )
        return self.backend

    def with_runner(self, runner: Runner, *, max_length: int | None = None) -> EmbeddingPipeline:
        """Return a pipeline of the same model on another runner, with another maximum number of tokens per text."""
        checkpoint = replace(self.checkpoint, max_length=max_length or self.checkpoint.max_length)
        return EmbeddingPipeline(checkpoint, self.tokenizer, runner, self.token_budget)

    def plan(self, **options: Unpack[EncodeKeywords]) -> Plan:
        """Check options against the model; OptionError names an unsupported value."""
        return make_plan(self.checkpoint, self.backend.dimensions, EncodeOptions(**options))

    def windows(self, texts: Iterable[Text], plan: Plan) -> Iterator[Window]:
        """Tokenize texts, one window at a time."""
        return self._reader.windows(texts, plan)

    def vector_work(self, plan: Plan) -> Work:
        """Return the work that makes a `Batcher` compute the vectors of the sequences of `windows`."""
        return Work(plan.vector_options, lambda sequences: self.backend.launch(sequences, plan.vector_options).wait())

    def token_work(self, plan: Plan) -> Work:
        """Return the work that makes a `Batcher` compute the hidden states of the sequences of `windows`."""
        adapter = plan.vector_options.adapter
        return Work(("tokens", adapter), lambda sequences: self.backend.hidden_states(sequences, adapter=adapter))

    def batcher(self, observe: Observe | None = None) -> Batcher:
        """Return a batcher that runs the calls of many callers in shared batches; it calls `observe` after each."""
        return Batcher(self.token_budget, observe, parallelism=self.backend.parallelism)

    def collect(self, done: Iterable[tuple[Window, Rows]], plan: Plan) -> Embeddings:
        """Return the embeddings of windows and their rows; OutputError names a text whose vector is not finite."""
        blocks = []
        for window, rows in done:
            vectors = np.stack(list(rows))
            _check_finite(vectors, window, range(len(window.sequences)))
            blocks.append(_finish(window, vectors, plan))
        return join(blocks, plan)

    def blocks(self, texts: Iterable[Text], plan: Plan, advance: Advance) -> Iterator[Embeddings]:
        """Yield the fp32 vectors of one window of texts after another.

        The next window is tokenized, and its batches are launched, while the device computes.
        """
        rows = np.empty((0, 0), np.float32)  # of the window's sequences
        done = 0
        for window, batch, pending in _delayed(self._launched(texts, plan), self.backend.depth):
            if done == 0:
                rows = np.empty((len(window.sequences), plan.vector_options.dimensions), np.float32)
            with window.naming(batch):
                rows[batch] = pending.wait()
            _check_finite(rows[batch], window, batch)
            before, done, total = done, done + len(batch), len(rows)
            n_texts = len(window.texts)
            tokens = sum(len(window.sequences[i]) for i in batch)
            advance(done * n_texts // total - before * n_texts // total, tokens)
            if done == total:
                yield _finish(window, rows, plan)
                done = 0

    def _launched(self, texts: Iterable[Text], plan: Plan) -> Iterator[tuple[Window, list[int], PendingVectors]]:
        """Launch batch after batch; yield each with its window and the indices of its sequences."""
        for window in self._reader.windows_ahead(texts, plan):
            sequences = window.sequences
            for batch in schedule([len(ids) for ids in sequences], self.token_budget):
                with window.naming(batch):
                    pending = self.backend.launch([sequences[i] for i in batch], plan.vector_options)
                yield window, batch, pending

    def token_embeddings(self, texts: Iterable[Text], plan: Plan) -> list[np.ndarray]:
        """Return the last hidden states of each text: [tokens, hidden] fp32."""
        rows: list[np.ndarray] = []
        for window in self.windows(texts, plan):
            sequences = window.sequences
            found: dict[int, np.ndarray] = {}
            for batch in schedule([len(ids) for ids in sequences], self.token_budget):
                with window.naming(batch):
                    hidden = self.backend.hidden_states(
                        [sequences[i] for i in batch], adapter=plan.vector_options.adapter
                    )
                    found |= zip(batch, hidden, strict=True)
            rows += [found[i] for i in window.first_sequences]
        return rows


def join(blocks: Iterable[Embeddings], plan: Plan) -> Embeddings:
    """Concatenate blocks of fp32 vectors and quantize them together."""
    no_texts = Embeddings(
        np.zeros((0, plan.vector_options.dimensions), np.float32), np.zeros(0, np.int64), np.zeros(0, bool)
    )
    blocks = [no_texts, *blocks]
    return Embeddings(
        quantize(np.concatenate([block.vectors for block in blocks]), plan.precision, plan.ranges),
        np.concatenate([block.token_counts for block in blocks]),
        np.concatenate([block.truncated for block in blocks]),
    )


def _delayed(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """Yield the items `depth - 1` steps late. If `items` raises, the items before the error are yielded first."""
    held: deque[Item] = deque()
    try:
        for item in items:
            held.append(item)
            if len(held) == depth:
                yield held.popleft()
    except GeneratorExit:
        held.clear()
        raise
    finally:
        yield from held


def _finish(window: Window, rows: np.ndarray, plan: Plan) -> Embeddings:
    """Return the fp32 vectors of a window's texts. rows: [sequences, dimensions], one per sequence."""
    first = np.array(window.first_sequences)
    vectors = _mean_of_chunks(rows, first, plan.vector_options.normalize) if plan.long_text == "mean" else rows[first]
    return Embeddings(vectors, window.token_counts, window.truncated)


def _check_finite(vectors: np.ndarray, window: Window, batch: Sequence[int]) -> None:
    """Raise OutputError unless the vectors of a batch are finite. batch: indices into `window.sequences`."""
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        index = min(window.text_index(batch[i]) for i in wrong.tolist())
        raise OutputError(
            f"the vector of text {index} is not finite; the weights may hold NaN, or values exceed the dtype's range: "
            "try dtype='float32' or 'bfloat16'"
        )


def _mean_of_chunks(rows: np.ndarray, first: np.ndarray, normalize: bool) -> np.ndarray:
    """Return the mean of each text's chunks, optionally L2-normalized: [texts, dimensions].

    rows: [chunks, dimensions]. first: [texts], each text's first chunk, which equal texts share.
    """
    starts, text = np.unique(first, return_inverse=True)
    means = np.add.reduceat(rows, starts, axis=0) / np.diff(starts, append=len(rows))[:, None].astype(np.float32)
    if normalize:
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return means[text]
