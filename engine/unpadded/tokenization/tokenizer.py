"""Text to token ids: prompts, special tokens, truncation.

A long text is tokenized only as far as its kept tokens reach. A slice of the text is tokenized, and of its tokens only
those count that what lies beyond the cut cannot change: a cut changes the word it falls in, or splits an added token
such as "[SEP]" into at most as many words as that has characters. With too few tokens left the slice doubles, up to the
whole text. This holds for normalizers and pre-tokenizers that look no further than their neighbors (`LOCAL`); with any
other the whole text is tokenized.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import numpy as np
import tokenizers
from tokenizers import Encoding

from unpadded.errors import CheckpointError, InputError, OptionError
from unpadded.options import Truncation, check_choice
from unpadded.tokenization.tokenizer_files import part_names, read_tokenizer

# 736 English documents took 3.8 characters a token (median), 4.8 (99th percentile) and 5.1 (largest) with BERT's
# vocabulary, 2026-11-23.
CHARACTERS_PER_TOKEN = 5
# An Encoding took 83 bytes a token (2026-11-23): a million texts in one call would hold gigabytes.
BLOCK_CHARACTERS = 1 << 20

LOCAL = frozenset(
    {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Precompiled", "StripAccents"}
    | {"BertPreTokenizer", "ByteLevel", "Metaspace", "Punctuation", "Whitespace", "WhitespaceSplit"}
)


@dataclass(frozen=True)
class Tokens:
    """One text's tokens."""

    ids: np.ndarray  # [tokens] int32, special tokens included
    truncated: bool


