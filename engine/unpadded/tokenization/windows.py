"""Iterables of texts -> windows: the texts that are tokenized and scheduled together."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from unpadded.checkpoint.reader import Checkpoint
from unpadded.errors import InputError, TooLargeError, WorkerError
from unpadded.options import Plan
from unpadded.tokenization.tokenizer import Tokenizer

logger = logging.getLogger("unpadded")

Text: TypeAlias = str | Sequence[int] | np.ndarray

# long_text="mean" as in nomic's client (gpt4all): tokens of a chunk, including prompt and special tokens, and of an
# overlap.
CHUNK_TOKENS = 2048
CHUNK_OVERLAP = 8
NAMED_TEXTS = 8  # maximum number of texts of a batch that an error names


class TextGroup(NamedTuple):
    """The texts of a window."""

    first_index: int  # index of the first text, among all texts
    texts: list[Text]
    last: bool  # no texts follow; if False, some may


class TextTokens(NamedTuple):
    """Token ids of one text."""

    sequences: list[np.ndarray]  # one, or one per chunk; each [tokens] int32
    truncated: bool


class WindowText(NamedTuple):
    """One text of a window."""

    sequences: range  # indices of its sequences in the window: one, or one per chunk
    tokens: int  # in all its sequences
    truncated: bool


@dataclass(frozen=True)
class Window:
    """Consecutive texts and their sequences of token ids, which equal texts share."""

    first_index: int  # index of the first text, among all texts
    texts: list[WindowText]
    sequences: list[np.ndarray]  # each [tokens] int32
    last: bool  # no texts follow; if False, some may

    @property
    def token_counts(self) -> np.ndarray:
        """Number of tokens of each text: [texts] int64."""
        return np.array([text.tokens for text in self.texts], np.int64)

    @property
    def truncated(self) -> np.ndarray:
        """Whether each text was truncated: [texts] bool."""
        return np.array([text.truncated for text in self.texts])

    @property
    def first_sequences(self) -> list[int]:
        """Index of each text's first sequence, which is its only one unless it is split into chunks."""
        return [text.sequences.start for text in self.texts]

    def text_index(self, sequence: int) -> int:
        """Return the index, among all texts, of the first text that has this sequence."""
        return next(index for index, text in enumerate(self.texts, self.first_index) if sequence in text.sequences)

    @contextlib.contextmanager
    def naming(self, batch: Sequence[int]) -> Iterator[None]:
        """Add the texts of a batch to an error raised inside. batch: indices into `sequences`."""
        try:
            yield
        except TooLargeError as error:
            raise error.at(self.text_index(batch[error.index])) from None
        except Exception as error:  # of any type: it is raised again
            texts = sorted({self.text_index(sequence) for sequence in batch})
            more = f" and {len(texts) - NAMED_TEXTS} more" if len(texts) > NAMED_TEXTS else ""
            named = f"raised for text{'s' * (len(texts) > 1)} {', '.join(map(str, texts[:NAMED_TEXTS]))}{more}"
            if isinstance(error, WorkerError):
                raise WorkerError(f"{error} ({named})") from error
            error.add_note(named)
            raise


