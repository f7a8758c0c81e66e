"""Engine: embeds texts with a loaded model."""

import asyncio
import contextlib
import operator
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Any, Literal, Self, TypeAlias, Unpack, get_args, overload

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from unpadded.checkpoint.reader import Checkpoint
from unpadded.errors import DeadlineError, InputError, OptionError
from unpadded.execution.batcher import Batcher, Rows, run_windows
from unpadded.execution.pipeline import MIN_GROUP_TOKENS, WINDOW_BATCHES, Advance, EmbeddingPipeline
from unpadded.execution.results import Embeddings, Ranked, Spans, Sparse, TokenVectors, join, ranked
from unpadded.execution.token_vectors import TokenKeywords
from unpadded.options import EmbedKeywords, EncodeKeywords, Plan, ScoreKeywords, Truncation, check_choice
from unpadded.quantization import quantize
from unpadded.tokenization.tokenizer import Pair, Tokenizer
from unpadded.tokenization.windows import Text, Window, iterate

Output = Literal["numpy", "torch", "list"]
NARROW_COLUMNS = 70
NARROW_BAR = "{percentage:3.0f}%|{bar}|{remaining}{postfix}"  # fits 40 columns
Texts: TypeAlias = str | Iterable[Text]


class Engine:
    """A loaded model with its tokenizer; `unpadded.load` returns one.

    The keyword arguments of `encode`, `embed`, `aencode`, `aembed`, `stream` and `token_embeddings` are described in
    `unpadded.options.EncodeOptions`. Texts are strings, or sequences of token ids, which are embedded unchanged.
    """

    def __init__(self, pipeline: EmbeddingPipeline, reload: Callable[[], Self] | None = None) -> None:
        self._pipeline = pipeline  # for the other packages of this project
        self._reload = reload
        self._batcher: Batcher | None = None  # set by the first call of aembed, as is the next
        self._batcher_process = 0

    @property
    def checkpoint(self) -> Checkpoint:
        """The model's configuration: its name, prompts, max_length and more."""
        return self._pipeline.checkpoint

    @property
    def tokenizer(self) -> Tokenizer:
        return self._pipeline.tokenizer

    @property
    def dimensions(self) -> int:
        """Length of a vector unless `dimensions=` cuts it."""
        return self._pipeline.backend.dimensions

    def describe(self) -> dict[str, Any]:
        """Return the model's configuration and how it runs, as plain values."""
        running = {"dimensions": self.dimensions, "token_budget": self._pipeline.token_budget}
        return self.checkpoint.describe() | running | self._pipeline.backend.describe()

    def close(self) -> None:
        """Stop the threads of `aembed` and the worker processes. An engine of one device can still be used."""
        batcher, self._batcher = self._batcher, None
        if batcher is not None and self._batcher_process == os.getpid():
            batcher.close()
        self._pipeline.backend.close()

    def __reduce__(self) -> tuple[Callable[[], Self], tuple[()]]:
        """Pickle how the model was loaded: from which folder or hub id, with which options."""
        if self._reload is None:
            raise OptionError(f"the engine of a module cannot be pickled: {self.checkpoint.name}; pickle the module")
        return self._reload, ()

    def __deepcopy__(self, memo: object = None) -> Self:
        return type(self)(self._pipeline, self._reload)  # the weights are shared

    __copy__ = __deepcopy__

    def __repr__(self) -> str:
        checkpoint, running = self.checkpoint, self._pipeline.backend.describe()
        return (
            f"Engine({checkpoint.name!r}, {checkpoint.spec.family}, {self.dimensions} dimensions, "
            f"{checkpoint.max_length} tokens, {running['device']} {running['dtype']})"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @overload
    def encode(
        self, texts: Texts, *, output: Literal["numpy"] = ..., **options: Unpack[EmbedKeywords]
    ) -> np.ndarray: ...
    @overload
    def encode(self, texts: Texts, *, output: Literal["torch"], **options: Unpack[EmbedKeywords]) -> Tensor: ...
    @overload
    def encode(self, texts: Texts, *, output: Literal["list"], **options: Unpack[EmbedKeywords]) -> list[Any]: ...
    def encode(
        self, texts: Texts, *, output: Output = "numpy", **options: Unpack[EmbedKeywords]
    ) -> np.ndarray | Tensor | list[Any]:
        """Return the vectors of `embed`, as numpy, torch or list: [n, dimensions], or [dimensions] for one string."""
        check_choice("output", output, get_args(Output))
        vectors: np.ndarray = self.embed(texts, **options).vectors
        vectors = vectors[0] if isinstance(texts, str) else vectors
        if output == "numpy":
            return vectors
        return torch.from_numpy(vectors) if output == "torch" else list(vectors.tolist())

    def embed(
        self, texts: Texts, *, show_progress: bool | None = None, **options: Unpack[EncodeKeywords]
    ) -> Embeddings:
        """Embed a string or any iterable of texts.

        Without `ranges`, int8 and uint8 use the ranges of these texts' own vectors, as sentence-transformers does.
        show_progress: draw a bar on stderr; None draws it if stderr is a terminal.
        Raises InputError, with the index of the text, for a text that cannot be embedded.
        """
        plan = self._pipeline.plan(**options)
        try:
            with _progress_bar(texts, show_progress) as advance:
                return join(self._pipeline.blocks(_as_texts(texts), plan, advance), plan)
        except InputError as error:
            raise error.with_traceback(None) from None  # without the frames of generators

    async def aencode(
        self, texts: Texts, *, deadline: float | None = None, **options: Unpack[EncodeKeywords]
    ) -> np.ndarray:
        """Return the vectors of `aembed`: [n, dimensions], or [dimensions] for one string."""
        vectors = (await self._abatch(_as_texts(texts), self._pipeline.plan(**options), deadline)).vectors
        return vectors[0] if isinstance(texts, str) else vectors

    async def aembed(
        self, texts: Texts, *, deadline: float | None = None, **options: Unpack[EncodeKeywords]
    ) -> Embeddings:
        """Embed texts as `embed` does, in batches shared with all concurrent calls.

        A call of one text waits for about one batch, however many texts other calls have queued. Cancelling drops
        what has not run. deadline: seconds after which DeadlineError is raised and the rest is dropped.
        """
        return await self._abatch(_as_texts(texts), self._pipeline.plan(**options), deadline)

    async def _abatch(self, texts: Iterable[Text | Pair], plan: Plan, deadline: float | None) -> Embeddings:
        only = texts[0] if isinstance(texts, list) and len(texts) == 1 else None
        size = len(only) if isinstance(only, str) else None
        windows = self._pipeline.reader.windows(texts, plan)
        if self._batcher is None or self._batcher_process != os.getpid():  # a fork has none of its threads
            self._batcher, self._batcher_process = self._pipeline.batcher(), os.getpid()
        try:
            async with asyncio.timeout(deadline):
                done = await run_windows(self._batcher, windows, self._pipeline.work(plan), size=size)
        except InputError as error:
            raise error.with_traceback(None) from None
        except TimeoutError as error:
            raise DeadlineError(f"the deadline passed: {deadline} s; send fewer texts or allow more time") from error
        return self._pipeline.collect(done, plan)

    def stream(
        self, texts: Iterable[Text], *, show_progress: bool | Advance | None = False, **options: Unpack[EncodeKeywords]
    ) -> Iterator[Embeddings]:
        """Embed an iterable of any length lazily: yield blocks of consecutive texts, in order.

        int8 and uint8 require `ranges`, because a vector would otherwise depend on its block. show_progress: as in
        `embed`, or a function that is called with the texts and tokens of each batch where no bar can be drawn.
        """
        plan = self._pipeline.plan(**options)
        if plan.precision in ("int8", "uint8") and plan.ranges is None:
            raise OptionError(
                f"precision is {plan.precision!r} without ranges; pass ranges=[2, dimensions], the lowest and the "
                "highest value of each dimension over a sample"
            )
        return self._stream(texts, plan, show_progress)

    def _stream(self, texts: Iterable[Text], plan: Plan, show_progress: bool | Advance | None) -> Iterator[Embeddings]:
        with _progress_bar(texts, show_progress) as advance:
            for block in self._pipeline.blocks(texts, plan, advance):
                vectors = quantize(block.vectors, plan.precision, plan.ranges)
                yield Embeddings(vectors, block.token_counts, block.truncated)

    def encode_spans(
        self,
        texts: str | Iterable[str],
        *,
        spans: Iterable[Any] | None = None,
        span_tokens: int = 256,
        overlap: int = 0,
        task: str | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        show_progress: bool | None = None,
    ) -> Spans:
        """Embed spans of texts, each as the mean of its tokens after one pass over the whole text (late chunking).

        spans: for each text, a sequence of (start, end) in characters, in any order; for one string, its own. Without
        them, texts are cut at ends of sentences into spans of about `span_tokens` tokens at most, of which consecutive
        ones share up to `overlap`. The prompt is context and in no span. A text longer than max_length is read in
        sections that share 512 tokens, at most half of one, and a span is computed where it has most context.
        Raises OptionError for a model without mean pooling, InputError with the indices of text and span.
        """
        if isinstance(texts, str):
            texts, spans = [texts], None if spans is None else [spans]
        pipeline, cut = self._pipeline, (span_tokens, overlap) if spans is None else None
        plan = pipeline.span_plan(cut, task=task, prompt=prompt, dimensions=dimensions, normalize=normalize)
        texts = iterate(texts)
        items: Iterable[Any] = ((text, ()) for text in texts) if spans is None else zip_longest(texts, spans)
        with _progress_bar(texts, show_progress) as advance:
            return pipeline.collect_spans(pipeline.rows(items, plan, advance), plan)

    def _windows(self, texts: Iterable[str], plan: Plan, show: bool | Advance | None) -> Iterator[tuple[Window, Rows]]:
        """Yield windows and their rows in bounded memory, for bulk jobs."""
        items: Iterable[Any] = ((text, ()) for text in texts) if plan.vector_options.rows == "span" else texts
        tokens = max(WINDOW_BATCHES * self._pipeline.token_budget, MIN_GROUP_TOKENS)
        with _progress_bar(texts, show) as advance:
            yield from self._pipeline.rows(items, plan, advance, window_tokens=tokens)

    def score(
        self, pairs: Iterable[Pair | str], *, show_progress: bool | None = None, **options: Unpack[ScoreKeywords]
    ) -> np.ndarray:
        """Score pairs of texts, such as (query, document), or single texts: [n] fp32, [n, labels] if there are several.

        activation: "auto" (the checkpoint's, else sigmoid for one label), "sigmoid", "softmax" or "none" (the logits).
        prompt: put before the first text of a pair. truncation: "right" shortens the longer text first, "error" raises.
        Raises OptionError for a model without scores, and InputError, with the index, for a pair that cannot be scored.
        """
        plan, activation = self._pipeline.score_plan(**options)
        with _progress_bar(pairs, show_progress) as advance:
            return activation(join(self._pipeline.blocks(pairs, plan, advance), plan).vectors)

    async def ascore(
        self, pairs: Iterable[Pair | str], *, deadline: float | None = None, **options: Unpack[ScoreKeywords]
    ) -> np.ndarray:
        """Score as `score` does, in batches shared with all concurrent calls. deadline: as in `aembed`."""
        plan, activation = self._pipeline.score_plan(**options)
        return activation((await self._abatch(pairs, plan, deadline)).vectors)

    def rank(
        self, query: str, documents: Iterable[str], *, top_k: int | None = None, **options: Unpack[ScoreKeywords]
    ) -> list[Ranked]:
        """Return the indices and scores of the `top_k` best documents, or of all; options: those of `score`."""
        return ranked(self.score([(query, document) for document in documents], **options), top_k)

    def encode_sparse(
        self,
        texts: Texts,
        *,
        top_k: int | None = None,
        task: str | None = None,
        prompt: str | None = None,
        truncation: Truncation = "right",
        show_progress: bool | None = None,
    ) -> Sparse:
        """Return weights of vocabulary entries for each text; a string is one text.

        top_k: keep the heaviest weights of each text, of equal ones those with the lowest ids. The other arguments are
        those of `embed`. Raises OptionError for a model without a head for sparse weights.
        """
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise OptionError(f"top_k is not a positive whole number: {top_k!r}; pass one such as 256, or omit it")
        plan = self._pipeline.sparse_plan(task, prompt, truncation)
        with _progress_bar(texts, show_progress) as advance:
            return self._pipeline.sparse(self._pipeline.rows(_as_texts(texts), plan, advance), plan, top_k)

    def encode_tokens(
        self, texts: Texts, *, show_progress: bool | None = None, **options: Unpack[TokenKeywords]
    ) -> TokenVectors:
        """Return the token vectors of each text, for late interaction with `unpadded.maxsim`.

        kind: "document" or "query": which prompt, length, expansion and dropped tokens of the checkpoint apply.
        pool_factor: of a document, keep about one vector in so many, the means of clusters; needs scipy.
        prompt: put before every text instead of the checkpoint's. truncation: "right", or "error", which raises.
        Raises OptionError for a model without token vectors, and InputError, with the index, for a text.
        """
        plan, reduce = self._pipeline.token_plan(**options)
        with _progress_bar(texts, show_progress) as advance:
            return self._pipeline.collect_tokens(self._pipeline.rows(_as_texts(texts), plan, advance), plan, reduce)

    def encode_all(self, texts: Texts, *, show_progress: bool | None = None) -> tuple[Embeddings, Sparse, TokenVectors]:
        """Return vectors, sparse weights and token vectors of texts from one pass, of a model such as bge-m3.

        They are those of `embed`, `encode_sparse` and `encode_tokens`. Raises OptionError for other models.
        """
        with _progress_bar(texts, show_progress) as advance:
            return self._pipeline.all(_as_texts(texts), advance)

    def token_embeddings(self, texts: Texts, **options: Unpack[EncodeKeywords]) -> list[np.ndarray]:
        """Return the last hidden states of each text, prompt and special tokens included: [tokens, hidden] fp32."""
        with _progress_bar(texts, False) as advance:
            return self._pipeline.token_embeddings(_as_texts(texts), self._pipeline.plan(**options), advance)


def _as_texts(texts: Texts) -> Iterable[Text]:
    return [texts] if isinstance(texts, str) else texts


@contextlib.contextmanager
def _progress_bar(texts: object, show: bool | Advance | None) -> Iterator[Advance]:
    """Draw a bar with tokens per second. show: None draws it on a terminal or in a notebook only.

    A function draws it there too, and is called elsewhere.
    """
    notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    terminal = notebook or (sys.stderr is not None and sys.stderr.isatty())
    if not (terminal if show is None or callable(show) else show):
        yield show if callable(show) else lambda done_texts, done_tokens: None
        return
    tokens, start = 0, time.perf_counter()
    narrow = NARROW_BAR if shutil.get_terminal_size().columns < NARROW_COLUMNS else None
    with tqdm(total=_expected_texts(texts), unit="text", leave=False, bar_format=narrow, postfix="first batch") as bar:

        def advance(done_texts: int, done_tokens: int) -> None:
            nonlocal tokens
            tokens += done_tokens
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
            bar.total = _expected_texts(texts)  # a length hint can change as the texts are read
            bar.update(done_texts)

        yield advance


def _expected_texts(texts: object) -> int | None:
    """The number of texts, or None if it is unknown. An iterator's length hint counts only what remains."""
    return None if isinstance(texts, str | Iterator) else operator.length_hint(texts) or None