class Tokenizer:
    """A checkpoint's tokenizer, safe to call from several threads: nothing is set after construction."""

    def __init__(self, backend: tokenizers.Tokenizer | None, folder: Path, cores: int | None = None) -> None:
        self.folder = folder
        self._cores = cores
        self._backend = backend
        self._leading: list[int] = []
        self._trailing: list[int] = []
        self._local = False
        self._margin = 0
        if backend is None:
            return
        self._leading, self._trailing = _special_ids(backend, folder)
        self._local = all(part_names(part) <= LOCAL for part in (backend.normalizer, backend.pre_tokenizer))
        added = backend.get_added_tokens_decoder().values()
        self._margin = 1 + max((len(token.content) for token in added), default=1)

    @classmethod
    def from_folder(cls, folder: Path, *, lower_case: bool = False, cores: int | None = None) -> Tokenizer:
        """Read tokenizer.json, or else vocab.txt; a folder with neither raises CheckpointError once a text arrives.

        The truncation and padding that tokenizer.json sets are ignored. `lower_case` lowers before the tokenizer's own
        normalization, as sentence-transformers does for `do_lower_case`. A call keeps at most `cores` busy; None: all.
        """
        return cls(read_tokenizer(folder, lower_case=lower_case), folder, cores)

    @property
    def vocabulary_size(self) -> int:
        """Token ids this tokenizer can give, added tokens included; 0 without tokenizer files."""
        return self._backend.get_vocab_size(with_added_tokens=True) if self._backend else 0

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's object; CheckpointError for a folder without tokenizer files."""
        if self._backend is None:
            raise CheckpointError(
                f"the model has no tokenizer: neither tokenizer.json nor vocab.txt in {self.folder}; "
                "add one of them or pass token ids"
            )
        return self._backend

    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt: str = "",
        max_length: int,
        truncation: Truncation = "right",
        indices: Sequence[int] | None = None,
    ) -> list[Tokens]:
        """Tokenize prompt + text, at most `max_length` tokens with the special tokens.

        "right" keeps the first tokens; "left" keeps the prompt's and the last of the text's; "error" raises InputError
        for a text that is too long. Errors name a text by its entry in `indices`, or else its place in `texts`.
        """
        check_choice("truncation", truncation, get_args(Truncation))
        indices = range(len(texts)) if indices is None else indices
        _check_texts(texts, indices)
        if len(texts) == 0:
            return []
        room = self._room(prompt, max_length)
        rows: dict[int, Tokens] = {}
        size = self._slice(room)
        sliced = [index for index, text in enumerate(texts) if not self._whole(text, size)]
        short = [index for index, text in enumerate(texts) if self._whole(text, size)]
        for index, encoding in zip(short, self._encodings(prompt + texts[i] for i in short), strict=True):
            if len(encoding) > room and truncation == "left":
                sliced.append(index)
            else:
                rows[index] = self._tokens(encoding.ids[:room], truncated=len(encoding) > room)
        cut = self._tails if truncation == "left" else self._heads
        for index, ids, truncated in cut(texts, sliced, prompt, room):
            rows[index] = self._tokens(ids, truncated=truncated)
        ordered = [rows[index] for index in range(len(texts))]
        if truncation == "error":
            self._refuse_truncated(texts, ordered, prompt, max_length, indices)
        return ordered

    def chunks(
        self,
        texts: Sequence[str],
        *,
        prompt: str = "",
        chunk_length: int = 2048,
        overlap: int = 8,
        indices: Sequence[int] | None = None,
    ) -> list[list[np.ndarray]]:
        """Cut every text into chunks of at most `chunk_length` tokens, each with the special tokens and the prompt.

        Prompt and text are tokenized apart; neighbors share `overlap` tokens; an empty text is one chunk without text.
        """
        indices = range(len(texts)) if indices is None else indices
        _check_texts(texts, indices)
        if len(texts) == 0:
            return []
        self._room(prompt, chunk_length)
        before = self._leading + (next(self._encodings([prompt])).ids if prompt else [])
        room = chunk_length - len(before) - len(self._trailing)
        if not 0 <= overlap < room:
            raise OptionError(
                f"overlap does not fit the chunks: {overlap} tokens, and a chunk holds {room} of the text's; "
                "use one from 0 to less than that, or longer chunks"
            )
        rows = []
        for encoding in self._encodings(texts):
            ids = encoding.ids
            starts = range(0, max(1, len(ids) - overlap), room - overlap)
            parts = [before + ids[start : start + room] + self._trailing for start in starts]
            rows.append([np.array(part, np.int32) for part in parts])
        return rows

    def _tokens(self, ids: list[int], *, truncated: bool) -> Tokens:
        return Tokens(np.array(self._leading + ids + self._trailing, np.int32), truncated)

    def _refuse_truncated(
        self, texts: Sequence[str], rows: Sequence[Tokens], prompt: str, max_length: int, indices: Sequence[int]
    ) -> None:
        for index, row in enumerate(rows):
            if row.truncated:
                length = f"more than {max_length}"
                if len(texts[index]) <= BLOCK_CHARACTERS:
                    encoding = next(self._encodings([prompt + texts[index]]))
                    length = str(len(self._leading) + len(encoding) + len(self._trailing))
                raise InputError(
                    f"text {indices[index]} is too long: {length} tokens, at most {max_length} fit; "
                    "shorten it or pass truncation='right' or 'left'"
                )

    def _room(self, prompt: str, max_length: int) -> int:
        """Tokens left beside the special ones; raises unless the prompt leaves one for the text."""
        if not isinstance(prompt, str) or _surrogate(prompt) is not None:
            raise OptionError(f"prompt is not text: {prompt!r}; pass a string without lone surrogates")
        room = max_length - len(self._leading) - len(self._trailing)
        needed = len(next(self._encodings([prompt.rstrip()]))) + 1
        if room < needed:
            raise OptionError(
                f"no room is left for text: of {max_length} tokens, special tokens take {max_length - room} and the "
                f"prompt {needed - 1}; shorten the prompt or allow more tokens"
            )
        return room

    def _heads(
        self, texts: Sequence[str], pending: Sequence[int], prompt: str, room: int
    ) -> Iterator[tuple[int, list[int], bool]]:
        """For each pending text, in any order: its index, the first `room` ids, and whether there are more."""
        size = self._slice(room)
        while pending:
            pieces = (prompt + texts[i][:size] for i in pending)
            unsettled = []
            for index, encoding in zip(pending, self._encodings(pieces, words=True), strict=True):
                text = texts[index]
                whole = self._whole(text, size)
                count = len(encoding) if whole else self._settled_head(encoding, prompt + text[:size])
                if whole or count > room:
                    yield index, encoding.ids[:room], count > room
                else:
                    unsettled.append(index)
            pending = unsettled
            size *= 2

    def _tails(
        self, texts: Sequence[str], pending: Sequence[int], prompt: str, room: int
    ) -> Iterator[tuple[int, list[int], bool]]:
        """As `_heads`, with the prompt's ids and the last of the text's."""
        prompts = {index: self._prompt_ids(texts[index], prompt)[:room] for index in pending}
        size = self._slice(room)
        while pending:
            pieces = (prompt + texts[i] if self._whole(texts[i], size) else texts[i][-size:] for i in pending)
            unsettled = []
            for index, encoding in zip(pending, self._encodings(pieces, words=True), strict=True):
                text, kept = texts[index], prompts[index]
                whole = self._whole(text, size)
                start = len(kept) if whole else self._settled_tail(encoding, text[-size:])
                last = len(kept) + len(encoding) - room  # the first of the last tokens that fit
                if whole or last > start:
                    yield index, kept + encoding.ids[max(start, last) :], last > start
                else:
                    unsettled.append(index)
            pending = unsettled
            size *= 2

    def _prompt_ids(self, text: str, prompt: str) -> list[int]:
        """Ids of the tokens of prompt + text that begin in the prompt, its trailing spaces apart."""
        inside = len(prompt.rstrip())
        size = self._slice(0)
        while inside:
            piece = prompt + text[:size]
            encoding = next(self._encodings([piece], words=True))
            count = bisect_left(encoding.offsets, inside, key=lambda offset: offset[0])
            if self._whole(text, size) or count < self._settled_head(encoding, piece):
                return encoding.ids[:count]
            size *= 2
        return []

    def _slice(self, room: int) -> int:
        """Characters that most often give more than `room` settled tokens."""
        return CHARACTERS_PER_TOKEN * (room + 4 * self._margin)

    def _whole(self, text: str, size: int) -> bool:
        return not self._local or len(text) <= size

    def _settled_head(self, encoding: Encoding, piece: str) -> int:
        """How many tokens from the first a continuation of the piece cannot change."""
        words = _words(encoding)
        count = bisect_left(words, words[-1] - self._margin + 1) if words else 0
        # An added token that strips its left takes all the spaces before it.
        while count and not piece[slice(*encoding.offsets[count - 1])].strip():
            count -= 1
        return count

    def _settled_tail(self, encoding: Encoding, piece: str) -> int:
        """The first token from which on text before the piece cannot change any."""
        start = bisect_left(_words(encoding), self._margin)
        while start < len(encoding) and not piece[slice(*encoding.offsets[start])].strip():
            start += 1
        return start

    def _encodings(self, texts: Iterable[str], *, words: bool = False) -> Iterator[Encoding]:
        """Tokenize without special tokens, a block at a time; `words` asks for words and offsets."""
        encode = self.backend.encode_batch if words else self.backend.encode_batch_fast
        for block in _blocks(texts, self._cores):
            yield from encode(block, add_special_tokens=False)


