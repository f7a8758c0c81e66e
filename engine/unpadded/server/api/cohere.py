"""Cohere's API: /v1/embed and /v2/embed, the rerankers, /v1/rerank and /v2/rerank, and Voyage's chunks.

The rerankers of Cohere, Jina and Voyage differ in the fields of a response and of an error, so all fields are sent.
"""

import base64
from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Annotated, Any, Literal

from msgspec import Meta, field

from unpadded.server.api.fields import Dimensions, Direction, Request, Texts
from unpadded.server.endpoint import Endpoint, RequestContext
from unpadded.server.errors import HTTPError
from unpadded.server.responses import Response, json_response, vectors_as
from unpadded.server.service import ServedModel


class EmbedTextsRequest(Request):
    """Texts, and the formats of their vectors."""

    texts: Texts
    task: str | None = field(default=None, name="input_type")  # ignored by a model without prompts
    embedding_types: list[Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]] | None = None
    dimensions: Dimensions | None = field(default=None, name="output_dimension")
    truncate: bool | None = None  # and "NONE", "START" or "END"; None follows --long-input
    truncation_direction: Direction | None = None


class ChunksRequest(Request):
    """Documents, each a list of its chunks, or queries, each in a list of its own."""

    inputs: Annotated[list[Texts], Meta(min_length=1)]
    task: Literal["query", "document"] | None = field(default=None, name="input_type")
    dimensions: Dimensions | None = field(default=None, name="output_dimension")
    output_dtype: Literal["float", "int8", "uint8", "binary", "ubinary"] | None = None
    encoding_format: Literal["base64"] | None = None


class RerankRequest(Request):
    """A query and the documents to rank for it: strings, or objects with a text."""

    query: str
    documents: Annotated[list[str | dict[str, Any]], Meta(min_length=1)]
    top_n: Annotated[int, Meta(ge=1)] | None = None  # None: all
    return_documents: bool | None = None  # None means False
    truncate: bool | None = None  # not in these APIs; None follows --long-input
    # Of the values in Cohere's API, those that do not change the scores.
    rank_fields: Annotated[list[Literal["text"]], Meta(min_length=1)] | None = None
    max_chunks_per_doc: Literal[1] | None = None
    max_tokens_per_doc: int | None = None


def _text(document: dict[str, Any], index: int) -> str:
    text = document.get("text")
    if not isinstance(text, str):
        raise HTTPError("invalid", f"document {index} has no text: {document!r:.80}; send a string or object with it")
    return text


def _options(model: ServedModel, request: Request, context: RequestContext) -> dict[str, Any]:
    options = request.keywords() | {"normalize": True}
    if not model.has_prompts and options.pop("task", None):  # the clients require it
        context.ignored_fields.append("input_type")
    return options


async def _embed(version: str, model: ServedModel, request: EmbedTextsRequest, context: RequestContext) -> Response:
    vectors = (await model.embed(request.texts, context.usage, **_options(model, request, context))).vectors
    kinds = request.embedding_types or (["float"] if version == "2" else [])

    def to_json() -> dict[str, Any]:
        found: Any = {kind: vectors_as(kind, vectors) for kind in kinds}
        tokens = {"input_tokens": context.usage.tokens}
        meta = {"api_version": {"version": version}, "tokens": tokens, "billed_units": tokens}
        rest = {"embeddings": found or vectors, "texts": request.texts, "meta": meta}
        return {"id": context.request_id, "response_type": f"embeddings_{'by_type' if kinds else 'floats'}", **rest}

    return json_response(to_json)


async def _embed_chunks(model: ServedModel, request: ChunksRequest, context: RequestContext) -> Response:
    vectors = await model.embed_chunks(request.inputs, context.usage, **_options(model, request, context))

    def to_json() -> dict[str, Any]:
        rows = vectors_as(request.output_dtype or "float", vectors)
        values = iter([base64.b64encode(row).decode() for row in rows] if request.encoding_format else rows)
        data = [_listed("embedding", "embedding", islice(values, len(chunks))) for chunks in request.inputs]
        rest = {"model": request.model or model.name, "usage": {"total_tokens": context.usage.tokens}}
        return {"object": "list", "data": _listed("list", "data", data), **rest}

    return json_response(to_json)


def _listed(kind: str, name: str, values: Iterable[Any]) -> list[dict[str, Any]]:
    return [{"object": kind, name: value, "index": index} for index, value in enumerate(values)]


async def _rerank(version: str, model: ServedModel, request: RerankRequest, context: RequestContext) -> Response:
    usage, limit, max_length = context.usage, request.max_tokens_per_doc, model.checkpoint.max_length
    if limit is not None and limit < max_length:
        raise HTTPError("invalid", f"max_tokens_per_doc is not supported below {max_length}: {limit}; omit it")
    documents = [{"text": document} if isinstance(document, str) else document for document in request.documents]
    texts = [_text(document, index) for index, document in enumerate(documents)]
    found = await model.rank(request.query, texts, usage, top_n=request.top_n, **request.keywords())
    results: list[dict[str, Any]] = [{"index": one.index, "relevance_score": one.score} for one in found]
    if request.return_documents:
        results = [result | {"document": documents[result["index"]]} for result in results]
    meta = {"api_version": {"version": version}, "tokens": {"input_tokens": usage.tokens, "output_tokens": 0}}
    rest = {"model": request.model or model.name, "usage": usage.as_json(), "meta": meta}
    return json_response({"id": context.request_id, "results": results, "object": "list", "data": results, **rest})


ENDPOINTS = [
    Endpoint("cohere", "/v1/embed", "Embed texts", partial(_embed, "1"), EmbedTextsRequest),
    Endpoint("cohere", "/v2/embed", "Embed texts", partial(_embed, "2"), EmbedTextsRequest),
    Endpoint("cohere", "/v1/contextualizedembeddings", "Embed chunks in context", _embed_chunks, ChunksRequest),
    Endpoint("cohere", "/v1/rerank", "Rank documents for a query", partial(_rerank, "1"), RerankRequest, "score"),
    Endpoint("cohere", "/v2/rerank", "Rank documents for a query", partial(_rerank, "2"), RerankRequest, "score"),
]
