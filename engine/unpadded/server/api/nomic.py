"""Nomic's API: /v1/embedding/text, and /v1/user, which its client requests at login."""

from msgspec import field

from unpadded.server.api.fields import Dimensions, Request, Texts
from unpadded.server.endpoint import Endpoint, RequestContext
from unpadded.server.errors import HTTPError
from unpadded.server.responses import Response, json_response, vectors_response
from unpadded.server.service import ServedModel


class TextRequest(Request):
    """Texts and their task."""

    texts: Texts
    task: str | None = field(default=None, name="task_type")  # None: --default-task, or search_document
    dimensions: Dimensions | None = field(default=None, name="dimensionality")
    long_text_mode: str | None = None  # None follows --long-input


async def _embed_text(model: ServedModel, request: TextRequest, context: RequestContext) -> Response:
    if (mode := request.long_text_mode) not in (None, "truncate"):
        raise HTTPError("invalid", f"long_text_mode is not supported: {mode!r}; use 'truncate', or split long texts")
    options = request.keywords() | {"truncate": mode and True, "normalize": True}
    embeddings = await model.embed(request.texts, context.usage, **options, fallback_task="search_document")
    rest = {"usage": context.usage.as_json(), "model": request.model or model.name}
    return vectors_response(embeddings.vectors, context.headers, lambda: {"embeddings": embeddings.vectors, **rest})


async def _user(model: ServedModel, request: None, context: RequestContext) -> Response:
    return json_response({"sub": "unpadded", "nickname": "unpadded", "organizations": []})


ENDPOINTS = [
    Endpoint("nomic", "/v1/embedding/text", "Embed texts for a task", _embed_text, TextRequest),
    Endpoint("nomic", "/v1/user", "The owner of the API key", _user),
]
