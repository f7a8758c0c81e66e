"""UnpaddedEmbeddings: an engine as LangChain's Embeddings."""

from __future__ import annotations

from langchain_core.embeddings import Embeddings

from unpadded.engine import Engine
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
