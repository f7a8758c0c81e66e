"""Any iterable of texts -> windows: as many texts as are looked at together, tokenised."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from unpadded.checkpoint import Checkpoint
from unpadded.errors import InputError
from unpadded.options import Plan
from unpadded.tokenizer import Tokenizer, Tokens

logger = logging.getLogger("unpadded")

Text: TypeAlias = str | Sequence[int] | np.ndarray

# Enough texts of like length to fill batches, few enough to hold.
WINDOW_TEXTS = 4096
WINDOW_LENGTH = 1 << 22  # characters, or token ids
# The chunked mean of nomic's client (gpt4all): tokens of a chunk, prompt and specials included, and of an overlap.
CHUNK_TOKENS = 2048
CHUNK_OVERLAP = 8


@dataclass(frozen=True)
class Window:
    """Consecutive texts as id sequences: one a text, or one a chunk."""

    first_index: int  # of its first text, among all
    sequences: list[np.ndarray]  # each [tokens] int32
    owners: np.ndarray  # [sequences], the text of each, counted from 0
    truncated: np.ndarray  # [texts] bool: the text had more tokens


class WindowReader:
    """Tokenises for one checkpoint. Says what a user should know once in its life."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
        self._checkpoint = checkpoint
        self._tokenizer = tokenizer
        self._said_task = False
        self._said_length = False

    def windows(self, texts: Iterable[Text], plan: Plan) -> Iterator[Window]:
        """Take texts as they come, a window at a time. InputError names a text by its index."""
        return (self._tokenise(window, first_index, plan) for first_index, window in _gathered(texts))

    def windows_ahead(self, texts: Iterable[Text], plan: Plan) -> Iterator[Window]:
        """The same, each tokenised in a thread while the one before is used. `texts` is iterated in the caller's."""
        with ThreadPoolExecutor(1, "unpadded-tokenise") as thread:
            behind: Future[Window] | None = None
            for first_index, window in _gathered(texts):
                coming = thread.submit(self._tokenise, window, first_index, plan)
                if behind is not None:
                    yield behind.result()
                behind = coming
            if behind is not None:
                yield behind.result()

    def _tokenise(self, texts: list[Text], first_index: int, plan: Plan) -> Window:
        sequences: list[np.ndarray] = []
        owners: list[int] = []
        truncated = np.zeros(len(texts), bool)
        for are_strings, run in itertools.groupby(enumerate(texts), lambda pair: isinstance(pair[1], str)):
            places, members = zip(*run, strict=True)
            start = places[0]
            if not are_strings:
                parts = [[self._checked(ids, first_index + i)] for i, ids in zip(places, members, strict=True)]
            elif plan.long_text == "mean":
                parts = self._chunks(members, first_index + start, plan)
            else:
                found = self._encode(members, first_index + start, plan)
                truncated[start : start + len(found)] = [tokens.truncated for tokens in found]
                parts = [[tokens.ids] for tokens in found]
            for place, part in zip(places, parts, strict=True):
                sequences += part
                owners += [place] * len(part)
        self._warn_beyond_trained(max(map(len, sequences)))
        return Window(first_index, sequences, np.array(owners), truncated)

    def _encode(self, texts: Sequence[str], first_index: int, plan: Plan) -> list[Tokens]:
        self._warn_without_task(texts, plan.prompt)
        return self._tokenizer.encode(
            texts,
            prompt=plan.prompt,
            max_length=self._checkpoint.max_length,
            truncation=plan.truncation,
            first_index=first_index,
        )

    def _chunks(self, texts: Sequence[str], first_index: int, plan: Plan) -> list[list[np.ndarray]]:
        self._warn_without_task(texts, plan.prompt)
        return self._tokenizer.chunks(
            texts,
            prompt=plan.prompt,
            chunk_length=min(CHUNK_TOKENS, self._checkpoint.max_length),
            overlap=CHUNK_OVERLAP,
            first_index=first_index,
        )

    def _checked(self, ids: Text, index: int) -> np.ndarray:
        """Token ids given by the caller: [tokens] int32, used as they are."""
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
            raise InputError(f"text {index} has a token id out of range: {wrong}; ids go from 0 to {vocabulary - 1}")
        return array.astype(np.int32)

    def _warn_without_task(self, texts: Sequence[str], prompt: str) -> None:
        """Nomic's models are trained with a task before every text; without one their vectors are worse, silently."""
        prompts = self._checkpoint.prompts
        if self._said_task or prompt or "search_query" not in prompts:
            return
        known = tuple(prompts.values())
        for text in texts:
            if not text.startswith(known):
                self._said_task = True
                logger.warning(
                    "%s expects a task before every text and %.40r has none; pass task=%s",
                    self._checkpoint.name,
                    text,
                    " or task=".join(map(repr, prompts)),
                )
                return

    def _warn_beyond_trained(self, longest: int) -> None:
        rotary = self._checkpoint.spec.rotary
        if self._said_length or rotary is None or rotary.scaling_factor is not None or longest <= rotary.trained_length:
            return
        self._said_length = True
        logger.warning(
            "a text of %d tokens is longer than the %d %s was trained on, and its rotary embedding is not scaled; "
            "load with rotary_scaling_factor=2 for dynamic-NTK scaling, or max_length=%d",
            longest,
            rotary.trained_length,
            self._checkpoint.name,
            rotary.trained_length,
        )


def _gathered(texts: Iterable[Text]) -> Iterator[tuple[int, list[Text]]]:
    """The index of the first text of each window, and its texts."""
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise InputError(f"texts are not a collection: {type(texts).__name__}; pass a list of strings")
    window: list[Text] = []
    first_index = length = 0
    for text in texts:
        window.append(text)
        length += len(text) if hasattr(text, "__len__") else 1
        if len(window) == WINDOW_TEXTS or length >= WINDOW_LENGTH:
            yield first_index, window
            first_index += len(window)
            window, length = [], 0
    if window:
        yield first_index, window
