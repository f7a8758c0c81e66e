"""The API of text-embeddings-inference (TEI)."""

import asyncio
from itertools import pairwise
from typing import Annotated, Any, Literal

import orjson
from msgspec import Meta, Struct, field

import unpadded
from unpadded.execution.batcher import MAX_READERS
from unpadded.server.api.fields import Dimensions, Direction, Input, Request, Texts, TokenId
from unpadded.server.endpoint import Endpoint, RequestContext
from unpadded.server.errors import HTTPError, check_maximum
from unpadded.server.responses import Response, html_page, json_response, negotiate, vectors_response
from unpadded.server.service import MAX_CHARACTERS, ServedModel

MAX_LISTED_TOKENS = 1 << 17  # per /tokenize and /decode, as are the scores of /predict


class CommonOptions(Request, kw_only=True):
    """Options of every endpoint that embeds."""

    truncate: bool | None = None  # None follows the server's --long-input
    truncation_direction: Direction | None = None
    task: str | None = field(default=None, name="prompt_name")  # None follows --default-task


class EmbedAllRequest(CommonOptions, kw_only=True):
    """Texts, or token ids that include the special tokens, for which token vectors or sparse weights are returned."""

    inputs: Input


class EmbedRequest(EmbedAllRequest, kw_only=True):
    """Texts, or token ids that include the special tokens."""

    normalize: bool | None = None  # None means True
    dimensions: Dimensions | None = None


class SimilarityInputs(Struct, forbid_unknown_fields=True):
    """A sentence and the sentences to compare it with."""

    source_sentence: str
    sentences: Texts


class SimilarityRequest(CommonOptions, kw_only=True):
    """Sentences to compare. The options may be in an object `parameters`, as in every request."""

    inputs: SimilarityInputs


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


async def _embed(model: ServedModel, request: EmbedRequest, context: RequestContext) -> Response:
    options = request.keywords() | {"normalize": request.normalize is not False}
    embeddings = await model.embed(request.inputs, context.usage, **options)
    return vectors_response(embeddings.vectors, context.headers, lambda: embeddings.vectors)


async def _embed_all(model: ServedModel, request: EmbedAllRequest, context: RequestContext) -> Response:
    return json_response(await model.embed_tokens(request.inputs, context.usage, **request.keywords()))


async def _embed_sparse(model: ServedModel, request: EmbedAllRequest, context: RequestContext) -> Response:
    found = await model.embed_sparse(request.inputs, context.usage, **request.keywords())

    def to_json(start: int, end: int) -> Any:  # of one text, since objects take several times the memory of their JSON
        pairs = zip(found.ids[start:end], found.weights[start:end], strict=True)
        objects = [{"index": index, "value": value} for index, value in pairs]
        return orjson.Fragment(orjson.dumps(objects, option=orjson.OPT_SERIALIZE_NUMPY))

    return json_response(lambda: [to_json(*bounds) for bounds in pairwise(found.indptr.tolist())])


async def _similarity(model: ServedModel, request: SimilarityRequest, context: RequestContext) -> Response:
    options = request.keywords() | {"normalize": True}
    texts = [request.inputs.source_sentence, *request.inputs.sentences]
    vectors = (await model.embed(texts, context.usage, **options)).vectors
    return json_response(vectors[1:] @ vectors[0])


async def _root(model: ServedModel, request: RootRequest, context: RequestContext) -> Response:
    handler = _similarity if isinstance(request.inputs, SimilarityInputs) else _embed
    return await handler(model, request, context)  # type: ignore[arg-type]


async def _rerank(model: ServedModel, request: RerankTextsRequest, context: RequestContext) -> Response:
    found = await model.rank(request.query, request.texts, context.usage, **request.keywords())
    results: list[dict[str, object]] = [{"index": one.index, "score": one.score} for one in found]
    if request.return_text:
        results = [result | {"text": request.texts[one.index]} for result, one in zip(results, found, strict=True)]
    return json_response(results)


async def _predict(model: ServedModel, request: PredictRequest, context: RequestContext) -> Response:
    given: Any = request.inputs
    is_batch = not isinstance(given, str) and not isinstance(given[0], str)
    inputs = given if is_batch else [[given] if isinstance(given, str) else given]
    for index, texts in enumerate(inputs):
        if isinstance(texts, str) or not 1 <= len(texts) <= 2 or not all(isinstance(text, str) for text in texts):
            message = f"input {index} is not a text or a pair of texts: {texts!r:.80}; send [text] or [text, text]"
            raise HTTPError("invalid", message)
    count, what = len(inputs) * len(model.labels), "the response would have too many scores"
    check_maximum("too_many_inputs", what, count, MAX_LISTED_TOKENS, "scores", "send fewer")
    pairs = [(texts[0], texts[1]) if len(texts) == 2 else texts[0] for texts in inputs]
    scores = (await model.score(pairs, context.usage, **request.keywords())).reshape(len(pairs), -1)

    def to_json() -> Any:
        found = [zip(row, model.labels, strict=True) for row in scores.tolist()]
        rows = [
            [{"score": score, "label": label} for score, label in sorted(row, key=lambda one: -one[0])] for row in found
        ]
        return rows if is_batch else rows[0]

    return json_response(to_json)


