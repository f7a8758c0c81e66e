"""Iterables of texts -> windows: the texts that are tokenized and scheduled together."""

import contextlib
import logging
import math
import operator
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from unpadded.checkpoint.reader import Checkpoint
from unpadded.checkpoint.token_head import UNATTENDED
from unpadded.errors import InputError, TooLargeError, WorkerError
from unpadded.model.batch import Ids, SpannedIds
from unpadded.options import Plan
from unpadded.tokenization.spans import SpannedText, checked_spans
from unpadded.tokenization.tokenizer import Pair, Tokenizer

logger = logging.getLogger("unpadded")

Text: TypeAlias = str | Sequence[int] | np.ndarray
Input: TypeAlias = str | Pair | SpannedText | np.ndarray  # a checked text; token ids are [tokens] int32
Item = TypeVar("Item")

NAMED_TEXTS = 8  # maximum number of texts of a batch that an error names
# To estimate tokens: the median of 736 English documents was 3.8 (BERT's vocabulary, 2026-11).
AVERAGE_CHARACTERS_PER_TOKEN = 4
SPECIAL_TOKENS = 2


class TextGroup(NamedTuple):
    """The texts of a window."""

    first_index: int  # index of the first text, among all texts
    texts: list[Input]
    tokens: int  # estimate
    last: bool  # no texts follow; if False, some may


# Token ids of one text: one sequence, or one per chunk or section; and whether it is truncated.
TextTokens: TypeAlias = tuple[Sequence[Ids], bool]


@dataclass(frozen=True)
class Window:
    """Consecutive texts and their sequences of token ids, which equal texts share."""

    first_index: int  # index of the first text, among all texts
    first_sequences: list[int]  # of each text, its only one unless it is split into sections
    token_counts: np.ndarray  # [texts] int64
    truncated: np.ndarray  # [texts] bool
    sequences: list[Ids]
    last: bool  # no texts follow; if False, some may

    def text_index(self, sequence: int) -> int:
        """Return the index, among all texts, of the first text that has this sequence."""
        first = max(first for first in self.first_sequences if first <= sequence)
        return self.first_index + self.first_sequences.index(first)

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


def iterate(texts: Iterable[Item], step: int = 4096) -> Iterable[Item]:
    """Return texts, those of a column of pyarrow as str; InputError for a mapping, a table and the like."""
    ordered = isinstance(texts, Iterable) and not isinstance(texts, str | bytes | Mapping | set | frozenset)
    if not ordered or hasattr(texts, "columns") or getattr(texts, "ndim", 1) == 0:
        kind = type(texts).__name__
        raise InputError(f"texts are not a sequence: {kind}; pass a list of strings, or one column of a table")
    if not hasattr(texts, "to_pylist"):
        return texts
    column: Any = texts
    return (text for at in range(0, len(column), step) for text in column.slice(at, step).to_pylist())


def _checked_pair(pair: Any, index: int) -> Pair:
    is_sequence = isinstance(pair, Sequence | np.ndarray) and len(pair) == 2
    if not is_sequence or not all(isinstance(text, str) for text in pair):
        raise InputError(f"pair {index} is not a pair of strings: {pair!r:.80}; pass (query, document)")
    return str.__str__(pair[0]), str.__str__(pair[1])


def delayed(items: Iterator[Item], steps: int) -> Iterator[Item]:
    """Yield the items `steps` steps late. If `items` raises an Exception, the items before it are yielded first."""
    held: deque[Item] = deque()
    try:
        for item in items:
            held.append(item)
            if len(held) > steps:
                yield held.popleft()
    except Exception:  # of any type: it is raised again
        yield from held
        raise
    yield from held


