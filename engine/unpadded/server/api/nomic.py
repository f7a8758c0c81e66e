"""Nomic's interface: /v1/embedding/text, and /v1/user, which its client asks for as it starts."""

from __future__ import annotations

from typing import Annotated, Literal

import orjson
from msgspec import Meta, Struct

from unpadded.server.api.openai import Dimensions
from unpadded.server.endpoint import Endpoint, Exchange
from unpadded.server.responses import Response, binary_response, json_response, rows_response
from unpadded.server.service import Service


class TextRequest(Struct, forbid_unknown_fields=True):
    """Texts with their task."""

    texts: Annotated[list[str], Meta(min_length=1)]
    model: str | None = None
    task_type: str = "search_document"
    dimensionality: Dimensions | None = None
    long_text_mode: Literal["truncate", "mean"] = "truncate"


async def _text(service: Service, request: TextRequest, exchange: Exchange) -> Response:
    service.resolve(request.model)
    found = await service.embed(
        list(request.texts),
        exchange.usage,
        task=request.task_type,
        dimensions=request.dimensionality,
        normalize=True,
        long_text=request.long_text_mode,
    )
    if (binary := binary_response(found.vectors, exchange.accept)) is not None:
        return binary
    tokens = exchange.usage.tokens
    rest = {"usage": {"prompt_tokens": tokens, "total_tokens": tokens}, "model": request.model or service.name}
    return rows_response(found.vectors, b'{"embeddings":[', b"]," + orjson.dumps(rest).removeprefix(b"{"))


async def _user(service: Service, request: None, exchange: Exchange) -> Response:
    return json_response({"sub": "unpadded", "nickname": "unpadded", "organizations": []})


ENDPOINTS = [
    Endpoint(
        path="/v1/embedding/text",
        method="POST",
        interface="nomic",
        summary="Embed texts for a task",
        handler=_text,
        request=TextRequest,
    ),
    Endpoint(path="/v1/user", method="GET", interface="nomic", summary="Who the key belongs to", handler=_user),
]
