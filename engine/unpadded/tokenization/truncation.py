"""Tokenize only as much of a long text as its kept tokens need.

A slice at the start or the end of the text is tokenized, and only tokens which the rest of the text cannot change are
used. A cut changes the word that it falls into; it can also split an added token such as "[SEP]" into as many words as
that has characters. If too few tokens are stable, the slice is doubled, up to the whole text.

This holds for normalizers and pre-tokenizers for which a word depends on adjacent characters only (`LOCAL`). With any
other one, the whole text is tokenized.
"""

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import tokenizers
from tokenizers import Encoding

from unpadded.tokenization.tokenizer_files import part_names

LOCAL = frozenset(
    {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Precompiled", "StripAccents"}
    | {"BertPreTokenizer", "ByteLevel", "Metaspace", "Punctuation", "Whitespace", "WhitespaceSplit"}
)

# The 99th percentile of 736 English documents was 4.8 with BERT's vocabulary, the median 3.8 (2026-11).
CHARACTERS_PER_TOKEN = 5


class TextSlicer:
    """Tokenizes the first or the last tokens of long texts, without special tokens.

    encode: tokenizes texts into encodings with words and offsets.
    """

    def __init__(self, backend: tokenizers.Tokenizer, encode: Callable[[Iterable[str]], Iterator[Encoding]]) -> None:
        self._encode = encode
        self._local = part_names(backend.normalizer) | part_names(backend.pre_tokenizer) <= LOCAL
        added_tokens = backend.get_added_tokens_decoder().values()
        # words that a cut can change
        self._margin = 1 + max((len(token.content) for token in added_tokens), default=1)

    def size(self, tokens: int) -> int:
        """Return a length of slices that usually yields more stable tokens than `tokens`; no limit if not local."""
        return CHARACTERS_PER_TOKEN * (tokens + 4 * self._margin) if self._local else sys.maxsize

    def truncate(
        self, texts: Sequence[str], indices: Sequence[int], prompt: str, limit: int, *, left: bool
    ) -> Iterator[tuple[int, list[int], bool]]:
        """Yield index, first `limit` ids of prompt + text, and whether it has more, for each of `indices` in any order.

        left: the prompt's ids and the last ids of the text instead, `limit` in all.
        """
        prompt_ids = {index: self._prompt_ids(texts[index], prompt)[:limit] if left else [] for index in indices}
        size = self.size(limit)
        while indices:
            pending = [texts[index] for index in indices]
            slices = [text[-size:] if left and len(text) > size else prompt + text[:size] for text in pending]
            unfinished = []
            for index, piece, encoding in zip(indices, slices, self._encode(slices), strict=True):
                kept, whole = prompt_ids[index], len(texts[index]) <= size
                start, stop = len(kept), len(encoding)  # of the stable tokens of the text
                if left and not whole:
                    start = self._stable_suffix(encoding, piece)
                elif not whole:
                    stop = self._stable_prefix(encoding, piece)
                stable, fitting = stop - start, limit - len(kept)
                if whole or stable > fitting:
                    ids = encoding.ids[max(start, stop - fitting) :] if left else encoding.ids[:limit]
                    yield index, kept + ids, stable > fitting
                else:
                    unfinished.append(index)
            indices = unfinished
            size *= 2

    def _prompt_ids(self, text: str, prompt: str) -> list[int]:
        """Return the ids of the tokens of prompt + text that start in the prompt, without its trailing spaces."""
        end = len(prompt.rstrip())
        size = self.size(0)
        while end:
            piece = prompt + text[:size]
            encoding = next(self._encode([piece]))
            count = bisect_left(encoding.offsets, end, key=lambda offset: offset[0])
            if len(text) <= size or count < self._stable_prefix(encoding, piece):
                return encoding.ids[:count]
            size *= 2
        return []

    def _stable_prefix(self, encoding: Encoding, piece: str) -> int:
        """Return the number of first tokens that a continuation of `piece` cannot change."""
        words = cast(list[int], encoding.word_ids)  # ascending; only special tokens would have None
        count = bisect_left(words, words[-1] - self._margin + 1) if words else 0
        # an added token that strips its left includes all spaces before it
        while count and not piece[slice(*encoding.offsets[count - 1])].strip():
            count -= 1
        return count

    def _stable_suffix(self, encoding: Encoding, piece: str) -> int:
        """Return the first token from which on no text before `piece` can change the tokens."""
        start = bisect_left(cast(list[int], encoding.word_ids), self._margin)
        while start < len(encoding) and not piece[slice(*encoding.offsets[start])].strip():
            start += 1
        return start
