"""The API of text-embeddings-inference (TEI)."""

import asyncio
from typing import Annotated, Any

from msgspec import Meta, field

import unpadded
from unpadded.execution.batcher import MAX_READERS
from unpadded.server.api.fields import Dimensions, Direction, Input, Request, Texts, TokenId
from unpadded.server.endpoint import Endpoint, RequestContext
from unpadded.server.errors import HTTPError, check_maximum
from unpadded.server.responses import Response, html_page, json_response, negotiate, vectors_response
from unpadded.server.service import MAX_CHARACTERS, Service

MAX_LISTED_TOKENS = 1 << 17  # per /tokenize and /decode


class CommonOptions(Request, kw_only=True):
    """Options of every endpoint that embeds."""

    truncate: bool | None = None  # None follows the server's --long-input
    truncation_direction: Direction | None = None
    task: str | None = field(default=None, name="prompt_name")  # None follows --default-task


class EmbedAllRequest(CommonOptions, kw_only=True):
    """Texts, or token ids that include the special tokens, for which token vectors are returned."""

    inputs: Input


class EmbedRequest(EmbedAllRequest, kw_only=True):
    """Texts, or token ids that include the special tokens."""

    normalize: bool | None = None  # None means True
    dimensions: Dimensions | None = None


class SimilarityInputs(Request):
    """A sentence and the sentences to compare it with."""

    source_sentence: str
    sentences: Texts


class SimilarityRequest(Request):
    """Input and options of /similarity."""

    inputs: SimilarityInputs
    parameters: CommonOptions | None = None


class RootRequest(EmbedRequest, kw_only=True):
    """The request of huggingface_hub's client to the root URL: embed, or compare sentences."""

    inputs: Input | SimilarityInputs  # type: ignore[assignment]


class TokenizeRequest(Request):
    """Texts to tokenize."""

    inputs: str | Texts
    add_special_tokens: bool = True
    prompt_name: str | None = None


class DecodeRequest(Request):
    """Token ids to decode."""

    ids: Annotated[list[TokenId | list[TokenId]], Meta(min_length=1)]
    skip_special_tokens: bool = True


async def _embed(service: Service, request: EmbedRequest, context: RequestContext) -> Response:
    options = request.keywords() | {"normalize": request.normalize is not False}
    embeddings = await service.embed(request.inputs, context.usage, **options)
    return vectors_response(embeddings.vectors, context.headers, lambda: embeddings.vectors)


async def _embed_all(service: Service, request: EmbedAllRequest, context: RequestContext) -> Response:
    return json_response(await service.embed_tokens(request.inputs, context.usage, **request.keywords()))


async def _similarity(service: Service, request: SimilarityRequest, context: RequestContext) -> Response:
    options = (request.parameters or CommonOptions()).keywords() | {"normalize": True}
    texts = [request.inputs.source_sentence, *request.inputs.sentences]
    vectors = (await service.embed(texts, context.usage, **options)).vectors
    return json_response(vectors[1:] @ vectors[0])


async def _root(service: Service, request: RootRequest, context: RequestContext) -> Response:
    if isinstance(request.inputs, SimilarityInputs):
        return await _similarity(service, SimilarityRequest(inputs=request.inputs, parameters=request), context)
    return await _embed(service, request, context)


async def _tokenize(service: Service, request: TokenizeRequest, context: RequestContext) -> Response:
    prompt = service.pipeline.plan(task=request.prompt_name or service.options.default_task).prompt
    prompted = [f"{prompt}{text}" for text in service.texts(request.inputs)]
    size = sum(map(len, prompted))
    check_maximum("too_long", "the texts are too long", size, MAX_CHARACTERS, "characters", "send fewer")
    encode_batch = service.engine.tokenizer.backend.encode_batch
    encodings = await asyncio.get_running_loop().run_in_executor(
        service.batcher.reader(size), lambda: encode_batch(prompted, add_special_tokens=request.add_special_tokens)
    )
    count = sum(map(len, encodings))
    check_maximum("too_many_inputs", "the texts are too long", count, MAX_LISTED_TOKENS, "tokens", "send fewer")
    return json_response([_token_objects(encoding, text) for encoding, text in zip(encodings, prompted, strict=True)])


async def _decode(service: Service, request: DecodeRequest, context: RequestContext) -> Response:
    sequences: list[Any] = service.texts(request.ids)
    count = sum(map(len, sequences))
    check_maximum("too_many_inputs", "the lists are too long", count, MAX_LISTED_TOKENS, "tokens", "send fewer")
    decode_batch = service.engine.tokenizer.backend.decode_batch
    texts = await asyncio.get_running_loop().run_in_executor(
        service.batcher.reader(count), lambda: decode_batch(sequences, skip_special_tokens=request.skip_special_tokens)
    )
    return json_response(texts)


def _token_objects(encoding: Any, text: str) -> list[dict[str, object]]:
    columns = (encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets)
    return [
        {"id": id_, "text": token, "special": True, "start": None, "stop": None}
        if special
        else {"id": id_, "text": text[start:stop], "special": False, "start": start, "stop": stop}
        for id_, token, special, (start, stop) in zip(*columns, strict=True)
    ]


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
    if not service.backend.ready_devices:
        raise HTTPError("no_device", "no device accepts batches: its worker process exited; wait until it is restarted")
    return Response(lambda: b"", "text/plain")


async def _home(service: Service, request: None, context: RequestContext) -> Response:
    if negotiate(context.headers, "text/plain", "text/html") == "text/plain":
        return await _health(service, request, context)
    return Response(lambda: html_page("home.html"), "text/html; charset=utf-8")


async def _metrics(service: Service, request: None, context: RequestContext) -> Response:
    return Response(service.metrics.exposition, "text/plain; version=0.0.4; charset=utf-8")


ENDPOINTS = [
    Endpoint("tei", "/", "The same as /embed or /similarity", _root, RootRequest),
    Endpoint("tei", "/embed", "One vector per text", _embed, EmbedRequest),
    Endpoint("tei", "/embed_all", "One vector per token", _embed_all, EmbedAllRequest),
    Endpoint("tei", "/similarity", "Cosine similarity of one sentence to others", _similarity, SimilarityRequest),
    Endpoint("tei", "/tokenize", "The tokens of texts", _tokenize, TokenizeRequest),
    Endpoint("tei", "/decode", "The texts of token ids", _decode, DecodeRequest),
    Endpoint("tei", "/info", "The served model and the limits", _info),
    Endpoint("tei", "/", "A page in a browser, otherwise the same as /health", _home, public=True),
    Endpoint("tei", "/ping", "The same as /health", _health, public=True),
    Endpoint("tei", "/health", "200 if ready, 503 if draining or without a device", _health, public=True),
    Endpoint("tei", "/metrics", "Prometheus metrics", _metrics, public=True),
]
