"""English texts of given lengths, sampled from Python's manual."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence

import numpy as np

from unpadded.engine import Engine

# Quantiles of the lengths of Python's 736 enhancement proposals in tokens, cut at 8192 (bench/lengths.txt).
DOCUMENTS = (962, 1852, 2421, 3414, 4576, 6042, 8025, 8192)
PASSAGE = 512  # tokens
QUERY = (8, 32)  # minimum and maximum tokens
TEXTS = {"queries": 1000, "paragraphs": 1000, "passages": 64, "documents": len(DOCUMENTS)}
PARAGRAPH_CHARACTERS = 40  # minimum of a paragraph; shorter blocks are headings
WORD_TOKENS = 6  # maximum of a word; longer ones are horizontal rules and tables


class TextSampler:
    """Samples texts of given lengths, in a model's tokens, from seeded positions in the manual."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        topics: dict[str, str] = pydoc_data.topics.topics
        blocks = [" ".join(block.split()) for name in sorted(topics) for block in topics[name].split("\n\n")]
        blocks = [block for block in blocks if len(block) >= PARAGRAPH_CHARACTERS]
        self._max_length = engine.checkpoint.max_length
        self._prefix = engine.checkpoint.prompts.get("search_document", "")
        special = _token_counts(engine, [""])[0]
        self._overhead = _token_counts(engine, [self._prefix])[0]  # tokens of the prefix and the special tokens
        words = np.array(" ".join(blocks).split(), object)
        unique, index = np.unique(words, return_inverse=True)
        tokens = (_token_counts(engine, unique.tolist()) - special)[index]
        words, tokens = words[tokens <= WORD_TOKENS], tokens[tokens <= WORD_TOKENS]
        self._words = np.tile(words, 2)  # twice, for texts that start near the end
        self._offsets: np.ndarray = np.concatenate(([0], np.tile(tokens, 2).cumsum()))  # tokens before each word
        self._paragraph_lengths = _token_counts(engine, blocks)
        self._draw = np.random.default_rng(seed)

    def workload(self, name: str, texts: int | None = None) -> list[str]:
        """Return the texts of queries (8 to 32 tokens), paragraphs (median 40), passages (512) or documents.

        texts: how many; by default the workload's number in `TEXTS`.
        """
        texts = texts or TEXTS[name]
        if name == "queries":
            return self.sample(self._draw.integers(QUERY[0], QUERY[1] + 1, texts))
        if name == "paragraphs":
            return self.sample(self._draw.choice(self._paragraph_lengths, texts))
        return self.sample(np.resize(PASSAGE if name == "passages" else DOCUMENTS, texts))

    def sample(self, lengths: Sequence[int] | np.ndarray) -> list[str]:
        """Return one text per length, with at most that many tokens, the prefix and special tokens included."""
        texts = []
        for length in lengths:
            start = self._draw.integers(len(self._words) // 2)
            limit = self._offsets[start] + min(length, self._max_length) - self._overhead
            end = int(np.searchsorted(self._offsets, limit, side="right")) - 1
            texts.append(self._prefix + " ".join(self._words[start : max(end, start + 1)]))
        return texts


def _token_counts(engine: Engine, texts: Sequence[str]) -> np.ndarray:
    """Return the number of tokens of each text, the special tokens included."""
    tokens = engine.tokenizer.encode(texts, max_length=engine.checkpoint.max_length)
    return np.array([len(text.ids) for text in tokens], np.int64)
