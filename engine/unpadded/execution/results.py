"""The results of an engine's calls, as arrays with what they belong to."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unpadded.checkpoint.sparse_head import SparseHead
from unpadded.errors import InputError, OptionError
from unpadded.options import Plan
from unpadded.quantization import quantize
from unpadded.tokenization.tokenizer import Tokenizer


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
    no_vectors = np.zeros((0, plan.vector_options.dimensions), np.float32)
    blocks = list(blocks) or [Embeddings(no_vectors, np.zeros(0, np.int64), np.zeros(0, bool))]
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Sparse:
    """Weights of vocabulary entries: those of text i are `weights[indptr[i] : indptr[i + 1]]`, of the entries `ids`."""

    indptr: np.ndarray  # [n + 1] int64
    ids: np.ndarray  # [nnz] int32, ascending per text
    weights: np.ndarray  # [nnz] fp32, above zero
    token_counts: np.ndarray  # [n] int64: tokens of each text, including prompt and special tokens
    truncated: np.ndarray  # [n] bool
    vocabulary: int  # number of entries
    tokenizer: Tokenizer = field(repr=False)

    def __len__(self) -> int:
        return len(self.token_counts)

    def tokens(self, index: int) -> list[tuple[str, float]]:
        """Return the tokens of a text with their weights, the heaviest first, equal ones by id."""
        part = slice(*self.indptr[range(len(self))[index] :][:2])
        pairs = sorted(zip((-self.weights[part]).tolist(), self.ids[part].tolist(), strict=True))
        return [(self.tokenizer.backend.id_to_token(id_) or "", -weight) for weight, id_ in pairs]

    def to_scipy(self) -> Any:
        """Return a scipy.sparse.csr_matrix with these weights: [n, vocabulary]; OptionError without scipy."""
        try:
            from scipy.sparse import csr_matrix
        except ImportError as error:
            raise OptionError(f"scipy is not installed: {error}; run pip install scipy, or use the arrays") from error
        return csr_matrix((self.weights, self.ids, self.indptr), shape=(len(self), self.vocabulary))


def terms(
    row: Any, ids: Any, head: SparseHead, excluded: list[int | None], top_k: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the entries of a text and their weights: [n] int32, ascending, and [n] fp32.

    row: from `wait_for_terms`, or [tokens, 1] fp32; ids: of the text, [tokens] int32; excluded: ids without a weight.
    """
    if head.log1p:
        entries, weights = row
        for _ in range(head.log1p):
            weights = np.log1p(weights, dtype=np.float64)
        weights = weights.astype(np.float32)
    else:
        entries, place = np.unique(ids, return_inverse=True)
        weights = np.zeros(len(entries), np.float32)
        np.maximum.at(weights, place, row[:, 0])
        kept = (weights != 0) & ~np.isin(entries, [id_ for id_ in excluded if id_ is not None])
        entries, weights = entries[kept], weights[kept]
    if top_k is None:
        return entries, weights
    best = np.sort(np.argsort(-weights, kind="stable")[:top_k])
    return entries[best], weights[best]


@dataclass(frozen=True, eq=False, repr=False)
class TokenVectors(Sequence[np.ndarray]):
    """The vectors of each text's tokens, a sequence of [tokens, dimensions] arrays, with their packed form."""

    vectors: np.ndarray  # [total, dimensions] fp32
    offsets: np.ndarray  # [n + 1] int64, the first vector of each text, then total
    token_counts: np.ndarray  # [n] int64: tokens embedded, of which some have no vector
    truncated: np.ndarray  # [n] bool

    def __len__(self) -> int:
        return len(self.token_counts)

    def __getitem__(self, index: Any) -> Any:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        return self.vectors[self.offsets[places] : self.offsets[places + 1]]

    def __repr__(self) -> str:
        (total, dimensions), truncated = self.vectors.shape, sum(self.truncated)
        return f"TokenVectors({len(self)} texts, {total} x {dimensions}, {truncated} truncated)"


def maxsim(query: np.ndarray, documents: Sequence[np.ndarray]) -> np.ndarray:
    """Return the score of each document: the sum over query vectors of the maximum dot product with its vectors.

    query: [tokens, dimensions], such as one of TokenVectors; documents: TokenVectors or a list of such arrays; an empty
    one scores 0. Returns [n] fp32. Raises InputError for arrays of other shapes.
    """
    shapes = [np.shape(query), *map(np.shape, documents)]
    if wrong := [shape for shape in shapes if len(shape) != 2 or shape[1:] != shapes[0][1:]]:
        raise InputError(
            f"shapes are not [tokens, dimensions] of one width: {shapes[0]}, {wrong[0]}; use encode_tokens"
        )
    return np.array([(document @ query.T).max(0).sum() if len(document) else 0 for document in documents], np.float32)
