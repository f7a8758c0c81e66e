"""The API of text-embeddings-inference (TEI)."""

import asyncio
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta, field

import unpadded
from unpadded.execution.batcher import MAX_READERS
from unpadded.server.api.fields import Dimensions, Direction, Input, Request, Texts, TokenId
from unpadded.server.endpoint import Endpoint, RequestContext
from unpadded.server.errors import HTTPError, check_maximum
from unpadded.server.responses import Response, html_page, json_response, negotiate, vectors_response
from unpadded.server.service import MAX_CHARACTERS, Service

MAX_LISTED_TOKENS = 1 << 17  # per /tokenize and /decode, as are the scores of /predict


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


class ScoreOptions(Request, kw_only=True):
    """Options of the endpoints that score. Only the end of a pair can be truncated."""

    truncate: bool | None = None  # None follows the server's --long-input
    truncation_direction: Literal["right", "Right"] | None = None
    raw_scores: bool = False  # logits


class RerankTextsRequest(ScoreOptions, kw_only=True):
    """A query and the texts to rank for it."""

    query: str
    texts: Texts
    return_text: bool = False


class PredictRequest(ScoreOptions, kw_only=True):
    """A text, a pair of texts, or a batch of [text] and [text, text]."""

    inputs: str | Annotated[list[str | list[str]], Meta(min_length=1)]


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


async def _rerank(service: Service, request: RerankTextsRequest, context: RequestContext) -> Response:
    found = await service.rank(request.query, request.texts, context.usage, **request.keywords())
    results: list[dict[str, object]] = [{"index": one.index, "score": one.score} for one in found]
    if request.return_text:
        results = [result | {"text": request.texts[one.index]} for result, one in zip(results, found, strict=True)]
    return json_response(results)


async def _predict(service: Service, request: PredictRequest, context: RequestContext) -> Response:
    given: Any = request.inputs
    is_batch = not isinstance(given, str) and not isinstance(given[0], str)
    inputs = given if is_batch else [[given] if isinstance(given, str) else given]
    for index, texts in enumerate(inputs):
        if isinstance(texts, str) or not 1 <= len(texts) <= 2 or not all(isinstance(text, str) for text in texts):
            message = f"input {index} is not a text or a pair of texts: {texts!r:.80}; send [text] or [text, text]"
            raise HTTPError("invalid", message)
    head = service.engine.checkpoint.score
    labels = () if head is None else head.labels
    count, what = len(inputs) * len(labels), "the response would have too many scores"
    check_maximum("too_many_inputs", what, count, MAX_LISTED_TOKENS, "scores", "send fewer")
    pairs = [(texts[0], texts[1]) if len(texts) == 2 else texts[0] for texts in inputs]
    scores = (await service.score(pairs, context.usage, **request.keywords())).reshape(len(pairs), -1)

    def to_json() -> Any:
        orders = np.argsort(-scores, axis=1, kind="stable").tolist()
        rows = [
            [{"score": row[i], "label": labels[i]} for i in order]
            for row, order in zip(scores.tolist(), orders, strict=True)
        ]
        return rows if is_batch else rows[0]

    return json_response(to_json)


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


def _model_type(service: Service) -> dict[str, object]:
    head = service.engine.checkpoint.score
    if head is None:
        return {"embedding": {"pooling": service.description["pooling"]}}
    ids = {label: index for index, label in enumerate(head.labels)}
    names = {"id2label": {str(index): label for index, label in enumerate(head.labels)}, "label2id": ids}
    return {"reranker" if len(head.labels) == 1 else "classifier": names}


async def _info(service: Service, request: None, context: RequestContext) -> Response:
    options, description = service.options, service.description
    return json_response(
        {
            "model_id": service.model_name,
            "model_sha": None,
            "model_dtype": description["dtype"],
            "device": description["device"],
            "dimensions": description["dimensions"],
            "model_type": _model_type(service),
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
    Endpoint("tei", "/rerank", "Texts by their score for a query, best first", _rerank, RerankTextsRequest),
    Endpoint("tei", "/predict", "The score of each label of texts or pairs", _predict, PredictRequest),
    Endpoint("tei", "/tokenize", "The tokens of texts", _tokenize, TokenizeRequest),
    Endpoint("tei", "/decode", "The texts of token ids", _decode, DecodeRequest),
    Endpoint("tei", "/info", "The served model and the limits", _info),
    Endpoint("tei", "/", "A page in a browser, otherwise the same as /health", _home, public=True),
    Endpoint("tei", "/ping", "The same as /health", _health, public=True),
    Endpoint("tei", "/health", "200 if ready, 503 if draining or without a device", _health, public=True),
    Endpoint("tei", "/metrics", "Prometheus metrics", _metrics, public=True),
]
