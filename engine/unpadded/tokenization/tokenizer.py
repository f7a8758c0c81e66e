"""Text to token ids: prompts, special tokens, truncation."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self, TypeAlias, get_args

import numpy as np
import tokenizers
from tokenizers import AddedToken, Encoding

from unpadded.checkpoint.json_config import not_implemented
from unpadded.errors import CheckpointError, InputError, OptionError
from unpadded.model.batch import SpannedIds
from unpadded.options import Truncation, check_choice
from unpadded.tokenization.spans import Cut, SpannedText, read_sections
from unpadded.tokenization.tokenizer_files import read_tokenizer
from unpadded.tokenization.truncation import TextSlicer

Pair: TypeAlias = tuple[str, str]  # such as a query and a document


@dataclass(frozen=True)
class Tokens:
    """Token ids of one text."""

    ids: np.ndarray  # [tokens] int32, including special tokens
    truncated: bool


class Tokenizer:
    """A checkpoint's tokenizer. Any number of threads may call it: nothing is set after construction.

    backend: None for a checkpoint without tokenizer files, for which every text raises CheckpointError. folder: named
    in errors. cores: maximum number of cores that a call uses; None: all.
    """

    # Tokenizing takes 0.2 (English) to 0.6 (Chinese) GB per million characters of a block (BERT, 2026-11).
    block_characters = 1 << 18

    def __init__(self, backend: tokenizers.Tokenizer | None, folder: Path, cores: int | None = None) -> None:
        self.folder = folder
        self._cores = cores
        self._backend = backend
        if backend is not None:
            self._leading, self._trailing = _special_ids(backend, folder)
            self._slicer = TextSlicer(backend, partial(self._encodings, words=True))

    @classmethod
    def from_folder(
        cls, folder: Path, *, lower_case: bool = False, cores: int | None = None, markers: Iterable[str] = ()
    ) -> Self:
        """Read the folder's tokenizer; lower_case: as in `read_tokenizer`.

        A marker, or else its first word, becomes one token if the vocabulary has it, as in sentence-transformers.
        """
        backend = read_tokenizer(folder, lower_case=lower_case)
        if backend is not None:
            for marker in markers:
                known = [token for token in (marker, *marker.split()[:1]) if backend.token_to_id(token) is not None]
                if known and backend.encode(known[0], add_special_tokens=False).tokens != known[:1]:
                    backend.add_special_tokens([AddedToken(known[0], normalized=False, special=True)])
        return cls(backend, folder, cores)

    def __reduce__(self) -> tuple[object, ...]:
        return Tokenizer, (self._backend, self.folder, self._cores)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The `tokenizers` object; CheckpointError for a folder without tokenizer files."""
        if self._backend is None:
            raise CheckpointError(
                f"the model has no tokenizer: neither tokenizer.json nor vocab.txt in {self.folder}; "
                "add one of them or pass token ids"
            )
        return self._backend

    def could_return(self, ids: Sequence[int] | np.ndarray) -> bool:
        """Return whether ids are in range and have special tokens where `encode` adds them; True without tokenizer."""
        if self._backend is None:
            return True
        size, first, last = self._backend.get_vocab_size(), len(self._leading), len(self._trailing)
        enclosed = list(ids[:first]) == self._leading and list(ids[len(ids) - last :]) == self._trailing
        return first + last <= len(ids) and enclosed and all(0 <= id_ < size for id_ in ids)

    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt: str = "",
        max_length: int,
        truncation: Truncation = "right",
        indices: Sequence[int] | None = None,
    ) -> list[Tokens]:
        """Tokenize prompt + text into at most `max_length` tokens, including special tokens.

        "right" keeps the first tokens; "left" keeps the prompt's and the last of the text's; "error" raises InputError
        for a text that is too long. Errors name a text by its entry in `indices`, by default its index in `texts`.
        """
        check_choice("truncation", truncation, get_args(Truncation))
        indices = range(len(texts)) if indices is None else indices
        _check_texts(texts, indices)
        limit = self._token_limit(prompt, max_length)
        rows = self._truncated(texts, prompt, limit, left=truncation == "left")
        for index, (_, cut) in zip(indices, rows, strict=True):
            if cut and truncation == "error":
                raise InputError(
                    f"text {index} is too long: more than {max_length} tokens; shorten it, or pass truncation='right' "
                    "or 'left'"
                )
        return [Tokens(np.array(self._leading + ids + self._trailing, np.int32), cut) for ids, cut in rows]

    def encode_pairs(
        self, pairs: Sequence[Pair], indices: Sequence[int], max_length: int, truncation: Truncation, token_types: bool
    ) -> list[Tokens]:
        """Tokenize pairs of texts into at most `max_length` tokens each, including special tokens.

        Each distinct text is tokenized once. The last tokens of the longer text are removed first, as transformers
        does; truncation, indices: as in `encode`, but not "left". token_types: tokens of type 1 have the id ~id.
        """
        for side in zip(*pairs, strict=True):
            _check_texts(side, indices)
        before, between, after = self._pair_ids(token_types=token_types)
        limit = max_length - len(before) - len(between) - len(after)
        if limit < 2:
            raise OptionError(f"max_length leaves no tokens for two texts: {max_length}; allow more tokens")
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        found = dict(zip(texts, self._truncated(texts, "", limit, left=False), strict=True))
        rows = []
        for index, (first, second) in zip(indices, pairs, strict=True):
            (ids, cut), (other_ids, other_cut) = found[first], found[second]
            lengths = len(ids), len(other_ids)
            if cut and other_cut:  # which of them is longer is unknown
                lengths = len(next(self._encodings([first]))), len(next(self._encodings([second])))
            kept, other_kept = _longest_first(*lengths, limit)
            truncated = cut or other_cut or kept + other_kept < sum(lengths)
            if truncated and truncation == "error":
                raise InputError(f"pair {index} is too long: more than {max_length} tokens; shorten it")
            second_ids = np.array(other_ids[:other_kept], np.int32)
            parts = before, np.array(ids[:kept], np.int32), between, ~second_ids if token_types else second_ids, after
            rows.append(Tokens(np.concatenate(parts), truncated))
        return rows

    def _pair_ids(self, *, token_types: bool) -> list[np.ndarray]:
        """Return the ids before, between and after two texts; token_types: those of type 1 as ~id."""
        encoding = self.backend.encode("a", "a")
        sides = encoding.sequence_ids
        ids = np.array(encoding.ids, np.int32)
        ids = np.where(encoding.type_ids, ~ids, ids) if token_types else ids
        start, middle, end = sides.index(0), sides.index(1), len(sides) - sides[::-1].index(1)
        return [ids[:start], ids[start + sides.count(0) : middle], ids[end:]]

    def _truncated(self, texts: Sequence[str], prompt: str, limit: int, *, left: bool) -> list[tuple[list[int], bool]]:
        """Return at most `limit` ids of each prompt + text, without special tokens, and whether it has more."""
        size = self._slicer.size(limit)
        found: dict[int, tuple[list[int], bool]] = {}
        short = [index for index, text in enumerate(texts) if len(text) <= size]
        for index, encoding in zip(short, self._encodings(prompt + texts[index] for index in short), strict=True):
            if len(encoding) <= limit or not left:
                found[index] = encoding.ids[:limit], len(encoding) > limit
        long = [index for index in range(len(texts)) if index not in found]
        for index, ids, truncated in self._slicer.truncate(texts, long, prompt, limit, left=left):
            found[index] = ids, truncated
        return [found[index] for index in range(len(texts))]

    def sections(
        self, items: dict[int, SpannedText], prompt: str, max_length: int, cut: Cut
    ) -> Iterator[list[SpannedIds]]:
        """Yield the sections of each text, of at most `max_length` tokens; see `read_sections`."""
        texts = [text for text, _ in items.values()]
        _check_texts(texts, list(items))
        fixed = prompt, self._token_limit(prompt, max_length), [self._leading, self._trailing], cut
        encodings = self._encodings((prompt + text for text in texts), words=True)
        for (index, item), encoding in zip(items.items(), encodings, strict=True):
            yield read_sections(item, index, encoding, *fixed)

    def _token_limit(self, prompt: str, max_length: int) -> int:
        """Return the maximum number of tokens of prompt + text; OptionError if the prompt leaves none for the text."""
        if not isinstance(prompt, str) or _find_surrogate(prompt) is not None:
            raise OptionError(f"prompt is not text: {prompt!r}; pass a string without lone surrogates")
        prompt_tokens = len(next(self._encodings([prompt.rstrip()])))
        limit = max_length - len(self._leading) - len(self._trailing)
        if limit <= prompt_tokens:
            raise OptionError(
                f"no tokens are left for the text: of {max_length} tokens, special tokens take {max_length - limit} "
                f"and the prompt {prompt_tokens}; shorten the prompt or allow more tokens"
            )
        return limit

    def _encodings(self, texts: Iterable[str], *, words: bool = False) -> Iterator[Encoding]:
        """Tokenize without special tokens, in blocks; words: with words and offsets, which takes longer."""
        encode = self.backend.encode_batch if words else self.backend.encode_batch_fast
        for block in self._blocks(texts):
            try:
                encodings = encode(block, add_special_tokens=False)
            except BaseException as error:  # a Rust panic: a regular expression that tries too many ways to match
                if type(error).__name__ != "PanicException":
                    raise
                raise InputError(f"a text cannot be tokenized: {block[0]!r:.80}, {error}; remove it") from error
            yield from encodings

    def _blocks(self, texts: Iterable[str]) -> Iterator[list[str]]:
        """Split texts by `block_characters`, and into `cores` texts: the library uses one core per text of a call."""
        block: list[str] = []
        characters = 0
        for text in texts:
            block.append(text)
            characters += len(text) + 1
            if characters > self.block_characters or len(block) == self._cores:
                yield block
                block, characters = [], 0
        if block:
            yield block


