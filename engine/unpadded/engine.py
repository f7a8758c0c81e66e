"""Engine: texts in, vectors out. Take a window of texts, schedule it into batches, run them, put the rows in order."""

from __future__ import annotations

import asyncio
import contextlib
import operator
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar, Unpack

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unpadded.checkpoint.reader import Checkpoint
from unpadded.errors import DeadlineError, OptionError, OutputError
from unpadded.execution.batcher import Batcher, Observe, Rows, Work, run_windows
from unpadded.execution.runner import OnTheWay, Runner
from unpadded.execution.scheduler import schedule
from unpadded.execution.worker_pool import Coming, Workers
from unpadded.options import Options, Plan, check_offered, make_plan
from unpadded.quantization import quantize
from unpadded.tokenization.tokenizer import Tokenizer
from unpadded.tokenization.windows import Text, Window, WindowReader

Output = Literal["numpy", "torch", "list"]
Item = TypeVar("Item")
Advance = Callable[[int, int], object]  # called with the texts and the tokens that were done


@dataclass(frozen=True)
class Embeddings:
    """Vectors, and what each was made of."""

    vectors: np.ndarray  # [n, dimensions] in the precision asked for
    token_counts: np.ndarray  # [n] int64: tokens embedded, prompt and special tokens included
    truncated: np.ndarray  # [n] bool: the text had more


