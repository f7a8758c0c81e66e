"""The steps from texts to embeddings, which `Engine`, the server, bulk jobs and integrations share."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias, Unpack

import numpy as np
import torch

from unpadded.checkpoint.modules import reject_pickle
from unpadded.checkpoint.reader import Checkpoint
from unpadded.checkpoint.sparse_head import SPARSE_LINEAR
from unpadded.errors import OptionError, OutputError
from unpadded.execution.batcher import Batcher, Observe, Rows, Work
from unpadded.execution.results import Embeddings, Spans, Sparse, TokenVectors, join, terms
from unpadded.execution.runner import Runner
from unpadded.execution.scheduler import schedule
from unpadded.execution.token_vectors import TokenKeywords, make_token_plan
from unpadded.execution.transfer import Wait
from unpadded.execution.worker_pool import WorkerPool
from unpadded.model.batch import Ids, SpannedIds
from unpadded.options import (
    EncodeKeywords,
    EncodeOptions,
    Plan,
    ScoreKeywords,
    Truncation,
    VectorOptions,
    check_keywords,
    make_plan,
    make_score_plan,
)
from unpadded.tokenization.tokenizer import Pair, Tokenizer
from unpadded.tokenization.windows import Text, TextGroup, Window, WindowReader, delayed
from unpadded_kernels import matryoshka

Backend: TypeAlias = Runner | WorkerPool
Advance = Callable[[int, int], object]  # called with the number of texts and of tokens that were embedded

WINDOW_BATCHES = 4  # about so many are tokenized at a time, while the device computes those before
# Attention on a CPU groups texts of equal length, of which long windows have more (measured: bench/NOTES.md).
MIN_GROUP_TOKENS = 1 << 15
MAX_ELEMENTS = 1 << 24  # 64 MB in fp32


class EmbeddingPipeline:
    """Reads texts in windows, schedules them into batches, runs these on a backend and puts the rows in order."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, backend: Backend, token_budget: int) -> None:
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.backend = backend
        self.token_budget = token_budget
        self.reader = WindowReader(checkpoint, tokenizer)

    @property
    def runner(self) -> Runner:
        """The runner that holds the weights; OptionError if they are in worker processes."""
        if not isinstance(self.backend, Runner):
            device = self.backend.describe()["device"]
            raise OptionError(f"the weights are not in this process: device={device!r}; load the model on one device")
        return self.backend

    def plan(self, **options: Unpack[EncodeKeywords]) -> Plan:
        """Check options against the model; OptionError names an unsupported value."""
        check_keywords(options, EncodeOptions)
        return make_plan(self.checkpoint, self.backend.dimensions, EncodeOptions(**options))

    def score_plan(self, **options: Unpack[ScoreKeywords]) -> tuple[Plan, Callable[[np.ndarray], np.ndarray]]:
        """Check options against the model; return the plan and the function that turns logits into scores."""
        plan, activation = make_score_plan(self.checkpoint, **options)
        return plan, partial(_scores, activation)

    def states_plan(self, plan: Plan) -> Plan:
        """Return a plan for the last hidden states of all tokens instead of vectors."""
        hidden, adapter = self.checkpoint.spec.hidden, plan.vector_options.adapter
        states = VectorOptions(dimensions=hidden, adapter=adapter, head="states", rows="token")
        return replace(plan, vector_options=states)

    def span_plan(self, cut: tuple[int, int] | None, **options: Any) -> Plan:
        """Return a plan for spans, whose texts are pairs of a string and its spans, which `cut` makes if not None."""
        if (pooling := self.checkpoint.pooling) != "mean":
            raise OptionError(f"{self.checkpoint.name} has {pooling} pooling, spans are means of tokens; use encode")
        plan = self.plan(**options)
        return replace(plan, cut=cut, vector_options=replace(plan.vector_options, rows="span"))

    def sparse_plan(self, task: str | None, prompt: str | None, truncation: Truncation) -> Plan:
        """Check options against the model; return a plan for the rows that `sparse` reads."""
        head, plan = self.checkpoint.sparse, self.plan(task=task, prompt=prompt, truncation=truncation)
        if head is None:
            reject_pickle(self.checkpoint.folder, SPARSE_LINEAR)
            raise OptionError(
                f"{self.checkpoint.name} has no head for sparse weights; load a model such as SPLADE, or convert "
                f"bge-m3's {SPARSE_LINEAR}.pt to safetensors"
            )
        adapter, size = plan.vector_options.adapter, self.checkpoint.spec.vocabulary if head.log1p else 1
        rows = VectorOptions(dimensions=size, adapter=adapter, head="sparse")
        return replace(plan, vector_options=rows if head.log1p else replace(rows, rows="token"))

    def sparse(self, done: Iterable[tuple[Window, Rows]], plan: Plan, top_k: int | None = None) -> Sparse:
        """Return the weights of windows and their rows, at most `top_k` per text, the heaviest.

        OutputError names a text whose weights are not finite.
        """
        head, per_text = self.checkpoint.sparse, replace(plan.vector_options, rows="text")
        assert head is not None
        excluded = [self.tokenizer.backend.token_to_id(token) for token in head.excluded]
        found, windows = [(np.zeros(0, np.int32), np.zeros(0, np.float32))], []
        for window, rows in done:
            pairs = zip(rows, window.sequences, strict=True)
            texts = [terms(row, ids, head, excluded, top_k or head.top_k) for row, ids in pairs]
            _check_finite(np.array([[weights.sum()] for _, weights in texts]), window, range(len(texts)), per_text)
            found += [texts[i] for i in window.first_sequences]
            windows.append(window)
        ids, weights = zip(*found, strict=True)
        return Sparse(
            indptr=np.cumsum([len(part) for part in ids], dtype=np.int64),
            ids=np.concatenate(ids),
            weights=np.concatenate(weights),
            token_counts=np.array([count for window in windows for count in window.token_counts], np.int64),
            truncated=np.array([value for window in windows for value in window.truncated], bool),
            vocabulary=self.checkpoint.spec.vocabulary,
            tokenizer=self.tokenizer,
        )

    def work(self, plan: Plan) -> Work:
        """Return the work of a `Batcher`: the rows of sequences, as `split` returns them."""
        options, launch = plan.vector_options, self.backend.launch
        minimum = self._min_tokens(options)
        return Work(options, lambda sequences: split(launch(sequences, options)(), sequences, options), minimum)

    def batcher(self, observe: Observe | None = None) -> Batcher:
        """Return a batcher that runs the calls of many callers in shared batches; it calls `observe` after each."""
        return Batcher(self.token_budget, observe, devices=self.backend.devices, depth=self.backend.depth)

    def collect(self, done: Iterable[tuple[Window, Rows]], plan: Plan) -> Embeddings:
        """Return the embeddings of windows and their rows; OutputError names a text whose vector is not finite."""
        blocks = []
        for window, rows in done:
            vectors = np.stack(list(rows))
            _check_finite(vectors, window, range(len(window.sequences)), plan.vector_options)
            blocks.append(Embeddings(vectors[window.first_sequences], window.token_counts, window.truncated))
        return join(blocks, plan)

    def collect_spans(self, done: Iterable[tuple[Window, Rows]], plan: Plan) -> Spans:
        """Return the spans of windows and their rows; OutputError names a text with a vector that is not finite."""
        vectors = [np.zeros((0, plan.vector_options.dimensions), np.float32)]
        sources = [np.zeros((0, 5), np.int64)]  # the text, then those of the sequences
        for window, rows in done:
            _check_finite(np.concatenate(rows), window, range(len(rows)), plan.vector_options)
            ends = dict(pairwise([*sorted({*window.first_sequences}), len(rows)]))
            for index, first in enumerate(window.first_sequences, window.first_index):
                vectors += rows[first : ends[first]]
                sections = window.sequences[first : ends[first]]
                sources += [np.insert(ids.sources, 0, index, 1) for ids in sections if isinstance(ids, SpannedIds)]
        table = np.concatenate(sources)
        order = np.lexsort((table[:, 1], table[:, 0]))
        table = table[order]
        return Spans(np.concatenate(vectors)[order], table[:, 0], table[:, 2:4], table[:, 4])

    def blocks(self, texts: Iterable[Text | Pair], plan: Plan, advance: Advance) -> Iterator[Embeddings]:
        """Yield the fp32 vectors of one window of texts after another.

        The next window is tokenized, and its batches are launched, while the device computes.
        """
        backend = self.backend
        window_tokens = WINDOW_BATCHES * self.token_budget
        if isinstance(backend, WorkerPool):
            group_tokens = max(window_tokens, MIN_GROUP_TOKENS)
            groups = self.reader.groups(texts, plan, group_tokens, first=backend.devices)
            started = (backend.embed(group, plan, self.token_budget) for group in groups)
            for wait in delayed(started, backend.devices * (backend.depth + 1) - 1):
                block: Embeddings = wait()
                advance(len(block), int(block.token_counts.sum()))
                yield block
            return
        windows = self.reader.windows_ahead(texts, plan, window_tokens if backend.depth > 1 else math.inf)
        yield from self._blocks_of(windows, plan, advance)

    def embed_group(self, group: TextGroup, plan: Plan, token_budget: int) -> Callable[[], Embeddings]:
        """Tokenize texts of the pipeline in the parent of this process; return what computes their fp32 vectors."""
        self.token_budget = token_budget
        window = self.reader.tokenize(group, plan)
        return lambda: next(self._blocks_of(iter([window]), plan, lambda texts, tokens: None))

    def rows(
        self, texts: Iterable[Text], plan: Plan, advance: Advance, window_tokens: float = math.inf
    ) -> Iterator[tuple[Window, Rows]]:
        """Yield one window of texts after another, and the rows of each sequence: [rows, dimensions] fp32.

        The next window is tokenized while the device computes.
        """
        found: dict[int, Any] = {}
        windows = self.reader.windows_ahead(texts, plan, window_tokens)
        for window, batch, rows, last in self._batches(windows, plan, advance):
            parts = split(rows, [window.sequences[i] for i in batch], plan.vector_options)
            found |= zip(batch, parts, strict=True)
            if last:
                yield window, [found[i] for i in range(len(found))]
                found = {}

    def token_embeddings(self, texts: Iterable[Text], plan: Plan, advance: Advance) -> list[np.ndarray]:
        """Return the last hidden states of each text: [tokens, hidden] fp32."""
        windows = self.rows(texts, self.states_plan(plan), advance)
        return [rows[i] for window, rows in windows for i in window.first_sequences]

    def token_plan(self, **options: Unpack[TokenKeywords]) -> tuple[Plan, Callable[[Any, np.ndarray], np.ndarray]]:
        """Check options against the model; return the plan and the function that `collect_tokens` takes."""
        return make_token_plan(self.checkpoint, self.tokenizer, **options)

    def all(self, texts: Iterable[Text], advance: Advance) -> tuple[Embeddings, Sparse, TokenVectors]:
        """Return the vector, the sparse weights and the token vectors of each text, from one head (see `loading`)."""
        checkpoint = self.checkpoint
        if not checkpoint.has_all or checkpoint.tokens is None:
            raise OptionError(f"{checkpoint.name} does not give all results in one pass; call encode and the others")
        hidden, token_plan = checkpoint.spec.hidden, self.token_plan()
        done: list[list[tuple[Window, Any]]] = [[], [], []]
        plans = self.plan(), self.sparse_plan(None, None, "right")
        options = replace(token_plan[0].vector_options, dimensions=hidden + 1 + checkpoint.tokens.dimensions)
        plan = replace(token_plan[0], vector_options=replace(options, normalize=False, head="all"))
        for window, rows in self.rows(texts, plan, advance):
            first = torch.from_numpy(np.stack([row[0, :hidden] for row in rows]))
            done[0].append((window, matryoshka(first, False, hidden, checkpoint.normalize).numpy()))
            done[1].append((window, [row[:, hidden : hidden + 1].clip(0) for row in rows]))
            vectors = (torch.from_numpy(row[:, hidden + 1 :]) for row in rows)
            done[2].append((window, [matryoshka(one, False, one.shape[1], True).numpy() for one in vectors]))
        tokens = self.collect_tokens(done[2], *token_plan)
        return self.collect(done[0], plans[0]), self.sparse(done[1], plans[1]), tokens

    def collect_tokens(
        self, done: Iterable[tuple[Window, Rows]], plan: Plan, reduce: Callable[[Any, np.ndarray], np.ndarray]
    ) -> TokenVectors:
        """Return the token vectors of windows and their rows."""
        empty = np.zeros((0, plan.vector_options.dimensions), np.float32)
        vectors, counts, truncated = [empty], [np.zeros(0, np.int64)], [np.zeros(0, bool)]
        for window, rows in done:
            kept = [reduce(*pair) for pair in zip(window.sequences, rows, strict=True)]
            vectors += [kept[i] for i in window.first_sequences]
            counts.append(window.token_counts)
            truncated.append(window.truncated)
        offsets = np.cumsum([len(one) for one in vectors])
        return TokenVectors(np.concatenate(vectors), offsets, np.concatenate(counts), np.concatenate(truncated))

    def _blocks_of(self, windows: Iterator[Window], plan: Plan, advance: Advance) -> Iterator[Embeddings]:
        """Yield the fp32 vectors of each window."""
        vectors: np.ndarray | None = None  # of the window's sequences
        for window, batch, rows, last in self._batches(windows, plan, advance):
            if vectors is None:
                vectors = np.empty((len(window.sequences), plan.vector_options.dimensions), np.float32)
            vectors[batch] = rows
            if last:
                yield Embeddings(vectors[window.first_sequences], window.token_counts, window.truncated)
                vectors = None

    def _batches(
        self, windows: Iterator[Window], plan: Plan, advance: Advance
    ) -> Iterator[tuple[Window, list[int], np.ndarray, bool]]:
        """Yield each batch: its window, the indices of its sequences, their rows, and whether it is the window's last.

        OutputError names a text whose rows are not finite.
        """
        done = 0
        in_flight = self.backend.devices * self.backend.depth
        for window, batch, wait in delayed(self._launched(windows, plan), in_flight - 1):
            with window.naming(batch):
                rows = wait()
            _check_finite(rows, window, batch, plan.vector_options)
            before, done, total = done, done + len(batch), len(window.sequences)
            n_texts = len(window.first_sequences)
            tokens = sum(len(window.sequences[i]) for i in batch)
            advance(done * n_texts // total - before * n_texts // total, tokens)
            yield window, batch, rows, done == total
            done %= total

    def _launched(self, windows: Iterator[Window], plan: Plan) -> Iterator[tuple[Window, list[int], Wait]]:
        """Launch batch after batch; yield each with its window and the indices of its sequences."""
        for window in windows:
            sequences = window.sequences
            minimum = self._min_tokens(plan.vector_options)
            for batch in schedule([max(len(ids), minimum) for ids in sequences], self.token_budget):
                with window.naming(batch):
                    wait = self.backend.launch([sequences[i] for i in batch], plan.vector_options)
                yield window, batch, wait

    def _min_tokens(self, options: VectorOptions) -> int:
        """Return as how many tokens a text counts at least, so that a batch has at most MAX_ELEMENTS in its rows."""
        return self.token_budget * options.dimensions // MAX_ELEMENTS if options.rows == "text" else 0


def split(rows: np.ndarray, sequences: Sequence[Ids], options: VectorOptions) -> Rows:
    """Return the rows of each sequence: [dimensions], or [rows, dimensions] of a head with rows per token or span."""
    return rows if options.rows == "text" else np.split(rows, np.cumsum(_row_counts(sequences, options))[:-1])


def _row_counts(sequences: Sequence[Ids], options: VectorOptions) -> list[int]:
    if options.rows == "token":
        return [len(ids) for ids in sequences]
    return [len(ids.spans) if isinstance(ids, SpannedIds) else 1 for ids in sequences]


def _scores(activation: str, logits: np.ndarray) -> np.ndarray:
    """Return [n] of [n, 1], or [n, labels], in fp32; in between in fp64, see `HeadLayer`."""
    tensor = torch.from_numpy(logits).double()
    if activation != "none":
        tensor = tensor.sigmoid() if activation == "sigmoid" else tensor.softmax(dim=1)
    scores: np.ndarray = tensor.float().numpy()
    return scores[:, 0] if scores.shape[1] == 1 else scores


def _check_finite(rows: np.ndarray, window: Window, batch: Sequence[int], options: VectorOptions) -> None:
    """Raise OutputError unless the rows of a batch are finite. batch: indices into `window.sequences`."""
    if rows.dtype == object or np.isfinite(rows).all():  # objects, of `wait_for_terms`, are checked by `sparse`
        return
    wrong = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(wrong):
        ends = np.cumsum(_row_counts([window.sequences[i] for i in batch], options))
        index = min(window.text_index(batch[place]) for place in np.searchsorted(ends, wrong, "right").tolist())
        raise OutputError(
            f"the vector of text {index} is not finite; the weights may hold NaN, or values exceed the dtype's range: "
            "try dtype='float32' or 'bfloat16'"
        )