class WindowReader:
    """Splits texts into windows and tokenizes them for one checkpoint. Each warning is logged once per reader."""

    # A window ends at either limit: it has enough texts of similar length to fill batches, and fits into memory.
    max_texts = 4096
    max_size = 1 << 22  # characters, or token ids

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
        self._checkpoint = checkpoint
        self._tokenizer = tokenizer
        self._warned_about_task = False
        self._warned_about_length = False

    def windows(self, texts: Iterable[Text], plan: Plan) -> Iterator[Window]:
        """Yield one window after another, reading texts as needed. InputError names a text by its index."""
        return (self._tokenize(group, plan) for group in self._groups(texts))

    def windows_ahead(self, texts: Iterable[Text], plan: Plan) -> Iterator[Window]:
        """Yield the same windows, each tokenized in a thread while the one before is used.

        `texts` is iterated in the caller's thread.
        """
        with ThreadPoolExecutor(1, "unpadded-tokenize") as thread:
            previous: Future[Window] | None = None
            for group in self._groups(texts):
                if group.last and previous is None:  # starting a thread costs more than tokenizing one query
                    yield self._tokenize(group, plan)
                    return
                following = thread.submit(self._tokenize, group, plan)
                if previous is not None:
                    yield previous.result()
                previous = following
            if previous is not None:
                yield previous.result()

    def _groups(self, texts: Iterable[Text]) -> Iterator[TextGroup]:
        if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
            raise InputError(f"texts are not a collection: {type(texts).__name__}; pass a list of strings")
        group: list[Text] = []
        first_index = size = 0
        for text in texts:
            group.append(text)
            size += len(text) if hasattr(text, "__len__") else 1
            if len(group) == self.max_texts or size >= self.max_size:
                yield TextGroup(first_index, group, last=False)
                first_index += len(group)
                group, size = [], 0
        if group:
            yield TextGroup(first_index, group, last=True)

    def _tokenize(self, group: TextGroup, plan: Plan) -> Window:
        """Tokenize each distinct text once."""
        keys: list[str | bytes] = []
        distinct: dict[str | bytes, tuple[int, str | np.ndarray]] = {}  # first index, text or ids
        for index, text in enumerate(group.texts, group.first_index):
            checked = text if isinstance(text, str) else self._checked_ids(text, index)
            keys.append(checked if isinstance(checked, str) else checked.tobytes())
            distinct.setdefault(keys[-1], (index, checked))
        tokens = self._tokens(dict(distinct.values()), plan)

        sequences: list[np.ndarray] = []
        texts: dict[str | bytes, WindowText] = {}
        for key, (index, _) in distinct.items():
            found = tokens[index]
            places = range(len(sequences), len(sequences) + len(found.sequences))
            texts[key] = WindowText(places, sum(map(len, found.sequences)), found.truncated)
            sequences += found.sequences
        self._warn_beyond_trained_length(max(map(len, sequences)))
        return Window(group.first_index, [texts[key] for key in keys], sequences, group.last)

    def _tokens(self, texts: dict[int, str | np.ndarray], plan: Plan) -> dict[int, TextTokens]:
        """Return the tokens of texts or given ids, both by the text's index among all texts."""
        strings = {index: text for index, text in texts.items() if isinstance(text, str)}
        found = {index: TextTokens([ids], False) for index, ids in texts.items() if not isinstance(ids, str)}
        self._warn_without_task(strings, plan.prompt)
        if plan.long_text == "mean":
            chunks = self._tokenizer.chunks(
                list(strings.values()),
                prompt=plan.prompt,
                chunk_length=min(CHUNK_TOKENS, self._checkpoint.max_length),
                overlap=CHUNK_OVERLAP,
                indices=list(strings),
            )
            return found | {index: TextTokens(ids, False) for index, ids in zip(strings, chunks, strict=True)}
        rows = self._tokenizer.encode(
            list(strings.values()),
            prompt=plan.prompt,
            max_length=self._checkpoint.max_length,
            truncation=plan.truncation,
            indices=list(strings),
        )
        return found | {index: TextTokens([row.ids], row.truncated) for index, row in zip(strings, rows, strict=True)}

    def _checked_ids(self, ids: Text, index: int) -> np.ndarray:
        """Return token ids as [tokens] int32; InputError if the model cannot embed them."""
        try:
            array = np.asarray(ids)
        except ValueError:
            array = np.empty((0, 0))
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise InputError(f"text {index} is neither a string nor token ids: {ids!r:.80}; pass one of them")
        vocabulary, max_length = self._checkpoint.spec.vocabulary, self._checkpoint.max_length
        if not 1 <= array.size <= max_length:
            raise InputError(f"text {index} has {array.size} token ids; pass 1 to {max_length}, or set max_length")
        if array.min() < 0 or array.max() >= vocabulary:
            wrong = array[(array < 0) | (array >= vocabulary)][0]
            raise InputError(f"text {index} has a token id out of range: {wrong}; use ids from 0 to {vocabulary - 1}")
        return array.astype(np.int32)

    def _warn_without_task(self, texts: dict[int, str], prompt: str) -> None:
        """Warn of a text without a task prefix, by its index: models trained with one embed such texts worse.

        The warning does not quote the text, because it also appears in the log of a server.
        """
        prompts = self._checkpoint.prompts
        if self._warned_about_task or prompt or "search_query" not in prompts:
            return
        known = tuple(prompts.values())
        for index, text in texts.items():
            if not text.startswith(known):
                self._warned_about_task = True
                logger.warning(
                    "%s expects a task before every text, but text %d has none; pass task=%s",
                    self._checkpoint.name,
                    index,
                    " or task=".join(map(repr, prompts)),
                )
                return

    def _warn_beyond_trained_length(self, tokens: int) -> None:
        rotary = self._checkpoint.spec.rotary
        if self._warned_about_length or rotary is None or rotary.scaling_factor is not None:
            return
        if tokens > rotary.trained_length:
            self._warned_about_length = True
            logger.warning(
                "a text of %d tokens is longer than the %d tokens with which %s was trained, and its rotary embedding "
                "is not scaled; load with rotary_scaling_factor=2 for dynamic-NTK scaling, or max_length=%d",
                tokens,
                rotary.trained_length,
                self._checkpoint.name,
                rotary.trained_length,
            )
