"""OpenAI's API: /v1/embeddings and /v1/models."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct

from unpadded.server.endpoint import Endpoint, Handler, RequestContext
from unpadded.server.errors import HTTPError
from unpadded.server.responses import Response, binary_response, json_response, openai_response
from unpadded.server.service import Service, to_texts

TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Dimensions: TypeAlias = Annotated[int, Meta(ge=1, le=2**16)]
Input: TypeAlias = str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]

# Clients of OpenAI's own models may send token ids of OpenAI's tokenizer.
OPENAI_MODEL_PREFIX = "text-embedding-"


class EmbeddingsRequest(Struct, forbid_unknown_fields=True):
    """Texts, or token ids of the served model, special tokens included."""

    input: Input
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Dimensions | None = None
    user: str | None = None
    task: str | None = None  # not in OpenAI's API: the name of one of the model's prompts, such as search_query


async def _embeddings(service: Service, request: EmbeddingsRequest, context: RequestContext) -> Response:
    task = service.task_of_model(request.model)
    if task is not None and request.task not in (None, task):
        raise HTTPError("invalid", f"the request has two tasks: {task!r} in model, {request.task!r} in task; send one")
    texts = to_texts(request.input)
    if (request.model or "").startswith(OPENAI_MODEL_PREFIX) and not all(isinstance(text, str) for text in texts):
        raise HTTPError(
            "invalid",
            f"the input is token ids for {request.model!r}, but the served model has another tokenizer; send text "
            "(LangChain: check_embedding_ctx_length=False)",
        )
    embeddings = await service.embed(texts, context.usage, task=task or request.task, dimensions=request.dimensions)
    if (binary := binary_response(embeddings.vectors, context.accept)) is not None:
        return binary
    encoding_format = request.encoding_format or "float"
    return openai_response(
        embeddings.vectors, encoding_format, request.model or service.model_name, context.usage.tokens
    )


def _model(service: Service, name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": service.created, "owned_by": "unpadded"}


async def _models(service: Service, request: None, context: RequestContext) -> Response:
    return json_response({"object": "list", "data": [_model(service, name) for name in service.model_names]})


async def _one_model(service: Service, request: None, context: RequestContext) -> Response:
    name = context.path_params["name"]
    service.task_of_model(name)
    return json_response(_model(service, name))


def _get(path: str, summary: str, handler: Handler) -> Endpoint:
    return Endpoint(path=path, method="GET", api="openai", summary=summary, handler=handler)


def _post(path: str, summary: str, handler: Handler, request_type: type[Struct]) -> Endpoint:
    return Endpoint(path=path, method="POST", api="openai", summary=summary, handler=handler, request_type=request_type)


ENDPOINTS = [
    _post("/v1/embeddings", "Embed texts", _embeddings, EmbeddingsRequest),
    _post("/embeddings", "Embed texts", _embeddings, EmbeddingsRequest),
    _get("/v1/models", "The names of the served model", _models),
    _get("/v1/models/{name:path}", "One name of the served model", _one_model),
]