class Engine:
    """An encoder with its tokenizer and pooling. `unpadded.load` makes one."""

    def __init__(
        self, checkpoint: Checkpoint, tokenizer: Tokenizer, runner: Runner | Workers, token_budget: int
    ) -> None:
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.token_budget = token_budget
        self._reader = WindowReader(checkpoint, tokenizer)
        self._runner = runner
        self._joiner: Batcher | None = None  # set by the first call of aembed

    @property
    def runner(self) -> Runner:
        """What holds the weights; OptionError where other processes do."""
        if isinstance(self._runner, Workers):
            raise OptionError(
                f"the weights are not in this process: device={self._runner.describe()['device']!r}; this needs them, "
                "so load the model on one device"
            )
        return self._runner

    @property
    def parallelism(self) -> int:
        """Batches that run side by side: one a device."""
        return self._runner.parallelism

    @property
    def ready(self) -> int:
        """Devices that take batches: fewer than `parallelism` while a process that died is started again."""
        return self._runner.ready

    def close(self) -> None:
        """End the processes of several devices, and the threads of `aembed`; an engine of one device goes on."""
        if self._joiner is not None:
            self._joiner.close()
            self._joiner = None
        self._runner.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def with_runner(self, runner: Runner, *, max_length: int | None = None) -> Engine:
        """The same model on another runner, keeping another number of a text's tokens; shares the tokenizer."""
        checkpoint = replace(self.checkpoint, max_length=max_length or self.checkpoint.max_length)
        return Engine(checkpoint, self.tokenizer, runner, self.token_budget)

    @property
    def dimensions(self) -> int:
        """Length of a vector that is not cut."""
        return self._runner.dimensions

    def encode(
        self,
        texts: str | Iterable[Text],
        *,
        output: Output = "numpy",
        show_progress: bool | None = None,
        **options: Unpack[Options],
    ) -> np.ndarray | Tensor | list[Any]:
        """The vectors of `embed` alone, as numpy, torch or list: [n, dimensions], or [dimensions] for one string."""
        check_offered("output", output, Output)
        vectors: np.ndarray = self.embed(texts, show_progress=show_progress, **options).vectors
        vectors = vectors[0] if isinstance(texts, str) else vectors
        if output == "numpy":
            return vectors
        return torch.from_numpy(vectors) if output == "torch" else list(vectors.tolist())

    def embed(
        self, texts: str | Iterable[Text], *, show_progress: bool | None = None, **options: Unpack[Options]
    ) -> Embeddings:
        """Embed a string, or any iterable of strings and of sequences of token ids, which are used as given.

        The options are those of `Options`. Without `ranges`, int8 and uint8 take them from these texts' own vectors, as
        sentence-transformers does. show_progress: a bar on stderr; None shows one where stderr is a terminal.
        Raises InputError, naming the text by its index, for what cannot be embedded.
        """
        plan = self.plan(**options)
        with _progress_bar(texts, show_progress) as advance:
            return _collect(self._blocks([texts] if isinstance(texts, str) else texts, plan, advance), plan)

    async def aencode(
        self, texts: str | Iterable[Text], *, deadline: float | None = None, **options: Unpack[Options]
    ) -> np.ndarray:
        """The vectors of `aembed` alone: [n, dimensions], or [dimensions] for one string."""
        vectors: np.ndarray = (await self.aembed(texts, deadline=deadline, **options)).vectors
        return vectors[0] if isinstance(texts, str) else vectors

    async def aembed(
        self, texts: str | Iterable[Text], *, deadline: float | None = None, **options: Unpack[Options]
    ) -> Embeddings:
        """As `embed`, with the same bits, in batches shared with every other call that waits.

        A call of one text waits for about one batch, however many texts the others have queued. Cancelling drops what
        has not run. deadline: seconds after which DeadlineError is raised and the rest is dropped.
        """
        plan = self.plan(**options)
        windows = self.read([texts] if isinstance(texts, str) else texts, plan)
        self._joiner = self._joiner or self.batcher()
        try:
            async with asyncio.timeout(deadline):
                done = await run_windows(self._joiner, windows, self.work(plan))
        except TimeoutError as error:
            raise DeadlineError(f"the deadline passed: {deadline} s; send fewer texts or allow more time") from error
        return self.collect(done, plan)

    def stream(
        self, texts: Iterable[Text], *, show_progress: bool | None = False, **options: Unpack[Options]
    ) -> Iterator[Embeddings]:
        """Embed an iterable of any length as it comes: blocks of consecutive texts, in order, a window of texts each.

        int8 and uint8 need `ranges` here, or a vector would depend on the block it is in.
        """
        plan = self.plan(**options)
        if plan.precision in ("int8", "uint8") and plan.ranges is None:
            raise OptionError(
                f"precision is {plan.precision!r} without ranges; pass ranges=[2, dimensions], the lowest and the "
                "highest value of each dimension over a sample"
            )
        return self._stream(texts, plan, show_progress)

    def _stream(self, texts: Iterable[Text], plan: Plan, show_progress: bool | None) -> Iterator[Embeddings]:
        with _progress_bar(texts, show_progress) as advance:
            for block in self._blocks(texts, plan, advance):
                vectors = quantize(block.vectors, plan.precision, plan.ranges)
                yield Embeddings(vectors, block.token_counts, block.truncated)

    def token_embeddings(self, texts: str | Iterable[Text], **options: Unpack[Options]) -> list[np.ndarray]:
        """The last hidden state of every token, prompt and special tokens included: [tokens, hidden] fp32 a text."""
        plan = self.plan(**options)
        if plan.long_text == "mean":
            raise OptionError("long_text is 'mean', which has no rows of tokens; use long_text='truncate'")
        rows: list[np.ndarray] = []
        for window in self._reader.windows([texts] if isinstance(texts, str) else texts, plan):
            sequences = window.to_run()
            found: dict[int, np.ndarray] = {}
            for batch in schedule([len(ids) for ids in sequences], self.token_budget):
                with window.naming(batch):
                    hidden = self._runner.hidden_states([sequences[i] for i in batch], adapter=plan.adapter)
                    found |= zip(batch, hidden, strict=True)
            rows += [found[i] for i in window.copies]
        return rows

    def describe(self) -> dict[str, Any]:
        """What was loaded and how it runs, in plain values."""
        running = {"dimensions": self.dimensions, "token_budget": self.token_budget, **self._runner.describe()}
        return self.checkpoint.describe() | running

    def plan(self, **options: Unpack[Options]) -> Plan:
        """The options checked against the model; OptionError names what it does not offer."""
        return make_plan(self.checkpoint, self.dimensions, **options)

    def read(self, texts: Iterable[Text], plan: Plan) -> Iterator[Window]:
        """Tokenize, a window of texts at a time."""
        return self._reader.windows(texts, plan)

    def work(self, plan: Plan) -> Work:
        """What a `Batcher` does with the sequences of `read`."""
        return Work(tuple(plan.shape.values()), partial(self._runner.embed, **plan.shape))

    def token_work(self, plan: Plan) -> Work:
        """The same for `token_embeddings`."""
        return Work(("tokens", plan.adapter), partial(self._runner.hidden_states, adapter=plan.adapter))

    def batcher(self, observe: Observe | None = None) -> Batcher:
        """What runs the calls of many callers in shared batches; `observe` is called after each batch."""
        return Batcher(self.token_budget, observe, parallelism=self.parallelism)

    def collect(self, done: Iterable[tuple[Window, Rows]], plan: Plan) -> Embeddings:
        """What a `Batcher` made of the windows of `read`; OutputError names a text whose vector is not finite."""
        blocks = []
        for window, rows in done:
            vectors = np.stack(list(rows))
            _check_finite(vectors[window.distinct], window, range(len(window.distinct)))
            blocks.append(_finish(window, vectors, plan))
        return _collect(blocks, plan)

    def _blocks(self, texts: Iterable[Text], plan: Plan, advance: Advance) -> Iterator[Embeddings]:
        """fp32 vectors, a window of texts at a time; the next is tokenized, and its batches are launched, meanwhile."""
        rows = np.empty((0, plan.dimensions), np.float32)  # of the sequences that the window runs
        done = 0
        for window, batch, launched in _held_back(self._launched(texts, plan), self._runner.depth):
            if done == 0:
                rows = np.empty((len(window.distinct), plan.dimensions), np.float32)
            with window.naming(batch):
                rows[batch] = launched.wait()
            _check_finite(rows[batch], window, batch)
            before, done, of = done, done + len(batch), len(rows)
            n_texts = len(window.truncated)
            tokens = sum(len(window.sequences[window.distinct[i]]) for i in batch)
            advance(done * n_texts // of - before * n_texts // of, tokens)
            if done == of:
                yield _finish(window, rows[window.copies], plan)
                done = 0

    def _launched(self, texts: Iterable[Text], plan: Plan) -> Iterator[tuple[Window, list[int], OnTheWay | Coming]]:
        """Every batch on its way, and which sequences of its window it holds."""
        for window in self._reader.windows_ahead(texts, plan):
            sequences = window.to_run()
            for batch in schedule([len(ids) for ids in sequences], self.token_budget):
                with window.naming(batch):
                    launched = self._runner.launch([sequences[i] for i in batch], **plan.shape)
                yield window, batch, launched


def _held_back(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """The same items, `depth - 1` behind; those that were held when an error came are given before it."""
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
    """fp32 vectors of a window's texts from those of its sequences."""
    if plan.long_text == "mean":
        rows = _mean_of_chunks(rows, window.owners, plan.normalize)
    token_counts = np.bincount(window.owners, weights=[len(ids) for ids in window.sequences]).astype(np.int64)
    return Embeddings(rows, token_counts, window.truncated)


def _collect(blocks: Iterable[Embeddings], plan: Plan) -> Embeddings:
    """Blocks of fp32 vectors as one, in the precision asked for."""
    blocks = [_no_texts(plan), *blocks]
    return Embeddings(
        quantize(np.concatenate([block.vectors for block in blocks]), plan.precision, plan.ranges),
        np.concatenate([block.token_counts for block in blocks]),
        np.concatenate([block.truncated for block in blocks]),
    )


def _check_finite(vectors: np.ndarray, window: Window, batch: Sequence[int]) -> None:
    """vectors: those of the sequences of `batch`, as places in what the window runs."""
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        index = min(window.text(batch[i]) for i in wrong.tolist())
        raise OutputError(
            f"the vector of text {index} is not finite; the weights may hold NaN, or values beyond the dtype's range: "
            "try dtype='float32' or 'bfloat16'"
        )


def _mean_of_chunks(rows: np.ndarray, owners: np.ndarray, normalize: bool) -> np.ndarray:
    """[chunks, dimensions] -> [texts, dimensions]: the mean of each text's chunks, L2-normalized where asked."""
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    means = np.add.reduceat(rows, starts, axis=0) / np.diff(starts, append=len(owners))[:, None].astype(np.float32)
    if normalize:
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return means


def _no_texts(plan: Plan) -> Embeddings:
    return Embeddings(np.zeros((0, plan.dimensions), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))


@contextlib.contextmanager
def _progress_bar(texts: object, show: bool | None) -> Iterator[Advance]:
    """A bar over texts with tokens per second beside it; `show` None draws it on a terminal only."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if not (terminal if show is None else show):
        yield lambda done_texts, done_tokens: None
        return
    tokens, start = 0, time.perf_counter()
    with tqdm(total=_expected(texts), unit="text", leave=False) as bar:

        def advance(done_texts: int, done_tokens: int) -> None:
            nonlocal tokens
            tokens += done_tokens
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
            bar.total = _expected(texts)
            bar.update(done_texts)

        yield advance


def _expected(texts: object) -> int | None:
    """How many texts there are, or will be by their own hint; an iterator's is of what it has left."""
    return None if isinstance(texts, str | Iterator) else operator.length_hint(texts) or None