def _check_texts(texts: Sequence[str], indices: Sequence[int]) -> None:
    if isinstance(texts, str):
        raise InputError(f"texts are one string: {texts!r:.80}; pass a list of strings")
    for index, text in zip(indices, texts, strict=True):
        if not isinstance(text, str):
            raise InputError(f"text {index} is not a string: {type(text).__name__}; pass strings or token ids")
        if (position := _find_surrogate(text)) is not None:
            raise InputError(
                f"text {index} contains a lone surrogate: U+{ord(text[position]):04X} at character {position}; "
                "repair it, for example with text.encode('utf-8', 'replace').decode()"
            )


def _longest_first(first: int, second: int, limit: int) -> tuple[int, int]:
    """Return how many tokens of two texts are kept: the longer one is cut first, then both to halves of the limit."""
    if first + second <= limit:
        return first, second
    short = min(first, second, limit // 2)
    return (short, limit - short) if first <= second else (limit - short, short)


def _find_surrogate(text: str) -> int | None:
    """Return the index of the first lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _special_ids(backend: tokenizers.Tokenizer, folder: Path) -> tuple[list[int], list[int]]:
    """Return the ids that the post-processor adds before and after every text."""
    body = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a")
    leading = full.special_tokens_mask.index(0) if 0 in full.special_tokens_mask else 0
    trailing = leading + len(body)
    if any(full.type_ids):
        raise not_implemented(f"the post-processor's token types of the tokenizer in {folder}", full.type_ids, 0)
    if not body or full.ids[leading:trailing] != body:
        raise CheckpointError(
            f"the tokenizer of {folder} does more than add special tokens around a text: 'a' gives {full.ids} "
            f"with them and {body} without; use one whose post-processor leaves the text's own tokens alone"
        )
    return full.ids[:leading], full.ids[trailing:]
