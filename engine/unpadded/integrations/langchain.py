"""An engine as LangChain's Embeddings, cross encoder and document compressor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.embeddings import Embeddings
from pydantic import ConfigDict, PositiveInt

from unpadded.engine import Engine
from unpadded.execution.results import Ranked, ranked
from unpadded.options import EncodeKeywords

# Names of the tasks in nomic, jina-embeddings-v3 and sentence-transformers checkpoints.
QUERY = ("search_query", "retrieval.query", "query")
DOCUMENT = ("search_document", "retrieval.passage", "document")


class UnpaddedEmbeddings(Embeddings):  # type: ignore[misc, unused-ignore]  # Any where the package is absent
    """An engine for LangChain's vector stores and retrievers.

    query, document: options of `Engine.encode` for queries and for documents; None uses the checkpoint's tasks.
    """

    def __init__(
        self, engine: Engine, *, query: EncodeKeywords | None = None, document: EncodeKeywords | None = None
    ) -> None:
        self.engine = engine
        self.query = _task_options(engine, QUERY) if query is None else query
        self.document = _task_options(engine, DOCUMENT) if document is None else document

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return list(self.engine.encode(texts, output="list", show_progress=False, **self.document))

    def embed_query(self, text: str) -> list[float]:
        return list(self.engine.encode(text, output="list", show_progress=False, **self.query))

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        return list((await self.engine.aencode(texts, **self.document)).tolist())

    async def aembed_query(self, text: str) -> list[float]:
        return list((await self.engine.aencode(text, **self.query)).tolist())


def _task_options(engine: Engine, names: tuple[str, ...]) -> EncodeKeywords:
    """Return options with the first of the tasks that the checkpoint has."""
    task = next((name for name in names if name in engine.checkpoint.prompts), None)
    return EncodeKeywords() if task is None else EncodeKeywords(task=task)


class UnpaddedCrossEncoder(BaseCrossEncoder):  # type: ignore[misc, unused-ignore]
    """An engine of a reranker for LangChain's CrossEncoderReranker."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        engine.rank("", [])  # raises OptionError unless the model gives one score per pair

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        return list(self.engine.score(text_pairs, show_progress=False).tolist())


class UnpaddedReranker(BaseDocumentCompressor):  # type: ignore[misc, unused-ignore]
    """An engine of a reranker for LangChain's ContextualCompressionRetriever.

    Returns copies of the `top_n` best documents, or of all, best first, with their score as `relevance_score` in the
    metadata. `top_n` is LangChain's name of `top_k`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    engine: Engine
    top_n: PositiveInt | None = None

    def compress_documents(self, documents: Sequence[Document], query: str, callbacks: Any = None) -> list[Document]:
        scores = self.engine.score(_pairs(query, documents), show_progress=False)
        return _scored(documents, ranked(scores, self.top_n))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Any = None
    ) -> list[Document]:
        scores = await self.engine.ascore(_pairs(query, documents))
        return _scored(documents, ranked(scores, self.top_n))


def _pairs(query: str, documents: Sequence[Document]) -> list[tuple[str, str]]:
    return [(query, document.page_content) for document in documents]


def _scored(documents: Sequence[Document], best: list[Ranked]) -> list[Document]:
    """Return copies of the best documents with their scores."""
    found = [(documents[one.index], {"relevance_score": one.score}) for one in best]
    return [document.model_copy(update={"metadata": document.metadata | score}) for document, score in found]
