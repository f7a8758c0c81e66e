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
    task_type: str | None = None  # None: --default-task, or search_document
    dimensionality: Dimensions | None = None
    long_text_mode: Literal["truncate", "mean"] | None = None  # None follows the server's --long-input


async def _embed_text(service: Service, request: TextRequest, context: RequestContext) -> Response:
    service.task_of_model(request.model)
    embeddings = await service.embed(
        list(request.texts),
        context.usage,
        truncate=request.long_text_mode == "truncate" or None,
        task=request.task_type or service.options.default_task or "search_document",
        dimensions=request.dimensionality,
        normalize=True,
        long_text=request.long_text_mode or "truncate",
    )
    if (binary := binary_response(embeddings.vectors, context.accept)) is not None:
        return binary
    rest = {"usage": context.usage.as_json(), "model": request.model or service.model_name}
    return rows_response(embeddings.vectors, b'{"embeddings":[', b"]," + orjson.dumps(rest).removeprefix(b"{"))


async def _user(service: Service, request: None, context: RequestContext) -> Response:
    return json_response({"sub": "unpadded", "nickname": "unpadded", "organizations": []})


ENDPOINTS = [
    Endpoint("nomic", "POST", "/v1/embedding/text", "Embed texts for a task", _embed_text, TextRequest),
    Endpoint("nomic", "GET", "/v1/user", "The owner of the API key", _user),
]