async def _tokenize(model: ServedModel, request: TokenizeRequest, context: RequestContext) -> Response:
    prompt = model.pipeline.plan(**model.task_options(request.prompt_name)).prompt
    prompted = [f"{prompt}{text}" for text in model.texts(request.inputs)]
    size = sum(map(len, prompted))
    check_maximum("too_long", "the texts are too long", size, MAX_CHARACTERS, "characters", "send fewer")
    encode_batch = model.engine.tokenizer.backend.encode_batch
    encodings = await asyncio.get_running_loop().run_in_executor(
        model.batcher.reader(size), lambda: encode_batch(prompted, add_special_tokens=request.add_special_tokens)
    )
    count = sum(map(len, encodings))
    check_maximum("too_many_inputs", "the texts are too long", count, MAX_LISTED_TOKENS, "tokens", "send fewer")
    return json_response([_token_objects(encoding, text) for encoding, text in zip(encodings, prompted, strict=True)])


async def _decode(model: ServedModel, request: DecodeRequest, context: RequestContext) -> Response:
    sequences: list[Any] = model.texts(request.ids)
    count = sum(map(len, sequences))
    check_maximum("too_many_inputs", "the lists are too long", count, MAX_LISTED_TOKENS, "tokens", "send fewer")
    decode_batch = model.engine.tokenizer.backend.decode_batch
    texts = await asyncio.get_running_loop().run_in_executor(
        model.batcher.reader(count), lambda: decode_batch(sequences, skip_special_tokens=request.skip_special_tokens)
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


def _model_type(model: ServedModel) -> dict[str, object]:
    if not model.labels:
        return {"embedding": {"pooling": model.checkpoint.pooling}}
    ids = {label: index for index, label in enumerate(model.labels)}
    names = {"id2label": {str(index): label for index, label in enumerate(model.labels)}, "label2id": ids}
    return {"reranker" if len(model.labels) == 1 else "classifier": names}


def _model_info(model: ServedModel) -> dict[str, object]:
    described = model.engine.describe()
    info = {"model_id": model.name, "model_sha": None, "model_dtype": described["dtype"]}
    info |= {name: described[name] for name in ("device", "dimensions")}
    return info | {"model_type": _model_type(model), "max_input_length": model.checkpoint.max_length}


async def _info(model: ServedModel, request: None, context: RequestContext) -> Response:
    options = model.options
    limits = {"max_concurrent_requests": options.max_concurrent_requests, "max_client_batch_size": options.max_inputs}
    limits |= {"max_batch_tokens": model.batcher.token_budget, "tokenization_workers": MAX_READERS}
    rest = {"version": unpadded.__version__, "max_batch_requests": None, "sha": None, "docker_label": None}
    limits["auto_truncate"] = options.long_input == "truncate"
    models = [_model_info(one) | {"names": one.names} for one in model.service.models]
    return json_response(_model_info(model) | limits | rest | {"models": models})


async def _health(model: ServedModel, request: None, context: RequestContext) -> Response:
    if not model.service.ready_devices:
        raise HTTPError("no_device", "no device accepts batches: its worker process exited; wait until it is restarted")
    return Response(lambda: b"", "text/plain")


async def _home(model: ServedModel, request: None, context: RequestContext) -> Response:
    if negotiate(context.headers, "text/plain", "text/html") == "text/plain":
        return await _health(model, request, context)
    return Response(lambda: html_page("home.html"), "text/html; charset=utf-8")


async def _metrics(model: ServedModel, request: None, context: RequestContext) -> Response:
    return Response(model.service.metrics.exposition, "text/plain; version=0.0.4; charset=utf-8")


ENDPOINTS = [
    Endpoint("tei", "/", "The same as /embed or /similarity", _root, RootRequest),
    Endpoint("tei", "/embed", "One vector per text", _embed, EmbedRequest),
    Endpoint("tei", "/embed_all", "One vector per token", _embed_all, EmbedAllRequest),
    Endpoint("tei", "/embed_sparse", "Weights of vocabulary entries", _embed_sparse, EmbedAllRequest, "sparse"),
    Endpoint("tei", "/similarity", "Cosine similarity of one sentence to others", _similarity, SimilarityRequest),
    Endpoint("tei", "/rerank", "Rank texts for a query", _rerank, RerankTextsRequest, "score"),
    Endpoint("tei", "/predict", "The score of each label", _predict, PredictRequest, "score"),
    Endpoint("tei", "/tokenize", "The tokens of texts", _tokenize, TokenizeRequest),
    Endpoint("tei", "/decode", "The texts of token ids", _decode, DecodeRequest),
    Endpoint("tei", "/info", "The served models and the limits", _info),
    Endpoint("tei", "/", "A page in a browser, otherwise the same as /health", _home, public=True),
    Endpoint("tei", "/ping", "The same as /health", _health, public=True),
    Endpoint("tei", "/health", "200 if ready, 503 if draining or without a device", _health, public=True),
    Endpoint("tei", "/metrics", "Prometheus metrics", _metrics, public=True),
]
