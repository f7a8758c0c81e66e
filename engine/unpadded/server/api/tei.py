"""The API of text-embeddings-inference (TEI)."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct

import unpadded
from unpadded.execution.batcher import MAX_READERS
from unpadded.server.api.openai import Dimensions, Direction, Input, TokenId, check_token_ids, side
from unpadded.server.endpoint import Endpoint, RequestContext
from unpadded.server.errors import HTTPError
from unpadded.server.responses import Response, binary_response, home_page, json_response, rows_response
from unpadded.server.service import Service, check_characters, to_texts

MAX_LISTED_TOKENS = 1 << 17  # per /tokenize and /decode


class CommonOptions(Struct, forbid_unknown_fields=True, kw_only=True):
    """Options of every endpoint that embeds."""

    truncate: bool | None = None  # None follows the server's --long-input
    truncation_direction: Direction | None = None
    prompt_name: str | None = None  # None follows --default-task


class EmbedAllRequest(CommonOptions, kw_only=True):
    """Texts, or token ids that include the special tokens, for which token vectors are returned."""

    inputs: Input


class EmbedRequest(EmbedAllRequest, kw_only=True):
    """Texts, or token ids that include the special tokens."""

    normalize: bool | None = None  # None means True
    dimensions: Dimensions | None = None


class SimilarityInputs(Struct, forbid_unknown_fields=True):
    """A sentence and the sentences to compare it with."""

    source_sentence: str
    sentences: Annotated[list[str], Meta(min_length=1)]


class SimilarityRequest(Struct, forbid_unknown_fields=True):
    """Input and options of /similarity."""

    inputs: SimilarityInputs
    parameters: CommonOptions | None = None


class RootRequest(EmbedRequest, kw_only=True):
    """The request of huggingface_hub's client to the root URL: embed, or compare sentences."""

    inputs: Input | SimilarityInputs  # type: ignore[assignment]
    parameters: CommonOptions | None = None


class TokenizeRequest(Struct, forbid_unknown_fields=True):
    """Texts to tokenize."""

    inputs: str | Annotated[list[str], Meta(min_length=1)]
    add_special_tokens: bool = True
    prompt_name: str | None = None


class DecodeRequest(Struct, forbid_unknown_fields=True):
    """Token ids to decode."""

    ids: Annotated[list[TokenId | list[TokenId]], Meta(min_length=1)]
    skip_special_tokens: bool = True


async def _embed(service: Service, request: EmbedRequest, context: RequestContext) -> Response:
    texts = to_texts(request.inputs)
    check_token_ids(service, texts)
    embeddings = await service.embed(
        texts,
        context.usage,
        truncate=request.truncate,
        dimensions=request.dimensions,
        normalize=request.normalize is not False,
        task=request.prompt_name,
        truncation=side(request.truncation_direction),
    )
    return binary_response(embeddings.vectors, context.accept) or rows_response(embeddings.vectors)


async def _embed_all(service: Service, request: EmbedAllRequest, context: RequestContext) -> Response:
    texts = to_texts(request.inputs)
    check_token_ids(service, texts)
    rows = await service.embed_tokens(
        texts,
        context.usage,
        truncate=request.truncate,
        task=request.prompt_name,
        truncation=side(request.truncation_direction),
    )
    return rows_response(rows)


async def _similarity(service: Service, request: SimilarityRequest, context: RequestContext) -> Response:
    parameters = request.parameters or CommonOptions()
    embeddings = await service.embed(
        [request.inputs.source_sentence, *request.inputs.sentences],
        context.usage,
        truncate=parameters.truncate,
        normalize=True,
        task=parameters.prompt_name,
        truncation=side(parameters.truncation_direction),
    )
    return json_response(embeddings.vectors[1:] @ embeddings.vectors[0])


async def _root(service: Service, request: RootRequest, context: RequestContext) -> Response:
    if isinstance(request.inputs, SimilarityInputs):
        return await _similarity(service, SimilarityRequest(request.inputs, request.parameters), context)
    for name in CommonOptions.__struct_fields__:
        if getattr(request, name) is None and request.parameters is not None:
            setattr(request, name, getattr(request.parameters, name))
    return await _embed(service, request, context)


async def _tokenize(service: Service, request: TokenizeRequest, context: RequestContext) -> Response:
    texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
    prompt = service.pipeline.plan(task=request.prompt_name or service.options.default_task).prompt
    backend = service.engine.tokenizer.backend
    service.check_inputs(texts)
    prompted = [prompt + text for text in texts]
    size = sum(map(len, prompted))
    check_characters([size])
    encodings = await asyncio.get_running_loop().run_in_executor(
        service.batcher.reader(size),
        lambda: backend.encode_batch(prompted, add_special_tokens=request.add_special_tokens),
    )
    _check_listed(sum(map(len, encodings)))
    tokens = [_token_objects(encoding, text) for encoding, text in zip(encodings, prompted, strict=True)]
    return json_response(tokens)


def _check_listed(count: int) -> None:
    if count > MAX_LISTED_TOKENS:
        raise HTTPError("too_many_inputs", f"too many tokens: {count}, maximum {MAX_LISTED_TOKENS}; send fewer texts")


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
    service.check_inputs(sequences)
    total = sum(map(len, sequences))
    _check_listed(total)
    backend = service.engine.tokenizer.backend
    texts = await asyncio.get_running_loop().run_in_executor(
        service.batcher.reader(total),
        lambda: backend.decode_batch(sequences, skip_special_tokens=request.skip_special_tokens),
    )
    return json_response(texts)


async def _info(service: Service, request: None, context: RequestContext) -> Response:
    options, description = service.options, service.description
    return json_response(
        {
            "model_id": service.model_name,
            "model_sha": None,
            "model_dtype": description["dtype"],
            "device": description["device"],
            "dimensions": description["dimensions"],
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


async def _home(service: Service, request: None, context: RequestContext) -> Response:
    return home_page(context.accept) or await _health(service, request, context)


async def _metrics(service: Service, request: None, context: RequestContext) -> Response:
    return Response(service.metrics.exposition, "text/plain; version=0.0.4; charset=utf-8")


ENDPOINTS = [
    Endpoint("tei", "POST", "/", "The same as /embed or /similarity", _root, RootRequest),
    Endpoint("tei", "POST", "/embed", "One vector per text", _embed, EmbedRequest),
    Endpoint("tei", "POST", "/embed_all", "One vector per token", _embed_all, EmbedAllRequest),
    Endpoint(
        "tei", "POST", "/similarity", "Cosine similarity of one sentence to others", _similarity, SimilarityRequest
    ),
    Endpoint("tei", "POST", "/tokenize", "The tokens of texts", _tokenize, TokenizeRequest),
    Endpoint("tei", "POST", "/decode", "The texts of token ids", _decode, DecodeRequest),
    Endpoint("tei", "GET", "/info", "The served model and the limits", _info),
    Endpoint("tei", "GET", "/", "A page in a browser, otherwise the same as /health", _home, public=True),
    Endpoint("tei", "GET", "/ping", "The same as /health", _health, public=True),
    Endpoint("tei", "GET", "/health", "200 if ready, 503 if draining or without a device", _health, public=True),
    Endpoint("tei", "GET", "/metrics", "Prometheus metrics", _metrics, public=True),
]
