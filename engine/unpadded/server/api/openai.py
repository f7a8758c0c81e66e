"""OpenAI's API: /v1/embeddings and /v1/models."""

import base64
from typing import Any, Literal

from unpadded.server.api.fields import Dimensions, Direction, Input, Request
from unpadded.server.endpoint import Endpoint, RequestContext
from unpadded.server.responses import Response, json_response, vectors_response
from unpadded.server.service import Service


class EmbeddingsRequest(Request):
    """Texts, or token ids of the served model, special tokens included."""

    input: Input
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Dimensions | None = None
    # Not in OpenAI's API: the name of one of the model's prompts, such as search_query, and the options of TEI.
    task: str | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    normalize: bool | None = None


async def _embeddings(service: Service, request: EmbeddingsRequest, context: RequestContext) -> Response:
    vectors = (await service.embed(request.input, context.usage, **request.keywords())).vectors

    def to_json() -> dict[str, Any]:
        rows: list[Any] = list(vectors.astype("<f4", copy=False))
        if request.encoding_format == "base64":
            rows = [base64.b64encode(row).decode() for row in rows]
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
        rest = {"model": request.model or service.model_name, "usage": context.usage.as_json()}
        return {"object": "list", "data": data, **rest}

    return vectors_response(vectors, context.headers, to_json)


def _model(service: Service, name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": service.created, "owned_by": "unpadded"}


async def _models(service: Service, request: None, context: RequestContext) -> Response:
    return json_response({"object": "list", "data": [_model(service, name) for name in service.model_names]})


async def _one_model(service: Service, request: None, context: RequestContext) -> Response:
    name = context.path_params["name"]
    service.task_of_model(name)  # raises for an unknown model
    return json_response(_model(service, name))


ENDPOINTS = [
    Endpoint("openai", "/v1/embeddings", "Embed texts", _embeddings, EmbeddingsRequest),
    Endpoint("openai", "/embeddings", "Embed texts", _embeddings, EmbeddingsRequest),
    Endpoint("openai", "/v1/models", "The names of the served model", _models),
    Endpoint("openai", "/v1/models/{name:path}", "One name of the served model", _one_model),
]
