"""OpenAI's API: /v1/embeddings, with the fields of Jina's, and /v1/models."""

from typing import Any, Literal

from unpadded.server.api.fields import Dimensions, Direction, Input, Request
from unpadded.server.endpoint import Endpoint, RequestContext
from unpadded.server.errors import HTTPError
from unpadded.server.responses import Response, json_response, vectors_as, vectors_response
from unpadded.server.service import ServedModel


class EmbeddingsRequest(Request):
    """Texts, or token ids of the served model, special tokens included."""

    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Dimensions | None = None
    # Not in OpenAI's API: a task, such as search_query or retrieval.query, and other options of TEI and Jina.
    task: str | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    normalize: bool | None = None
    embedding_type: Literal["float", "base64", "binary", "ubinary"] | None = None
    late_chunking: bool | None = None


async def _embeddings(model: ServedModel, request: EmbeddingsRequest, context: RequestContext) -> Response:
    formats = [*{request.encoding_format, request.embedding_type} - {None, "float"}, "float"]
    if len(formats) > 2:
        raise HTTPError(
            "invalid", f"embedding_type is {request.embedding_type!r} with base64; send encoding_format 'float'"
        )
    texts: Any = [request.input] if isinstance(request.input, str) else request.input
    if not request.late_chunking:
        vectors = (await model.embed(texts, context.usage, **request.keywords())).vectors
    elif wrong := [item for item in texts if not isinstance(item, str)]:
        raise HTTPError("invalid", f"late_chunking is not supported for token ids: {wrong[0]!r:.80}; send strings")
    else:
        vectors = await model.embed_chunks([texts], context.usage, **request.keywords())

    def to_json() -> dict[str, Any]:
        rows = vectors_as(formats[0], vectors)
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
        rest = {"model": request.model or model.name, "usage": context.usage.as_json()}
        return {"object": "list", "data": data, **rest}

    if request.embedding_type in ("binary", "ubinary"):
        return json_response(to_json)
    return vectors_response(vectors, context.headers, to_json)


def _model(model: ServedModel, name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": model.service.created, "owned_by": "unpadded"}


async def _models(model: ServedModel, request: None, context: RequestContext) -> Response:
    return json_response({"object": "list", "data": [_model(model, name) for name in model.service.names]})


async def _one_model(model: ServedModel, request: None, context: RequestContext) -> Response:
    name = context.path_params["name"]
    model = model.service.find(name)
    model.pipeline.plan(**model.task_options(model.task_of_name(name)))  # raises for an unknown task
    return json_response(_model(model, name))


ENDPOINTS = [
    Endpoint("openai", "/v1/embeddings", "Embed texts", _embeddings, EmbeddingsRequest),
    Endpoint("openai", "/embeddings", "Embed texts", _embeddings, EmbeddingsRequest),
    Endpoint("openai", "/v1/models", "The names of the served models", _models),
    Endpoint("openai", "/v1/models/{name:path}", "One name of a served model", _one_model),
]
