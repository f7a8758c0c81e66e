"""Nomic's API: /v1/embedding/text, and /v1/user, which its client requests at login."""

from __future__ import annotations

from typing import Annotated, Literal

import orjson
from msgspec import Meta, Struct

from unpadded.server.api.openai import Dimensions
from unpadded.server.endpoint import Endpoint, RequestContext
from unpadded.server.responses import Response, binary_response, json_response, rows_response
from unpadded.server.service import Service


class TextRequest(Struct, forbid_unknown_fields=True):
    """Texts and their task."""

    texts: Annotated[list[str], Meta(min_length=1)]
    model: str | None = None
    task_type: str = "search_document"
    dimensionality: Dimensions | None = None
    long_text_mode: Literal["truncate", "mean"] = "truncate"


async def _embed_text(service: Service, request: TextRequest, context: RequestContext) -> Response:
    service.task_of_model(request.model)
    embeddings = await service.embed(
        list(request.texts),
        context.usage,
        task=request.task_type,
        dimensions=request.dimensionality,
        normalize=True,
        long_text=request.long_text_mode,
    )
    if (binary := binary_response(embeddings.vectors, context.accept)) is not None:
        return binary
    tokens = context.usage.tokens
    rest = {"usage": {"prompt_tokens": tokens, "total_tokens": tokens}, "model": request.model or service.model_name}
    return rows_response(embeddings.vectors, b'{"embeddings":[', b"]," + orjson.dumps(rest).removeprefix(b"{"))


async def _user(service: Service, request: None, context: RequestContext) -> Response:
    return json_response({"sub": "unpadded", "nickname": "unpadded", "organizations": []})


ENDPOINTS = [
    Endpoint(
        path="/v1/embedding/text",
        method="POST",
        api="nomic",
        summary="Embed texts for a task",
        handler=_embed_text,
        request_type=TextRequest,
    ),
    Endpoint(path="/v1/user", method="GET", api="nomic", summary="The owner of the API key", handler=_user),
]
