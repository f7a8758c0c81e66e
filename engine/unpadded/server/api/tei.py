"""The API of text-embeddings-inference (TEI)."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from msgspec import Meta, Struct

import unpadded
from unpadded.execution.batcher import MAX_READERS
from unpadded.server.api.openai import Dimensions, Input, TokenId
from unpadded.server.endpoint import Endpoint, RequestContext
from unpadded.server.errors import HTTPError
from unpadded.server.responses import Response, binary_response, json_response, rows_response
from unpadded.server.service import Service, to_texts

Direction: TypeAlias = Literal["right", "left", "Right", "Left"]

MAX_LISTED_TOKENS = 1_000_000  # per /tokenize


class EmbedRequest(Struct, forbid_unknown_fields=True):
    """Texts, or token ids that include the special tokens."""

    inputs: Input
    truncate: bool | None = None  # None follows the server's --long-input
    truncation_direction: Direction | None = None
    normalize: bool | None = None  # None means True
    prompt_name: str | None = None
    dimensions: Dimensions | None = None


class EmbedAllRequest(Struct, forbid_unknown_fields=True):
    """Texts for which token vectors are returned."""

    inputs: Input
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None


class SimilarityInputs(Struct, forbid_unknown_fields=True):
    """A sentence and the sentences to compare it with."""

    source_sentence: str
    sentences: Annotated[list[str], Meta(min_length=1)]


class SimilarityParameters(Struct, forbid_unknown_fields=True):
    """Options of /similarity."""

    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None


class SimilarityRequest(Struct, forbid_unknown_fields=True):
    """Input and options of /similarity."""

    inputs: SimilarityInputs
    parameters: SimilarityParameters | None = None


class RootRequest(Struct, forbid_unknown_fields=True):
    """The request of huggingface_hub's client to the root URL: embed, or compare sentences."""

    inputs: Input | SimilarityInputs
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    normalize: bool | None = None
    prompt_name: str | None = None
    dimensions: Dimensions | None = None
    parameters: SimilarityParameters | None = None


class TokenizeRequest(Struct, forbid_unknown_fields=True):
    """Texts to tokenize."""

    inputs: str | Annotated[list[str], Meta(min_length=1)]
    add_special_tokens: bool = True
    prompt_name: str | None = None


class DecodeRequest(Struct, forbid_unknown_fields=True):
    """Token ids to decode."""

    ids: Annotated[list[TokenId | list[TokenId]], Meta(min_length=1)]
    skip_special_tokens: bool = True


def _side(direction: Direction | None) -> Literal["right", "left"]:
    return "left" if direction in ("left", "Left") else "right"


async def _embed(service: Service, request: EmbedRequest, context: RequestContext) -> Response:
    embeddings = await service.embed(
        to_texts(request.inputs),
        context.usage,
        truncate=request.truncate,
        dimensions=request.dimensions,
        normalize=request.normalize is not False,
        task=request.prompt_name,
        truncation=_side(request.truncation_direction),
    )
    return binary_response(embeddings.vectors, context.accept) or rows_response(embeddings.vectors)


async def _embed_all(service: Service, request: EmbedAllRequest, context: RequestContext) -> Response:
    rows = await service.embed_tokens(
        to_texts(request.inputs),
        context.usage,
        truncate=request.truncate,
        task=request.prompt_name,
        truncation=_side(request.truncation_direction),
    )
    return rows_response(rows)


async def _similarity(service: Service, request: SimilarityRequest, context: RequestContext) -> Response:
    parameters = request.parameters or SimilarityParameters()
    embeddings = await service.embed(
        [request.inputs.source_sentence, *request.inputs.sentences],
        context.usage,
        truncate=parameters.truncate,
        normalize=True,
        task=parameters.prompt_name,
        truncation=_side(parameters.truncation_direction),
    )
    return json_response(embeddings.vectors[1:] @ embeddings.vectors[0])


async def _root(service: Service, request: RootRequest, context: RequestContext) -> Response:
    if isinstance(request.inputs, SimilarityInputs):
        return await _similarity(service, SimilarityRequest(request.inputs, request.parameters), context)
    if request.parameters is not None:
        raise HTTPError("invalid", "parameters need inputs with source_sentence; send the options next to inputs")
    embed = EmbedRequest(
        request.inputs,
        request.truncate,
        request.truncation_direction,
        request.normalize,
        request.prompt_name,
        request.dimensions,
    )
    return await _embed(service, embed, context)


