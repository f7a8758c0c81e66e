"""Engine: texts in, vectors out. Take a window of texts, schedule it into batches, run them, put the rows in order."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Unpack

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unpadded.aio import Joiner, Rows, Work, run_windows
from unpadded.checkpoint import Checkpoint
from unpadded.errors import DeadlineError, OptionError, OutputError
from unpadded.options import Options, Plan, check_offered, make_plan
from unpadded.output import quantize
from unpadded.runner import OnTheWay, Runner
from unpadded.scheduler import schedule
from unpadded.tokenizer import Tokenizer
from unpadded.window import Text, Window, WindowReader

Output = Literal["numpy", "torch", "list"]
Advance = Callable[[int, int], object]  # called with the texts and the tokens that were done


@dataclass(frozen=True)
class Embeddings:
    """Vectors, and what each was made of."""

    vectors: np.ndarray  # [n, dimensions] in the precision asked for
    token_counts: np.ndarray  # [n] int64: tokens embedded, prompt and special tokens included
    truncated: np.ndarray  # [n] bool: the text had more


class Engine:
    """An encoder with its tokenizer and pooling. `unpadded.load` makes one."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer, runner: Runner, token_budget: int) -> None:
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.token_budget = token_budget
        self._reader = WindowReader(checkpoint, tokenizer)
        self.runner = runner
        self._joiner: Joiner | None = None  # set by the first call of aembed

    def with_runner(self, runner: Runner, *, max_length: int | None = None) -> Engine:
        """The same model on another runner, keeping another number of a text's tokens; shares the tokenizer."""
        checkpoint = replace(self.checkpoint, max_length=max_length or self.checkpoint.max_length)
        return Engine(checkpoint, self.tokenizer, runner, self.token_budget)

    @property
    def dimensions(self) -> int:
        """Length of a vector that is not cut."""
        return self.runner.dimensions

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
        self._joiner = self._joiner or Joiner(self.token_budget)
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
            found: dict[int, np.ndarray] = {}
            for batch in schedule([len(ids) for ids in window.sequences], self.token_budget):
                found |= zip(batch, self.runner.token_rows([window.sequences[i] for i in batch]), strict=True)
            rows += [found[i] for i in range(len(found))]
        return rows

    def describe(self) -> dict[str, Any]:
        """What was loaded and how it runs, in plain values."""
        running = {"dimensions": self.dimensions, "token_budget": self.token_budget, **self.runner.describe()}
        return self.checkpoint.describe() | running

    def plan(self, **options: Unpack[Options]) -> Plan:
        """The options checked against the model; OptionError names what it does not offer."""
        return make_plan(self.checkpoint, self.dimensions, **options)

    def read(self, texts: Iterable[Text], plan: Plan) -> Iterator[Window]:
        """Tokenise, a window of texts at a time."""
        return self._reader.windows(texts, plan)

    def work(self, plan: Plan) -> Work:
        """What a `Joiner` does with the sequences of `read`."""
        run = partial(
            self.runner.embed, layer_norm=plan.layer_norm, dimensions=plan.dimensions, normalize=plan.normalize
        )
        return Work((plan.layer_norm, plan.dimensions, plan.normalize), run)

    def token_work(self) -> Work:
        """The same for `token_embeddings`."""
        return Work("tokens", self.runner.token_rows)

    def collect(self, done: Iterable[tuple[Window, Rows]], plan: Plan) -> Embeddings:
        """What a `Joiner` made of the windows of `read`; OutputError names a text whose vector is not finite."""
        blocks = []
        for window, rows in done:
            vectors = np.stack(list(rows))
            _check_finite(vectors, list(range(len(vectors))), window)
            blocks.append(_finish(window, vectors, plan))
        return _collect(blocks, plan)

    def _blocks(self, texts: Iterable[Text], plan: Plan, advance: Advance) -> Iterator[Embeddings]:
        """fp32 vectors, a window of texts at a time; the next one is tokenised while this one runs."""
        for window in self._reader.windows_ahead(texts, plan):
            n_texts, n_sequences = len(window.truncated), len(window.sequences)
            lengths = np.array([len(ids) for ids in window.sequences], np.int64)
            rows = np.empty((n_sequences, plan.dimensions), np.float32)
            done = 0
            for batch, vectors in self._batches(window, lengths.tolist(), plan):
                rows[batch] = vectors
                _check_finite(rows, batch, window)
                before, done = done * n_texts // n_sequences, done + len(batch)
                advance(done * n_texts // n_sequences - before, int(lengths[batch].sum()))
            yield _finish(window, rows, plan)

    def _batches(self, window: Window, lengths: list[int], plan: Plan) -> Iterator[tuple[list[int], np.ndarray]]:
        """Which sequences, and their vectors, batch by batch; one batch runs while the next is packed."""
        behind: tuple[list[int], OnTheWay] | None = None
        for batch in schedule(lengths, self.token_budget):
            launched = self.runner.launch(
                [window.sequences[i] for i in batch],
                layer_norm=plan.layer_norm,
                dimensions=plan.dimensions,
                normalize=plan.normalize,
            )
            if behind is not None:
                yield behind[0], behind[1].wait()
            behind = batch, launched
        if behind is not None:
            yield behind[0], behind[1].wait()


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


def _check_finite(rows: np.ndarray, batch: list[int], window: Window) -> None:
    finite = np.isfinite(rows[batch]).all(axis=1)
    if not finite.all():
        index = window.first_index + min(window.owners[i] for i, ok in zip(batch, finite, strict=True) if not ok)
        raise OutputError(
            f"the vector of text {index} is not finite; the weights may hold NaN, or values beyond the dtype's range: "
            "try dtype='float32' or 'bfloat16'"
        )


def _mean_of_chunks(rows: np.ndarray, owners: np.ndarray, normalize: bool) -> np.ndarray:
    """[chunks, dimensions] -> [texts, dimensions]: the mean of each text's chunks, L2-normalised where asked."""
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
    total = None if isinstance(texts, str) or not hasattr(texts, "__len__") else len(texts)
    tokens, start = 0, time.perf_counter()
    with tqdm(total=total, unit="text", disable=None if show is None else not show, leave=False) as bar:

        def advance(done_texts: int, done_tokens: int) -> None:
            nonlocal tokens
            tokens += done_tokens
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
            bar.update(done_texts)

        yield advance
