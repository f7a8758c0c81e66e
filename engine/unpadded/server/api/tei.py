"""text-embeddings-inference's interface."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from msgspec import Meta, Struct

import unpadded
from unpadded.execution.batcher import MAX_READERS
from unpadded.server.api.openai import Dimensions, Input, TokenId
from unpadded.server.endpoint import Endpoint, Exchange
from unpadded.server.errors import Problem
from unpadded.server.responses import Response, binary_response, json_response, rows_response
from unpadded.server.service import Service, as_texts

Direction: TypeAlias = Literal["right", "left", "Right", "Left"]

MAX_LISTED_TOKENS = 1_000_000  # of one /tokenize


class EmbedRequest(Struct, forbid_unknown_fields=True):
    """Texts, or token ids, special tokens included."""

    inputs: Input
    truncate: bool | None = None  # None does what the server was told with --long-input
    truncation_direction: Direction | None = None
    normalize: bool | None = None  # None: yes
    prompt_name: str | None = None
    dimensions: Dimensions | None = None


class EmbedAllRequest(Struct, forbid_unknown_fields=True):
    """Texts whose token vectors are wanted."""

    inputs: Input
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None


class SimilarityInputs(Struct, forbid_unknown_fields=True):
    """A sentence, and those it is compared with."""

    source_sentence: str
    sentences: Annotated[list[str], Meta(min_length=1)]


class SimilarityParameters(Struct, forbid_unknown_fields=True):
    """How the sentences are embedded."""

    truncate: bool | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None


class SimilarityRequest(Struct, forbid_unknown_fields=True):
    """One sentence against many."""

    inputs: SimilarityInputs
    parameters: SimilarityParameters | None = None


class RootRequest(Struct, forbid_unknown_fields=True):
    """What huggingface_hub's client sends to the bare URL for either of its tasks."""

    inputs: Input | SimilarityInputs
    truncate: bool | None = None
    truncation_direction: Direction | None = None
    normalize: bool | None = None
    prompt_name: str | None = None
    dimensions: Dimensions | None = None
    parameters: SimilarityParameters | None = None


class TokenizeRequest(Struct, forbid_unknown_fields=True):
    """Texts whose tokens are wanted."""

    inputs: str | Annotated[list[str], Meta(min_length=1)]
    add_special_tokens: bool = True
    prompt_name: str | None = None


class DecodeRequest(Struct, forbid_unknown_fields=True):
    """Token ids whose text is wanted."""

    ids: Annotated[list[TokenId | list[TokenId]], Meta(min_length=1)]
    skip_special_tokens: bool = True


def _side(direction: Direction | None) -> Literal["right", "left"]:
    return "left" if direction in ("left", "Left") else "right"


def _refuse_long(truncate: bool | None) -> bool | None:
    return None if truncate is None else not truncate


async def _embed(service: Service, request: EmbedRequest, exchange: Exchange) -> Response:
    found = await service.embed(
        as_texts(request.inputs),
        exchange.usage,
        refuse_long=_refuse_long(request.truncate),
        dimensions=request.dimensions,
        normalize=request.normalize is not False,
        task=request.prompt_name,
        truncation=_side(request.truncation_direction),
    )
    return binary_response(found.vectors, exchange.accept) or rows_response(found.vectors)


async def _embed_all(service: Service, request: EmbedAllRequest, exchange: Exchange) -> Response:
    rows = await service.embed_tokens(
        as_texts(request.inputs),
        exchange.usage,
        refuse_long=_refuse_long(request.truncate),
        task=request.prompt_name,
        truncation=_side(request.truncation_direction),
    )
    return rows_response(rows)


async def _similarity(service: Service, request: SimilarityRequest, exchange: Exchange) -> Response:
    parameters = request.parameters or SimilarityParameters()
    found = await service.embed(
        [request.inputs.source_sentence, *request.inputs.sentences],
        exchange.usage,
        refuse_long=_refuse_long(parameters.truncate),
        normalize=True,
        task=parameters.prompt_name,
        truncation=_side(parameters.truncation_direction),
    )
    return json_response(found.vectors[1:] @ found.vectors[0])