async def _tokenize(service: Service, request: TokenizeRequest, context: RequestContext) -> Response:
    texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
    prompt = service.pipeline.plan(task=request.prompt_name).prompt
    backend = service.engine.tokenizer.backend
    loop = asyncio.get_running_loop()
    prompted = [prompt + text for text in texts]
    encodings = await loop.run_in_executor(
        service.batcher.readers,
        lambda: backend.encode_batch(prompted, add_special_tokens=request.add_special_tokens),
    )
    total = sum(map(len, encodings))
    if total > MAX_LISTED_TOKENS:
        raise HTTPError(
            "too_many_inputs",
            f"the response would list too many tokens: {total}, maximum {MAX_LISTED_TOKENS}; send fewer texts",
        )
    tokens = [_token_objects(encoding, text) for encoding, text in zip(encodings, prompted, strict=True)]
    return json_response(tokens)


def _token_objects(encoding: Any, text: str) -> list[dict[str, object]]:
    tokens: list[dict[str, object]] = []
    for id_, token, special, (start, stop) in zip(
        encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True
    ):
        if special:
            tokens.append({"id": id_, "text": token, "special": True, "start": None, "stop": None})
        else:
            tokens.append({"id": id_, "text": text[start:stop], "special": False, "start": start, "stop": stop})
    return tokens


async def _decode(service: Service, request: DecodeRequest, context: RequestContext) -> Response:
    sequences = [np.asarray(ids).tolist() for ids in to_texts(request.ids)]
    backend = service.engine.tokenizer.backend
    return json_response(backend.decode_batch(sequences, skip_special_tokens=request.skip_special_tokens))


async def _info(service: Service, request: None, context: RequestContext) -> Response:
    options, description = service.options, service.description
    return json_response(
        {
            "model_id": service.model_name,
            "model_sha": None,
            "model_dtype": description["dtype"],
            "device": description["device"],
            "model_type": {"embedding": {"pooling": description["pooling"]}},
            "max_concurrent_requests": options.max_concurrent_requests,
            "max_input_length": description["max_length"],
            "max_batch_tokens": description["token_budget"],
            "max_batch_requests": None,
            "max_client_batch_size": options.max_inputs,
            "auto_truncate": options.long_input == "truncate",
            "tokenization_workers": MAX_READERS,
            "version": unpadded.__version__,
            "sha": None,
            "docker_label": None,
        }
    )


async def _health(service: Service, request: None, context: RequestContext) -> Response:
    if not service.ready:
        raise HTTPError("no_device", "no device accepts batches: its worker process exited; wait until it is restarted")
    return Response(lambda: b"", "text/plain")


async def _metrics(service: Service, request: None, context: RequestContext) -> Response:
    return Response(service.metrics.exposition, "text/plain; version=0.0.4; charset=utf-8")


def _post(path: str, summary: str, handler: Any, request_type: type[Struct]) -> Endpoint:
    return Endpoint(path=path, method="POST", api="tei", summary=summary, handler=handler, request_type=request_type)


def _get(path: str, summary: str, handler: Any, *, public: bool = False) -> Endpoint:
    return Endpoint(path=path, method="GET", api="tei", summary=summary, handler=handler, public=public)


ENDPOINTS = [
    _post("/", "The same as /embed or /similarity", _root, RootRequest),
    _post("/embed", "One vector per text", _embed, EmbedRequest),
    _post("/embed_all", "One vector per token", _embed_all, EmbedAllRequest),
    _post("/similarity", "Cosine similarity of one sentence to others", _similarity, SimilarityRequest),
    _post("/tokenize", "The tokens of texts", _tokenize, TokenizeRequest),
    _post("/decode", "The texts of token ids", _decode, DecodeRequest),
    _get("/info", "The served model and the limits", _info),
    _get("/health", "200 if ready, 503 if draining or without a device", _health, public=True),
    _get("/metrics", "Prometheus metrics", _metrics, public=True),
]