def _words(encoding: Encoding) -> list[int]:
    """The word of each token, ascending; only special tokens, which a slice is encoded without, have none."""
    return cast(list[int], encoding.word_ids)


def _blocks(texts: Iterable[str], most: int | None) -> Iterator[list[str]]:
    """At most `most` texts each: the library takes a core for each text of a call."""
    block: list[str] = []
    characters = 0
    for text in texts:
        block.append(text)
        characters += len(text) + 1
        if characters > BLOCK_CHARACTERS or len(block) == most:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _check_texts(texts: Sequence[str], indices: Sequence[int]) -> None:
    for index, text in zip(indices, texts, strict=True):
        if not isinstance(text, str):
            raise InputError(f"text {index} is not a string: {type(text).__name__}; pass strings or token ids")
        if (place := _surrogate(text)) is not None:
            raise InputError(
                f"text {index} holds a lone surrogate: U+{ord(text[place]):04X} at character {place}; "
                "repair it, for example with text.encode('utf-8', 'replace').decode()"
            )


def _surrogate(text: str) -> int | None:
    """Where the first lone surrogate is."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _special_ids(backend: tokenizers.Tokenizer, folder: Path) -> tuple[list[int], list[int]]:
    """What the post-processor puts before and after every text."""
    body = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a")
    leading = full.special_tokens_mask.index(0) if 0 in full.special_tokens_mask else 0
    trailing = leading + len(body)
    if not body or full.ids[leading:trailing] != body:
        raise CheckpointError(
            f"the tokenizer of {folder} does more than put special tokens around a text: 'a' gives {full.ids} "
            f"with them and {body} without; use one whose post-processor leaves the text's own tokens alone"
        )
    return full.ids[:leading], full.ids[trailing:]
