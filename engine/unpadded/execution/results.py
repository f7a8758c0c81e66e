"""The results of an engine's calls, as arrays with what they belong to."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from unpadded.errors import OptionError
from unpadded.options import Plan
from unpadded.quantization import quantize


@dataclass(frozen=True)
class Embeddings:
    """The vectors of texts, with the number of tokens of each text and whether it was truncated."""

    vectors: np.ndarray  # [n, dimensions] in the requested precision
    token_counts: np.ndarray  # [n] int64: tokens embedded, including prompt and special tokens
    truncated: np.ndarray  # [n] bool

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, index: Any) -> np.ndarray:
        vectors: np.ndarray = self.vectors[index]
        return vectors

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.vectors, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        texts, dimensions = self.vectors.shape
        return f"Embeddings({texts} x {dimensions}, {sum(self.token_counts)} tokens, {sum(self.truncated)} truncated)"


def join(blocks: Iterable[Embeddings], plan: Plan) -> Embeddings:
    """Concatenate blocks of fp32 vectors and quantize them together."""
    no_texts = Embeddings(
        np.zeros((0, plan.vector_options.dimensions), np.float32), np.zeros(0, np.int64), np.zeros(0, bool)
    )
    blocks = [no_texts, *blocks]
    return Embeddings(
        quantize(np.concatenate([block.vectors for block in blocks]), plan.precision, plan.ranges),
        np.concatenate([block.token_counts for block in blocks]),
        np.concatenate([block.truncated for block in blocks]),
    )


@dataclass(frozen=True)
class Spans:
    """The vectors of spans of texts: text after text, and the spans of each in the order that the caller gave."""

    vectors: np.ndarray  # [m, dimensions] fp32
    text_index: np.ndarray  # [m] int64
    bounds: np.ndarray  # [m, 2] int64: the first character in the text, and the one after the last
    token_counts: np.ndarray  # [m] int64: tokens of which a vector is the mean


@dataclass(frozen=True)
class Ranked:
    """A document of a ranking."""

    index: int
    score: float


def ranked(scores: np.ndarray, top_k: int | None = None) -> list[Ranked]:
    """Return the `top_k` best scores, or all: equal ones in their order. scores: [n]; OptionError for [n, labels]."""
    if scores.ndim > 1:
        raise OptionError(f"the model gives {scores.shape[1]} scores per pair, not one; use score")
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [Ranked(index, score) for index, score in zip(order.tolist(), scores[order].tolist(), strict=True)]
