"""Jina's and Cohere's APIs of rerankers: /v1/rerank of both, and Cohere's /v2/rerank.

They differ in the other fields of a response and in those of an error, so both have the fields of both APIs.
"""

from functools import partial
from typing import Annotated, Any, Literal

from msgspec import Meta

from unpadded.server.api.fields import Request
from unpadded.server.endpoint import Endpoint, RequestContext
from unpadded.server.errors import HTTPError
from unpadded.server.responses import Response, json_response
from unpadded.server.service import Service


class RerankDocumentsRequest(Request):
    """A query and the documents to rank for it: strings, or objects with a text."""

    query: str
    documents: Annotated[list[str | dict[str, Any]], Meta(min_length=1)]
    model: str | None = None
    top_n: Annotated[int, Meta(ge=1)] | None = None  # None: all
    return_documents: bool | None = None  # None means False
    truncate: bool | None = None  # not in these APIs; None follows --long-input
    # Of the values in Cohere's API, those that do not change the scores.
    rank_fields: Annotated[list[Literal["text"]], Meta(min_length=1)] | None = None
    max_chunks_per_doc: Literal[1] | None = None
    max_tokens_per_doc: int | None = None


def _text(document: str | dict[str, Any], index: int) -> str:
    text = document if isinstance(document, str) else document.get("text")
    if not isinstance(text, str):
        raise HTTPError(
            "invalid", f"document {index} has no text: {document!r:.80}; send a string or an object with it"
        )
    return text


async def _rerank(version: str, service: Service, request: RerankDocumentsRequest, context: RequestContext) -> Response:
    limit, max_length = request.max_tokens_per_doc, service.engine.checkpoint.max_length
    if limit is not None and limit < max_length:
        raise HTTPError("invalid", f"max_tokens_per_doc is not supported below {max_length}: {limit}; omit it")
    documents, usage = request.documents, context.usage
    texts = [_text(document, index) for index, document in enumerate(documents)]
    found = await service.rank(request.query, texts, usage, top_n=request.top_n, **request.keywords())
    results: list[dict[str, Any]] = [{"index": one.index, "relevance_score": one.score} for one in found]
    if request.return_documents:
        for result in results:
            document = documents[result["index"]]
            result["document"] = {"text": document} if isinstance(document, str) else document
    meta = {"api_version": {"version": version}, "tokens": {"input_tokens": usage.tokens, "output_tokens": 0}}
    rest = {"model": request.model or service.model_name, "usage": usage.as_json(), "meta": meta}
    return json_response({"id": context.request_id, "results": results, **rest})


ENDPOINTS = [
    Endpoint(
        "rerank", f"/v{n}/rerank", "Documents by their score, best first", partial(_rerank, n), RerankDocumentsRequest
    )
    for n in "12"
]
