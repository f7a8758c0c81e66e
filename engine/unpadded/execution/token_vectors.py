"""Token vectors of late-interaction models: the plan of a call, and which vectors of a text are kept or merged."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypedDict, get_args

import numpy as np

from unpadded.checkpoint.modules import reject_pickle
from unpadded.checkpoint.reader import Checkpoint
from unpadded.checkpoint.token_head import BGE_LINEAR, UNATTENDED, TokenPooling
from unpadded.errors import ConfigError, OptionError
from unpadded.options import EncodeOptions, Plan, VectorOptions, check_choice
from unpadded.tokenization.tokenizer import Tokenizer

Kind = Literal["document", "query"]


class TokenKeywords(TypedDict, total=False):
    """The keyword arguments of `encode_tokens`."""

    kind: Kind
    pool_factor: float
    prompt: str | None
    truncation: Literal["right", "error"]


def make_token_plan(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    kind: Kind = "document",
    pool_factor: float = 1,
    prompt: str | None = None,
    truncation: Literal["right", "error"] = "right",
) -> tuple[Plan, Callable[[Any, np.ndarray], np.ndarray]]:
    """Check the options of `Engine.encode_tokens` against a checkpoint.

    Return the plan, and a function from the token ids of a text and their vectors to the vectors that are kept.
    """
    head = checkpoint.tokens
    if head is None:
        reject_pickle(checkpoint.folder, BGE_LINEAR)
        raise OptionError(
            f"{checkpoint.name} has no head for token vectors; load a late-interaction model such as ColBERT, convert "
            f"bge-m3's {BGE_LINEAR}.pt to safetensors, or use token_embeddings for hidden states"
        )
    check_choice("kind", kind, get_args(Kind))
    check_choice("truncation", truncation, ("right", "error"))
    if not pool_factor >= 1 or (pool_factor > 1 and kind == "query"):
        raise OptionError(f"pool_factor is {pool_factor} for kind={kind!r}; pass 1, or more for documents")

    def ids_of(words: Sequence[str]) -> list[int]:
        return [id_ for word in words if (id_ := tokenizer.backend.token_to_id(word)) is not None]

    expansion = None
    if head.expansion is not None and kind == "query":
        length, attend, tokens = head.expansion
        if not (ids := ids_of(tokens)):
            raise ConfigError(f"queries are expanded by {' or '.join(tokens)}, which the tokenizer lacks; add it")
        expansion = min(length, head.max_lengths[kind]), ids[0] + (0 if attend else UNATTENDED)
    prompt = checkpoint.prompts.get(kind, "") if prompt is None else prompt
    rows = VectorOptions(dimensions=head.dimensions, normalize=head.normalize, head="tokens", rows="token")
    options = vars(EncodeOptions(truncation=truncation)) | {"prompt": prompt}
    plan = Plan(**options, vector_options=rows, max_length=head.max_lengths[kind], expansion=expansion)
    pooling = [head.pooling[kind]] if kind in head.pooling else []
    pooling += [TokenPooling(pool_factor)] if pool_factor > 1 else []
    return plan, partial(_reduce, ids_of(head.skip_words.get(kind, ())), head.skip_first, pooling)


def _reduce(
    skipped: Sequence[int], skip_first: bool, poolings: Sequence[TokenPooling], ids: Any, vectors: np.ndarray
) -> np.ndarray:
    """Return the vectors of a text that are kept. skipped: ids of tokens whose vectors are dropped."""
    kept = ~np.isin(ids, skipped)
    kept[0] &= not skip_first
    vectors = vectors[kept]
    for pooling in poolings:
        vectors = pool_tokens(vectors, *pooling)
    return vectors


def pool_tokens(vectors: np.ndarray, factor: float, protected: int, normalize: bool) -> np.ndarray:
    """Replace clusters of vectors by their means, as sentence-transformers does: see `TokenPooling`.

    vectors: [tokens, dimensions] fp32 of length 1, clustered by Ward linkage on cosine distances.
    """
    first, rest = np.split(vectors, [protected])
    if (clusters := max(int(len(rest) // factor), 1)) < len(rest):
        try:
            from scipy.cluster.hierarchy import fcluster, linkage
            from scipy.spatial.distance import squareform
        except ImportError as error:
            raise OptionError(f"pool_factor = {factor} needs scipy: {error}; run pip install scipy") from error
        distances = squareform(np.clip(1 - rest @ rest.T, 0, 2), checks=False)
        labels = fcluster(linkage(distances, "ward"), clusters, "maxclust")
        means = [rest[labels == label].mean(0, dtype=np.float32) for label in np.unique(labels)]
        vectors = np.concatenate([first, means])
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12) if normalize else vectors
