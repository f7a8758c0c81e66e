"""Any iterable of texts -> windows: as many texts as are looked at together, tokenized."""

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
from unpadded.tokenization.tokenizer import Tokenizer, Tokens

logger = logging.getLogger("unpadded")

Text: TypeAlias = str | Sequence[int] | np.ndarray

# Enough texts of like length to fill batches, few enough to hold.
WINDOW_TEXTS = 4096
WINDOW_LENGTH = 1 << 22  # characters, or token ids
# The chunked mean of nomic's client (gpt4all): tokens of a chunk, prompt and specials included, and of an overlap.
CHUNK_TOKENS = 2048
CHUNK_OVERLAP = 8
NAMED_TEXTS = 8  # of a batch, in an error's message


class Gathered(NamedTuple):
    """The texts of a window."""

    first_index: int  # of the first, among all
    texts: list[Text]
    last: bool  # none follows; where False, one may


@dataclass(frozen=True)
class Window:
    """Consecutive texts as id sequences: one a text, or one a chunk."""

    first_index: int  # of its first text, among all
    sequences: list[np.ndarray]  # each [tokens] int32
    owners: np.ndarray  # [sequences], the text of each, counted from 0
    truncated: np.ndarray  # [texts] bool: the text had more tokens
    distinct: list[int]  # the sequences to run: those of a text that stood before are left out
    copies: np.ndarray  # [sequences], the place in `distinct` of the one that each is equal to
    last: bool  # as in `Gathered`

    def to_run(self) -> list[np.ndarray]:
        """The sequences of `distinct`."""
        return [self.sequences[i] for i in self.distinct]

    def text(self, place: int) -> int:
        """Which text, among all, a sequence of `to_run` is of."""
        return self.first_index + int(self.owners[self.distinct[place]])

    @contextlib.contextmanager
    def naming(self, batch: Sequence[int]) -> Iterator[None]:
        """Have what goes wrong inside name its texts, those of some sequences of `to_run`."""
        try:
            yield
        except TooLargeError as error:
            raise error.at(self.text(batch[error.index])) from None
        except Exception as error:  # whatever it is, it goes on its way
            texts = sorted({self.text(place) for place in batch})
            more = f" and {len(texts) - NAMED_TEXTS} more" if len(texts) > NAMED_TEXTS else ""
            named = f"it came with text{'s' * (len(texts) > 1)} {', '.join(map(str, texts[:NAMED_TEXTS]))}{more}"
            if isinstance(error, WorkerError):
                raise WorkerError(f"{error} ({named})") from error
            error.add_note(named)
            raise


class WindowReader:
    """Tokenizes for one checkpoint. Says what a user should know once in its life."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
        self._checkpoint = checkpoint
        self._tokenizer = tokenizer
        self._said_task = False
        self._said_length = False

    def windows(self, texts: Iterable[Text], plan: Plan) -> Iterator[Window]:
        """Take texts as they come, a window at a time. InputError names a text by its index."""
        return (self._tokenize(gathered, plan) for gathered in _gather(texts))

    def windows_ahead(self, texts: Iterable[Text], plan: Plan) -> Iterator[Window]:
        """The same, each tokenized in a thread while the one before is used. `texts` is iterated in the caller's."""
        with ThreadPoolExecutor(1, "unpadded-tokenize") as thread:
            behind: Future[Window] | None = None
            for gathered in _gather(texts):
                if gathered.last and behind is None:  # to start a thread takes longer than to tokenize a query
                    yield self._tokenize(gathered, plan)
                    return
                coming = thread.submit(self._tokenize, gathered, plan)
                if behind is not None:
                    yield behind.result()
                behind = coming
            if behind is not None:
                yield behind.result()

    def _tokenize(self, gathered: Gathered, plan: Plan) -> Window:
        first_index, texts, last = gathered
        given = [text if isinstance(text, str) else self._checked(text, i) for i, text in enumerate(texts, first_index)]
        first: dict[str | bytes, int] = {}  # where each distinct text stands
        originals = [
            first.setdefault(text if isinstance(text, str) else text.tobytes(), place)
            for place, text in enumerate(given)
        ]
        parts = self._parts({place: given[place] for place in first.values()}, first_index, plan)
        sequences: list[np.ndarray] = []
        owners: list[int] = []
        distinct: list[int] = []
        copies: list[int] = []
        starts: dict[int, int] = {}  # in `distinct`, of each distinct text
        for place, original in enumerate(originals):
            part, _ = parts[original]
            if place == original:
                starts[place] = len(distinct)
                distinct += range(len(sequences), len(sequences) + len(part))
            copies += range(starts[original], starts[original] + len(part))
            sequences += part
            owners += [place] * len(part)
        truncated = np.array([parts[original][1] for original in originals])
        self._warn_beyond_trained(max(map(len, sequences)))
        return Window(first_index, sequences, np.array(owners), truncated, distinct, np.array(copies), last)

    def _parts(
        self, texts: dict[int, str | np.ndarray], first_index: int, plan: Plan
    ) -> dict[int, tuple[list[np.ndarray], bool]]:
        """The sequences of each text, by its place, and whether it had more tokens."""
        parts = {place: ([ids], False) for place, ids in texts.items() if not isinstance(ids, str)}
        strings = {place: text for place, text in texts.items() if isinstance(text, str)}
        indices = [first_index + place for place in strings]
        self._warn_without_task(dict(zip(indices, strings.values(), strict=True)), plan.prompt)
        if plan.long_text == "mean":
            chunks = self._chunks(list(strings.values()), indices, plan.prompt)
            return parts | {place: (one, False) for place, one in zip(strings, chunks, strict=True)}
        found = self._encode(list(strings.values()), indices, plan)
        return parts | {place: ([one.ids], one.truncated) for place, one in zip(strings, found, strict=True)}

    def _encode(self, texts: Sequence[str], indices: Sequence[int], plan: Plan) -> list[Tokens]:
        return self._tokenizer.encode(
            texts,
            prompt=plan.prompt,
            max_length=self._checkpoint.max_length,
            truncation=plan.truncation,
            indices=indices,
        )

    def _chunks(self, texts: Sequence[str], indices: Sequence[int], prompt: str) -> list[list[np.ndarray]]:
        return self._tokenizer.chunks(
            texts,
            prompt=prompt,
            chunk_length=min(CHUNK_TOKENS, self._checkpoint.max_length),
            overlap=CHUNK_OVERLAP,
            indices=indices,
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

    def _warn_without_task(self, texts: dict[int, str], prompt: str) -> None:
        """Warn of a text without a task prefix, by its index: models trained with one embed such texts worse.

        The warning does not quote the text, because it also appears in the log of a server.
        """
        prompts = self._checkpoint.prompts
        if self._said_task or prompt or "search_query" not in prompts:
            return
        known = tuple(prompts.values())
        for index, text in texts.items():
            if not text.startswith(known):
                self._said_task = True
                logger.warning(
                    "%s expects a task before every text, but text %d has none; pass task=%s",
                    self._checkpoint.name,
                    index,
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


def _gather(texts: Iterable[Text]) -> Iterator[Gathered]:
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise InputError(f"texts are not a collection: {type(texts).__name__}; pass a list of strings")
    window: list[Text] = []
    first_index = length = 0
    for text in texts:
        window.append(text)
        length += len(text) if hasattr(text, "__len__") else 1
        if len(window) == WINDOW_TEXTS or length >= WINDOW_LENGTH:
            yield Gathered(first_index, window, last=False)
            first_index += len(window)
            window, length = [], 0
    if window:
        yield Gathered(first_index, window, last=True)
