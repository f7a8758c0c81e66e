"""OpenAI's API: /v1/embeddings and /v1/models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct

from unpadded.server.endpoint import Endpoint, RequestContext
from unpadded.server.errors import HTTPError
from unpadded.server.responses import Response, binary_response, json_response, openai_response
from unpadded.server.service import Service, to_texts
from unpadded.tokenization.windows import Text

TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Dimensions: TypeAlias = Annotated[int, Meta(ge=1, le=2**16)]
Input: TypeAlias = str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
Direction: TypeAlias = Literal["right", "left", "Right", "Left"]

# Clients of OpenAI's own models may send token ids of OpenAI's tokenizer.
OPENAI_MODEL_PREFIX = "text-embedding-"


class EmbeddingsRequest(Struct, forbid_unknown_fields=True):
    """Texts, or token ids of the served model, special tokens included."""

    input: Input
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Dimensions | None = None
    user: str | None = None
    # Not in OpenAI's API: the name of one of the model's prompts, such as search_query, and the options of TEI.
    task: str | None = None
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    normalize: bool | None = None


def side(direction: Direction | None) -> Literal["right", "left"]:
    """Return the end of a text that is cut off."""
    return "left" if direction in ("left", "Left") else "right"


def check_token_ids(service: Service, texts: Sequence[Text], model: str | None = None) -> None:
    """Raise HTTPError for token ids that the served model's tokenizer does not make: those of another vocabulary."""
    foreign = (model or "").startswith(OPENAI_MODEL_PREFIX)
    for index, text in enumerate(texts):
        if not isinstance(text, str) and (foreign or not service.engine.tokenizer.could_return(text)):
            raise HTTPError(
                "invalid",
                f"text {index} is token ids that the served model's tokenizer does not make, special tokens included: "
                f"{list(text[:8])}{' ...' if len(text) > 8 else ''}; send text (LangChain: "
                "OpenAIEmbeddings(check_embedding_ctx_length=False))",
            )


async def _embeddings(service: Service, request: EmbeddingsRequest, context: RequestContext) -> Response:
    task = service.task_of_model(request.model)
    if task is not None and request.task not in (None, task):
        raise HTTPError("invalid", f"the request has two tasks: {task!r} in model, {request.task!r} in task; send one")
    if request.user is not None:
        context.ignored_fields.append("user")
    texts = to_texts(request.input)
    check_token_ids(service, texts, request.model)
    embeddings = await service.embed(
        texts,
        context.usage,
        truncate=request.truncate,
        task=task or request.task,
        dimensions=request.dimensions,
        normalize=request.normalize,
        truncation=side(request.truncation_direction),
    )
    if (binary := binary_response(embeddings.vectors, context.accept)) is not None:
        return binary
    encoding_format = request.encoding_format or "float"
    return openai_response(embeddings.vectors, encoding_format, request.model or service.model_name, context.usage)


def _model(service: Service, name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": service.created, "owned_by": "unpadded"}


async def _models(service: Service, request: None, context: RequestContext) -> Response:
    return json_response({"object": "list", "data": [_model(service, name) for name in service.model_names]})


async def _one_model(service: Service, request: None, context: RequestContext) -> Response:
    name = context.scope["path_params"]["name"]
    service.task_of_model(name)
    return json_response(_model(service, name))


ENDPOINTS = [
    Endpoint("openai", "POST", "/v1/embeddings", "Embed texts", _embeddings, EmbeddingsRequest),
    Endpoint("openai", "POST", "/embeddings", "Embed texts", _embeddings, EmbeddingsRequest),
    Endpoint("openai", "GET", "/v1/models", "The names of the served model", _models),
    Endpoint("openai", "GET", "/v1/models/{name:path}", "One name of the served model", _one_model),
]
