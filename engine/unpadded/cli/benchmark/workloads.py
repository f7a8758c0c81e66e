"""Texts to measure with: English out of Python's own manual, cut to the lengths of a workload."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence

import numpy as np

from unpadded.engine import Engine

# Quantiles of the lengths of Python's 736 enhancement proposals in tokens, cut at 8192 (bench/lengths.txt).
DOCUMENTS = (962, 1852, 2421, 3414, 4576, 6042, 8025, 8192)
PASSAGE = 512  # tokens
QUERY = (8, 32)  # tokens, shortest and longest
TEXTS = {"queries": 1000, "paragraphs": 1000, "passages": 64, "documents": len(DOCUMENTS)}
PARAGRAPH_CHARACTERS = 40  # of the shortest that counts; what is below are headings
WORD_TOKENS = 6  # of the longest word that is kept; what is above are rules and tables


class TextSampler:
    """Cuts texts of given lengths in a model's tokens out of the manual, from places drawn from a seed."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        topics: dict[str, str] = pydoc_data.topics.topics
        blocks = [" ".join(block.split()) for name in sorted(topics) for block in topics[name].split("\n\n")]
        blocks = [block for block in blocks if len(block) >= PARAGRAPH_CHARACTERS]
        self._longest = engine.checkpoint.max_length
        self._prefix = engine.checkpoint.prompts.get("search_document", "")
        special = _counts(engine, [""])[0]
        self._around = _counts(engine, [self._prefix])[0]
        words = np.array(" ".join(blocks).split(), object)
        each = _counts(engine, words.tolist()) - special
        words, each = words[each <= WORD_TOKENS], each[each <= WORD_TOKENS]
        self._words = np.tile(words, 2)  # once more, for what is cut near the end
        self._before: np.ndarray = np.concatenate(([0], np.tile(each, 2).cumsum()))  # tokens before each word
        self._paragraphs = _counts(engine, blocks)
        self._draw = np.random.default_rng(seed)

    def workload(self, name: str, texts: int | None = None) -> list[str]:
        """queries (8 to 32 tokens), paragraphs (as long as the manual's, median 40), passages (512), documents."""
        texts = texts or TEXTS[name]
        if name == "queries":
            return self.cut(self._draw.integers(QUERY[0], QUERY[1] + 1, texts))
        if name == "paragraphs":
            return self.cut(self._draw.choice(self._paragraphs, texts))
        return self.cut(np.resize(PASSAGE if name == "passages" else DOCUMENTS, texts))

    def cut(self, lengths: Sequence[int] | np.ndarray) -> list[str]:
        """A text for each length, of at most so many tokens with prefix and special ones, and the model's longest."""
        found = []
        for length in lengths:
            start = self._draw.integers(len(self._words) // 2)
            room = self._before[start] + min(length, self._longest) - self._around
            end = int(np.searchsorted(self._before, room, side="right")) - 1
            found.append(self._prefix + " ".join(self._words[start : max(end, start + 1)]))
        return found


def _counts(engine: Engine, texts: Sequence[str]) -> np.ndarray:
    """Tokens of each text, the special ones included."""
    tokens = engine.tokenizer.encode(texts, max_length=engine.checkpoint.max_length)
    return np.array([len(text.ids) for text in tokens], np.int64)