async def _root(service: Service, request: RootRequest, exchange: Exchange) -> Response:
    if isinstance(request.inputs, SimilarityInputs):
        return await _similarity(service, SimilarityRequest(request.inputs, request.parameters), exchange)
    if request.parameters is not None:
        raise Problem("invalid", "parameters came without source_sentence; put them beside inputs")
    embed = EmbedRequest(
        request.inputs,
        request.truncate,
        request.truncation_direction,
        request.normalize,
        request.prompt_name,
        request.dimensions,
    )
    return await _embed(service, embed, exchange)


async def _tokenize(service: Service, request: TokenizeRequest, exchange: Exchange) -> Response:
    texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
    prompt = service.pipeline.plan(task=request.prompt_name).prompt
    backend = service.engine.tokenizer.backend
    loop = asyncio.get_running_loop()
    given = [prompt + text for text in texts]
    encodings = await loop.run_in_executor(
        service.batcher.readers,
        lambda: backend.encode_batch(given, add_special_tokens=request.add_special_tokens),
    )
    total = sum(map(len, encodings))
    if total > MAX_LISTED_TOKENS:
        raise Problem(
            "too_many_inputs",
            f"the answer would list too many tokens: {total}, at most {MAX_LISTED_TOKENS}; send fewer texts",
        )
    tokens = [_tokens(encoding, text) for encoding, text in zip(encodings, given, strict=True)]
    return json_response(tokens)


def _tokens(encoding: Any, text: str) -> list[dict[str, object]]:
    listed = []
    for id_, token, special, (start, stop) in zip(
        encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True
    ):
        if special:
            listed.append({"id": id_, "text": token, "special": True, "start": None, "stop": None})
        else:
            listed.append({"id": id_, "text": text[start:stop], "special": False, "start": start, "stop": stop})
    return listed


async def _decode(service: Service, request: DecodeRequest, exchange: Exchange) -> Response:
    sequences = [np.asarray(ids).tolist() for ids in as_texts(request.ids)]
    backend = service.engine.tokenizer.backend
    return json_response(backend.decode_batch(sequences, skip_special_tokens=request.skip_special_tokens))


async def _info(service: Service, request: None, exchange: Exchange) -> Response:
    options, described = service.options, service.described
    return json_response(
        {
            "model_id": service.name,
            "model_sha": None,
            "model_dtype": described["dtype"],
            "device": described["device"],
            "model_type": {"embedding": {"pooling": described["pooling"]}},
            "max_concurrent_requests": options.max_concurrent_requests,
            "max_input_length": described["max_length"],
            "max_batch_tokens": described["token_budget"],
            "max_batch_requests": None,
            "max_client_batch_size": options.max_inputs,
            "auto_truncate": options.long_input == "truncate",
            "tokenization_workers": MAX_READERS,
            "version": unpadded.__version__,
            "sha": None,
            "docker_label": None,
        }
    )


async def _health(service: Service, request: None, exchange: Exchange) -> Response:
    if not service.pipeline.backend.ready_devices:
        raise Problem("no_device", "no device takes batches: its process died; wait until it has started again")
    return Response(lambda: b"", "text/plain")


async def _metrics(service: Service, request: None, exchange: Exchange) -> Response:
    return Response(service.metrics.text, "text/plain; version=0.0.4; charset=utf-8")


def _post(path: str, summary: str, handler: Any, request: type[Struct]) -> Endpoint:
    return Endpoint(path=path, method="POST", interface="tei", summary=summary, handler=handler, request=request)


def _get(path: str, summary: str, handler: Any, *, open: bool = False) -> Endpoint:
    return Endpoint(path=path, method="GET", interface="tei", summary=summary, handler=handler, open=open)


ENDPOINTS = [
    _post("/", "As /embed, or /similarity", _root, RootRequest),
    _post("/embed", "A vector a text", _embed, EmbedRequest),
    _post("/embed_all", "A vector a token", _embed_all, EmbedAllRequest),
    _post("/similarity", "Cosines of one sentence to others", _similarity, SimilarityRequest),
    _post("/tokenize", "The tokens of texts", _tokenize, TokenizeRequest),
    _post("/decode", "The texts of token ids", _decode, DecodeRequest),
    _get("/info", "What is served, and its limits", _info),
    _get("/health", "200 when ready, 503 when draining or without a device", _health, open=True),
    _get("/metrics", "Prometheus metrics", _metrics, open=True),
]
