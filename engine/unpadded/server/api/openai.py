"""OpenAI's interface: /v1/embeddings and /v1/models."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct

from unpadded.server.endpoint import Endpoint, Exchange
from unpadded.server.errors import Problem
from unpadded.server.responses import Response, binary_response, json_response, openai_response
from unpadded.server.service import Service, as_texts

TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Dimensions: TypeAlias = Annotated[int, Meta(ge=1, le=2**16)]
Input: TypeAlias = str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]

HOSTED = "text-embedding-"  # the names of OpenAI's own models, whose clients send ids of OpenAI's tokenizer


class EmbeddingsRequest(Struct, forbid_unknown_fields=True):
    """Texts, or token ids of the served model, special tokens included."""

    input: Input
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Dimensions | None = None
    user: str | None = None
    task: str | None = None  # beyond OpenAI's: search_query, search_document ... or a prompt of the model


async def _embeddings(service: Service, request: EmbeddingsRequest, exchange: Exchange) -> Response:
    task = service.resolve(request.model)
    if task is not None and request.task not in (None, task):
        raise Problem("invalid", f"two tasks are named: {task!r} by the model, {request.task!r} by task; name one")
    texts = as_texts(request.input)
    if (request.model or "").startswith(HOSTED) and not all(isinstance(text, str) for text in texts):
        raise Problem(
            "invalid",
            f"token ids came for {request.model!r}, whose tokenizer the served model does not have; send text "
            "(LangChain: check_embedding_ctx_length=False)",
        )
    found = await service.embed(texts, exchange.usage, task=task or request.task, dimensions=request.dimensions)
    if (binary := binary_response(found.vectors, exchange.accept)) is not None:
        return binary
    encoding_format = request.encoding_format or "float"
    return openai_response(found.vectors, encoding_format, request.model or service.name, exchange.usage.tokens)


def _model(service: Service, name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": service.created, "owned_by": "unpadded"}


async def _models(service: Service, request: None, exchange: Exchange) -> Response:
    return json_response({"object": "list", "data": [_model(service, name) for name in service.names]})


async def _one_model(service: Service, request: None, exchange: Exchange) -> Response:
    name = exchange.path_params["name"]
    service.resolve(name)
    return json_response(_model(service, name))


ENDPOINTS = [
    Endpoint(
        path=path, method="POST", interface="openai", summary="Embed", handler=_embeddings, request=EmbeddingsRequest
    )
    for path in ("/v1/embeddings", "/embeddings")
] + [
    Endpoint(path="/v1/models", method="GET", interface="openai", summary="The served names", handler=_models),
    Endpoint(path="/v1/models/{name:path}", method="GET", interface="openai", summary="One name", handler=_one_model),
]