class WindowReader:
    """Splits texts into windows and tokenizes them for one checkpoint. Each warning is logged once per reader."""

    # A window has enough texts of similar length to fill batches, and fits into memory. It ends at any limit.
    max_texts = 4096
    max_size = 1 << 22  # characters, or token ids
    # Of `windows`: a caller that is cancelled stops between two windows. 0.5 s of English prose (Xeon, 2026-11).
    max_shared_size = 1 << 19

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
        self._checkpoint = checkpoint
        self.tokenizer = tokenizer
        self._warned_about_task = False
        self._warned_about_length = False

    def windows(self, texts: Iterable[Text | Pair], plan: Plan) -> Iterator[Window]:
        """Yield one window after another, reading texts as needed. InputError names a text by its index."""
        return (self.tokenize(group, plan) for group in self.groups(texts, plan, max_size=self.max_shared_size))

    def windows_ahead(self, texts: Iterable[Text | Pair], plan: Plan, max_tokens: float) -> Iterator[Window]:
        """Yield windows of about `max_tokens`, each tokenized in a thread while the one before is used.

        `texts` is iterated in the caller's thread.
        """
        groups = self.groups(texts, plan, max_tokens)
        first = list(islice(groups, 1))
        if not first or first[0].last:  # starting a thread costs more than tokenizing one query
            yield from (self.tokenize(group, plan) for group in first)
            return
        with ThreadPoolExecutor(1, "unpadded-tokenize") as thread:
            started = (thread.submit(self.tokenize, group, plan) for group in chain(first, groups))
            for window in delayed(started, 1):
                yield window.result()

    def groups(
        self,
        texts: Iterable[Text | Pair],
        plan: Plan,
        max_tokens: float = math.inf,
        *,
        max_size: int = max_size,
        first: int = 1,
    ) -> Iterator[TextGroup]:
        """Split texts into the groups that become windows, of about `max_tokens` each; InputError for a wrong type.

        The `first` groups, one per device, have an eighth of that, to start early; the next ones twice that.
        """
        group: list[Input] = []
        scores = plan.vector_options.head == "score"
        first_index = size = number = 0
        tokens, limit = 0.0, max_tokens / 8
        source = iter(iterate(texts, self.max_texts))
        for index, text in enumerate(source):
            if isinstance(text, str):
                group.append(str.__str__(text))  # not of another library's type, which other processes may not know
            elif plan.vector_options.rows == "span":
                group.append(checked_spans(text, index))
            else:
                group.append(_checked_pair(text, index) if scores else self._checked_ids(text, index))
            added = group[-1]
            length = sum(map(len, added)) if isinstance(added, tuple) else len(added)
            size += length
            given = isinstance(added, np.ndarray)
            estimate = length if given else length // AVERAGE_CHARACTERS_PER_TOKEN + SPECIAL_TOKENS
            tokens += min(estimate, self._checkpoint.max_length)
            if len(group) == self.max_texts or size >= max_size or tokens >= limit:
                yield TextGroup(first_index, group, int(tokens), last=False)
                number += 1
                limit = min(limit * (2 if number % first == 0 else 1), max_tokens)
                if first > 1 and (left := operator.length_hint(source)):  # so that devices finish at the same time
                    limit = max(min(limit, left * tokens / len(group) / (2 * first)), max_tokens / 8)
                first_index += len(group)
                group, size, tokens = [], 0, 0
        if group:
            yield TextGroup(first_index, group, int(tokens), last=True)

    def tokenize(self, group: TextGroup, plan: Plan) -> Window:
        """Tokenize each distinct text once."""
        keys: list[Hashable] = []
        distinct: dict[Hashable, tuple[int, Input]] = {}  # with the first index
        for index, text in enumerate(group.texts, group.first_index):
            keys.append(text.tobytes() if isinstance(text, np.ndarray) else text)
            distinct.setdefault(keys[-1], (index, text))
        tokens = self._tokens(dict(distinct.values()), plan)

        sequences: list[Ids] = []
        texts: dict[Hashable, tuple[int, int, bool]] = {}
        for key, (index, _) in distinct.items():
            found, is_truncated = tokens[index]
            texts[key] = len(sequences), sum(map(len, found)), is_truncated
            sequences += found
        self._check_vocabulary(tokens)
        self._warn_beyond_trained_length(max(map(len, sequences)))
        first, counts, truncated = zip(*(texts[key] for key in keys), strict=True)
        token_counts = np.array(counts, np.int64)
        return Window(group.first_index, list(first), token_counts, np.array(truncated), sequences, group.last)

    def _tokens(self, texts: dict[int, Any], plan: Plan) -> dict[int, TextTokens]:
        """Return the tokens of texts or given ids, both by the text's index among all texts."""
        max_length, score = plan.max_length or self._checkpoint.max_length, self._checkpoint.score
        if plan.vector_options.rows == "span":
            self._warn_without_task({index: text for index, (text, _) in texts.items()}, plan.prompt)
            sections = self.tokenizer.sections(texts, plan.prompt, max_length, plan.cut)
            return {index: (found, False) for index, found in zip(texts, sections, strict=True)}
        strings = {index: text for index, text in texts.items() if isinstance(text, str)}
        pairs = {index: (plan.prompt + text[0], text[1]) for index, text in texts.items() if isinstance(text, tuple)}
        found: dict[int, TextTokens] = {
            index: ([ids], False) for index, ids in texts.items() if isinstance(ids, np.ndarray)
        }
        if pairs:
            assert score is not None
            rows = self.tokenizer.encode_pairs(
                list(pairs.values()), list(pairs), max_length, plan.truncation, score.token_types
            )
            found |= {index: ([row.ids], row.truncated) for index, row in zip(pairs, rows, strict=True)}
        if not strings:  # token ids need no tokenizer
            return found
        self._warn_without_task(strings, plan.prompt)
        values, indices = list(strings.values()), list(strings)
        rows = self.tokenizer.encode(
            values, prompt=plan.prompt, max_length=max_length, truncation=plan.truncation, indices=indices
        )
        if plan.expansion is not None:
            length, token = plan.expansion
            added = [np.full(max(0, length - len(row.ids)), token, np.int32) for row in rows]
            rows = [replace(row, ids=np.append(row.ids, ids)) for row, ids in zip(rows, added, strict=True)]
        return found | {index: ([row.ids], row.truncated) for index, row in zip(indices, rows, strict=True)}

    def _checked_ids(self, ids: Text | Pair, index: int) -> np.ndarray:
        """Return token ids as [tokens] int32; InputError if the model cannot embed them."""
        try:
            array = np.asarray(ids)
        except (TypeError, ValueError):
            array = np.empty((0, 0))
        if array.ndim != 1 or array.itemsize == 1 or (array.size and array.dtype.kind not in "iu"):  # 1: bytes
            raise InputError(f"text {index} is neither a string nor token ids: {ids!r:.80}; pass one of them")
        vocabulary, max_length = self._checkpoint.spec.vocabulary, self._checkpoint.max_length
        if not 1 <= array.size <= max_length:
            raise InputError(f"text {index} has {array.size} token ids; pass 1 to {max_length}, or set max_length")
        if array.min() < 0 or array.max() >= vocabulary:
            wrong = array[(array < 0) | (array >= vocabulary)][0]
            raise InputError(f"text {index} has a token id out of range: {wrong}; use ids from 0 to {vocabulary - 1}")
        return array.astype(np.int32)

    def _check_vocabulary(self, tokens: dict[int, TextTokens]) -> None:
        """Raise InputError for a token without a word embedding, which a device would read out of bounds."""
        vocabulary = self._checkpoint.spec.vocabulary
        found = [(index, ids) for index, (sequences, _) in tokens.items() for ids in sequences]
        plain = [(index, ids.ids if isinstance(ids, SpannedIds) else ids) for index, ids in found]
        rows = [(index, np.maximum(ids, ~ids) % UNATTENDED) for index, ids in plain]
        if np.concatenate([ids for _, ids in rows]).max(initial=0) >= vocabulary:
            index, token = min((index, int(ids.max())) for index, ids in rows if ids.max(initial=0) >= vocabulary)
            raise InputError(
                f"text {index} contains the token {self.tokenizer.backend.id_to_token(token)!r}, whose id {token} is "
                f"beyond the model's {vocabulary} word embeddings; remove it, or use the model's own tokenizer"
            )

    def _warn_without_task(self, texts: dict[int, str], prompt: str) -> None:
        """Warn of a text without a task prefix, by its index: models trained with one embed such texts worse.

        The warning does not quote the text, because it also appears in the log of a server.
        """
        prompts = self._checkpoint.prompts
        if self._warned_about_task or prompt or "search_query" not in prompts:
            return
        known = tuple(prompts.values())
        index = next((index for index, text in texts.items() if not text.startswith(known)), None)
        if index is not None:
            self._warned_about_task = True
            tasks = " or task=".join(map(repr, prompts))
            message = "%s expects a task before every text, but text %d has none; pass task=%s"
            logger.warning(message, self._checkpoint.name, index, tasks)

    def _warn_beyond_trained_length(self, tokens: int) -> None:
        rotary = self._checkpoint.spec.rotary
        if self._warned_about_length or rotary is None or rotary.scaling_factor is not None:
            return
        if tokens > rotary.trained_length:
            self._warned_about_length = True
            message = (
                "a text of %d tokens is longer than the %d tokens with which %s was trained, and its rotary embedding "
                "is not scaled; load with rotary_scaling_factor=2 for dynamic-NTK scaling, or max_length=%d"
            )
            logger.warning(message, tokens, rotary.trained_length, self._checkpoint.name, rotary.trained_length)
