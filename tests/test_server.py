"""The APIs of the server, through the clients of openai, huggingface_hub, langchain and nomic, and by plain HTTP."""

import asyncio
import base64
import gzip
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import numpy as np
import openai
import pytest
from langchain_huggingface import HuggingFaceEndpointEmbeddings
from support.checkpoints import MINILM_NAME, add_sentence_transformers_files, change_json, write_nomic
from support.corpus import PARAGRAPHS
from support.serving import ENVIRONMENT, serving, wait_until

import unpadded
from unpadded.execution import cuda_graphs
from unpadded.server.options import ServerOptions
from unpadded.server.service import Service

TEXTS = ["What is TSNE?", "naïve café 漢字 🙂", "", "a b " * 700]


@pytest.fixture(scope="module")
def engine(minilm):
    return unpadded.load(minilm, device="cpu")


@pytest.fixture(scope="module")
def server(minilm):
    with serving(minilm, "--alias", "text-embedding-3-small") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def huggingface_online(monkeypatch):
    """Let huggingface_hub's clients reach the server with HF_HUB_OFFLINE set."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def nomic_folder(tmp_path_factory):
    folder = write_nomic(tmp_path_factory.mktemp("served") / "nomic-embed-text-v1.5", hidden=128)
    change_json(folder / "config.json", matryoshka_dimensions=[128, 64], matryoshka_layer_norm=True)
    add_sentence_transformers_files(folder, normalize=False, max_seq_length=8192)
    return folder


@pytest.fixture(scope="module")
def nomic_server(nomic_folder):
    flags = "--default-task search_document --cors-origin https://a.example --log-requests"
    with serving(nomic_folder, "--api-key", "nk-one", "--api-key", "schlüssel", *flags.split()) as server:
        yield server


def vectors(response):
    return np.array([item.embedding for item in response.data], np.float32)


def test_warm_up_covers_every_cuda_graph_within_the_token_budget(minilm):
    service = Service([unpadded.load(minilm, device="cpu", token_budget=512)], ServerOptions())
    assert service.warm_up_sizes() == [(1, 1), (512, 1)]
    service.device_type = "cuda"
    sizes = set(service.warm_up_sizes())
    graphs = {
        (tokens, texts) for tokens in cuda_graphs.TOKEN_BUCKETS for texts in cuda_graphs.TEXT_BUCKETS if texts <= tokens
    }
    assert graphs - sizes == {(tokens, texts) for tokens, texts in graphs if tokens > 512} < graphs
    service.warm_up()
    service.batcher.close()


def test_options_from_a_mapping_of_strings(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("file-1\n\n file-2 \n")
    monkeypatch.setenv("UNPADDED_API_KEYS", "env-1, env-2,")
    options = ServerOptions.from_mapping(
        {
            "max_inputs": "64",
            "deadline": "0.5",
            "alias": ["a", "b"],
            "cors_origin": "*",
            "log_requests": "True",
            "api_key": [" flag", "schlüssel"],
            "api_key_file": str(tmp_path / "keys"),
        }
    )
    keys = frozenset({"flag", "schlüssel", "file-1", "file-2", "env-1", "env-2"})
    assert options == ServerOptions(
        max_inputs=64, deadline=0.5, alias=("a", "b"), cors_origin=("*",), log_requests=True, api_keys=keys
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_inputs": "many"}, "'many'; pass one such as 2048"),
        ({"max_inputs": 0}, "max_inputs is out of range: 0; pass a number from 1"),
        ({"deadline": "inf"}, "deadline is out of range: inf"),
        ({"long_input": "cut"}, "'cut'; use one of truncate, reject"),
        ({"modle": "y"}, "modle; use host, port"),
        ({"tls_key": "key.pem"}, "pass both or neither"),
        ({"port": "80800"}, "port is out of range: 80800; pass a number from 0 to 65535"),
        ({"api_key": ""}, "--api-key has no API key: ['']"),
        ({"api_key": ["a", " "]}, "--api-key has no API key: [' ']"),
        ({"api_key": "a\udcff"}, "not printable UTF-8"),
    ],
)
def test_invalid_options_raise_with_the_value_and_the_remedy(values, message):
    with pytest.raises(unpadded.OptionError) as raised:
        ServerOptions.from_mapping(values)
    assert message in str(raised.value)


@pytest.mark.parametrize("value", ["", " , "])
def test_an_empty_variable_of_keys_does_not_open_the_server(monkeypatch, value):
    monkeypatch.setenv("UNPADDED_API_KEYS", value)
    with pytest.raises(unpadded.OptionError, match="UNPADDED_API_KEYS has no API key"):
        ServerOptions.from_mapping({"api_key": "a"})


@pytest.mark.parametrize("format", ["base64", "float"])
def test_openai_client_returns_exactly_the_vectors_of_encode(client, engine, format):
    response = client.embeddings.create(model="text-embedding-3-small", input=TEXTS, encoding_format=format)
    found = [item.embedding for item in response.data]
    if format == "base64":
        found = [np.frombuffer(base64.b64decode(row), "<f4") for row in found]
    assert np.array_equal(np.array(found, np.float32), engine.encode(TEXTS))
    assert [item.index for item in response.data] == list(range(len(TEXTS)))
    assert response.usage.prompt_tokens == response.usage.total_tokens == engine.embed(TEXTS).token_counts.sum()
    assert response.usage.truncated_texts == 1  # the last of TEXTS
    assert response.model == "text-embedding-3-small" and response.object == "list"


def test_openai_client_defaults_and_dimensions(client, engine):
    assert np.array_equal(
        vectors(client.embeddings.create(model=MINILM_NAME, input=TEXTS[0]))[0], engine.encode(TEXTS[0])
    )
    cut = client.embeddings.create(model=MINILM_NAME, input=TEXTS, dimensions=128, user="someone")
    assert np.array_equal(vectors(cut), engine.encode(TEXTS, dimensions=128))


def test_openai_client_sends_token_ids(client, engine):
    ids = [[101, 2054, 2003, 102], [101, 102]]
    assert np.array_equal(vectors(client.embeddings.create(model=MINILM_NAME, input=ids)), engine.encode(ids))
    assert np.array_equal(vectors(client.embeddings.create(model=MINILM_NAME, input=ids[0]))[0], engine.encode(ids)[0])
    with pytest.raises(openai.BadRequestError, match="send text"):
        client.embeddings.create(model="text-embedding-3-small", input=ids)


def test_token_ids_of_another_vocabulary_are_rejected(client, server):
    """LangChain's default is to send ids of cl100k_base, here of "hello world"."""
    for ids in ([[15339, 1917]], [15339, 1917], ["a", [101, 7592]], [[7592, 102]], [[101]], [[102, 7592, 101]]):
        with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
            client.embeddings.create(model=MINILM_NAME, input=ids)
        for path in ("/embed", "/embed_all", "/"):
            assert server.request("POST", path, {"inputs": ids})[0] == 422


def test_openai_models_are_listed_and_retrieved(client):
    assert [model.id for model in client.models.list()] == [MINILM_NAME, "text-embedding-3-small"]
    assert client.models.retrieve(MINILM_NAME).object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("owner/other")


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"model": "other"}, openai.NotFoundError, f"'other'; use {MINILM_NAME} or text-embedding-3-small"),
        ({"dimensions": 385}, openai.BadRequestError, "385"),
        ({"dimensions": 0}, openai.BadRequestError, "Expected `int` >= 1"),
        ({"input": []}, openai.BadRequestError, "length >= 1"),
        ({"input": [[]]}, openai.BadRequestError, "text 0"),
        ({"input": [1, "a"]}, openai.BadRequestError, "put each text's ids in a list"),
        ({"input": [[40000]]}, openai.BadRequestError, "40000"),
        ({"input": ["a"] * 2049}, openai.BadRequestError, "2049, maximum 2048"),
        ({"extra_body": {"task": "search_query"}}, openai.BadRequestError, "'search_query'"),
        ({"extra_body": {"dimension": 3}}, openai.BadRequestError, "unknown field `dimension`"),
    ],
)
def test_openai_errors_have_the_value_and_the_remedy(client, request_, error, message):
    with pytest.raises(error) as raised:
        client.embeddings.create(**{"model": MINILM_NAME, "input": "a", **request_})
    assert message in raised.value.body["message"]
    assert raised.value.body["type"] == "invalid_request_error" and "code" in raised.value.body


def test_langchain_openai_client(server, engine):
    from langchain_openai import OpenAIEmbeddings

    client = OpenAIEmbeddings(
        model="text-embedding-3-small",
        base_url=server.url + "/v1",
        api_key="none",
        check_embedding_ctx_length=False,
        tiktoken_enabled=False,
    )
    assert np.array_equal(np.array(client.embed_documents(TEXTS[:2]), np.float32), engine.encode(TEXTS[:2]))
    assert np.array_equal(np.array(client.embed_query(TEXTS[0]), np.float32), engine.encode(TEXTS[0]))


@pytest.mark.usefixtures("huggingface_online")
def test_huggingface_client(server, engine):
    client = huggingface_hub.InferenceClient(model=server.url, timeout=600)
    assert np.array_equal(client.feature_extraction(TEXTS[0], normalize=True)[0], engine.encode(TEXTS[0]))
    found = client.feature_extraction(TEXTS, truncate=True, truncation_direction="left", dimensions=64)
    assert np.array_equal(found, engine.encode(TEXTS, truncation="left", dimensions=64))
    scores = client.sentence_similarity("What is TSNE?", other_sentences=["a map of points", "bread"])
    expected = engine.encode(["a map of points", "bread"]) @ engine.encode("What is TSNE?")
    np.testing.assert_allclose(scores, expected, atol=1e-6)


@pytest.mark.usefixtures("huggingface_online")
def test_langchain_huggingface_client(server, engine):
    """Its constructor accepts only repository names; a self-hosted server is reached through its clients."""
    embeddings = HuggingFaceEndpointEmbeddings(
        model="owner/name", huggingfacehub_api_token="none", model_kwargs={"truncate": True, "normalize": True}
    )
    embeddings.client = huggingface_hub.InferenceClient(model=server.url, timeout=600)
    expected = engine.encode(TEXTS)
    assert np.array_equal(np.array(embeddings.embed_documents(TEXTS), np.float32), expected)
    assert np.array_equal(np.array(embeddings.embed_query(TEXTS[0]), np.float32), engine.encode(TEXTS[0]))

    async def embed():
        async with huggingface_hub.AsyncInferenceClient(model=server.url, timeout=600) as embeddings.async_client:
            return await embeddings.aembed_documents(TEXTS)

    found = asyncio.run(embed())
    assert np.array_equal(np.array(found, np.float32), expected)


def test_nomic_client(nomic_server, nomic_folder, tmp_path):
    code = (
        "import json, nomic; from nomic import embed; nomic.login('nk-one');"
        "print(json.dumps(embed.text(json.loads(input()), model='nomic-embed-text-v1.5', task_type='search_query',"
        " dimensionality=64, long_text_mode='truncate')))"
    )
    texts = [*TEXTS, " ".join(PARAGRAPHS[:60])]
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**ENVIRONMENT, "HOME": str(tmp_path), "ATLAS_API_PATH": nomic_server.url},
        input=json.dumps(texts),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)
    found = unpadded.load(nomic_folder, device="cpu").embed(texts, task="search_query", dimensions=64)
    assert np.array_equal(np.array(answer["embeddings"], np.float32), found.vectors)
    assert answer["usage"]["total_tokens"] == found.token_counts.sum() and answer["usage"]["truncated_texts"] == 0


def test_task_by_field_by_model_suffix_and_by_default(nomic_server, nomic_folder):
    engine, key = unpadded.load(nomic_folder, device="cpu"), {"authorization": "Bearer nk-one"}

    def embed(**request):
        answer = nomic_server.post("/v1/embeddings", {"input": "what?", **request}, **key)
        return np.array(answer["data"][0]["embedding"], np.float32)

    query, document = (engine.encode("what?", task=task) for task in ("search_query", "search_document"))
    assert np.array_equal(embed(task="search_query"), query)
    assert np.array_equal(embed(model="nomic-embed-text-v1.5:search_query"), query)
    assert np.array_equal(embed(), document) and not np.array_equal(query, document)
    request_ = {"texts": ["what?"], "model": "nomic-embed-text-v1.5:search_query"}
    found = nomic_server.post("/v1/embedding/text", request_, **key)["embeddings"]
    assert np.array_equal(np.array(found, np.float32), engine.encode(["what?"], task="search_query", normalize=True))


def test_endpoints_need_a_valid_api_key_except_health_and_metrics(nomic_server):
    for header in ({}, *({"authorization": value} for value in ("Bearer nk-two", "nk-one", "Basic nk-one", "Bearer"))):
        status, headers, body = nomic_server.request("POST", "/v1/embeddings", {"input": "a"}, **header)
        assert status == 401 and headers["www-authenticate"] == "Bearer"
        assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert nomic_server.request("GET", "/info")[0] == 401 and nomic_server.request("GET", "/v1/user")[0] == 401
    assert nomic_server.request("GET", "/health")[0] == nomic_server.request("GET", "/metrics")[0] == 200
    for header in ("bearer nk-one", "BEARER  nk-one", "Bearer schlüssel".encode()):
        assert nomic_server.request("GET", "/info", authorization=header)[0] == 200


def test_tei_embed(server, engine):
    status, headers, body = server.request("POST", "/embed", {"inputs": TEXTS})
    assert status == 200 and np.array_equal(np.array(json.loads(body), np.float32), engine.encode(TEXTS))
    assert headers["x-compute-tokens"] == str(engine.embed(TEXTS).token_counts.sum())
    assert headers["x-compute-characters"] == str(sum(map(len, TEXTS))) and headers["x-truncated"] == "1"
    times = {"x-total-time", "x-tokenization-time", "x-queue-time", "x-inference-time"}
    assert times < headers.keys() and headers["x-compute-type"] == "cpu"
    raw = np.array(server.post("/embed", {"inputs": "one", "normalize": False}), np.float32)
    assert np.array_equal(raw, engine.encode(["one"], normalize=False))
    status, _, body = server.request("POST", "/embed", {"inputs": TEXTS, "truncate": False})
    error = json.loads(body)
    assert (
        status == 413 and error["error_type"] == "Validation" and "text 3" in error["error"] and "256" in error["error"]
    )


def test_tei_embed_all(server, engine):
    found = server.post("/embed_all", {"inputs": TEXTS[:2]})
    for rows, expected in zip(found, engine.token_embeddings(TEXTS[:2]), strict=True):
        assert np.array_equal(np.array(rows, np.float32), expected)
    assert server.request("POST", "/embed_all", {"inputs": ["a " * 300] * 129})[0] == 413


def test_tei_tokenize_and_decode(server):
    tokens = server.post("/tokenize", {"inputs": "Hello, naïve 🙂"})[0]
    assert [token["text"] for token in tokens] == ["[CLS]", "Hello", ",", "naïve", "🙂", "[SEP]"]
    assert tokens[3] == {"id": 15743, "text": "naïve", "special": False, "start": 7, "stop": 12}
    ids = [token["id"] for token in tokens]
    assert server.post("/decode", {"ids": ids[:4]}) == ["hello, naive"]
    assert server.post("/decode", {"ids": [ids[:2], ids[1:3]], "skip_special_tokens": False}) == [
        "[CLS] hello",
        "hello,",
    ]


def test_every_operation_of_the_openapi_document_answers(server):
    info = json.loads(server.request("GET", "/info")[2])
    assert (
        info["max_input_length"] == 256
        and info["dimensions"] == 384
        and info["model_type"] == {"embedding": {"pooling": "mean"}}
    )
    document = json.loads(server.request("GET", "/openapi.json")[2])
    for path, operations in document["paths"].items():
        for method in operations:
            body = {} if method == "post" else None
            assert server.request(method.upper(), path.replace("{name}", MINILM_NAME), body)[0] in (200, 400, 422)
    assert set(document["components"]["schemas"]) >= {"EmbeddingsRequest", "TextRequest", "EmbedRequest"}


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embed"])
def test_octet_stream_returns_raw_rows(server, engine, path):
    field = "input" if path.startswith("/v1") else "inputs"
    status, headers, body = server.request("POST", path, {field: TEXTS}, accept="application/octet-stream")
    assert status == 200 and headers["x-dtype"] == "float32"
    shape = tuple(map(int, headers["x-shape"].split(",")))
    assert np.array_equal(np.frombuffer(body, "<f4").reshape(shape), engine.encode(TEXTS))


def test_gzip_requests(server, engine):
    packed = gzip.compress(json.dumps({"inputs": TEXTS}).encode())
    found = server.post("/embed", packed, content_encoding="gzip")
    assert np.array_equal(np.array(found, np.float32), engine.encode(TEXTS))
    bomb = gzip.compress(b" " * (20 << 20))
    for body, expected in ((packed[:-9], 400), (b"plain", 400), (bomb, 413)):
        assert server.request("POST", "/embed", body, content_encoding="gzip")[0] == expected
    status, _, body = server.request("POST", "/embed", packed, content_encoding="zstd")
    assert status == 415 and "'zstd'; use gzip" in json.loads(body)["error"]


def test_bodies_with_a_byte_order_mark_and_gzip_of_other_than_one_member(server, engine):
    body = b"\xef\xbb\xbf" + json.dumps({"inputs": TEXTS}).encode()
    members = gzip.compress(body[:7]) + gzip.compress(body[7:])
    for sent, encoding in ((body, ""), (gzip.compress(body), "gzip"), (gzip.compress(body), " X-GZIP")):
        found = server.post("/embed", sent, content_encoding=encoding)
        assert np.array_equal(np.array(found, np.float32), engine.encode(TEXTS))
    for sent in (gzip.compress(body) + b"more", members, gzip.compress(b"") * 5000):
        assert server.request("POST", "/embed", sent, content_encoding="gzip")[0] == 400


@pytest.mark.parametrize(
    ("accept", "binary"),
    [
        ("application/octet-stream", True),
        ("APPLICATION/Octet-Stream, */*", True),
        ("*/*, application/octet-stream", False),
        ("application/json, application/octet-stream", False),
        ("application/json;q=0.5, application/octet-stream", True),
        ("application/json, application/octet-stream;q=0.5", False),
        ("application/octet-stream;q=0, */*", False),
        ("application/*;q=0.9, application/octet-stream;q=0.1", False),
        ("text/html, application/octet-stream;q=0.2", True),
        ("text/html", False),
        (None, False),
    ],
)
def test_accept_is_negotiated_by_weight_and_order(server, accept, binary):
    headers = server.request("POST", "/embed", {"inputs": "a"}, **({} if accept is None else {"accept": accept}))[1]
    assert (headers["content-type"] == "application/octet-stream") == binary


def test_health_is_also_at_the_root_and_ping_for_get_and_head(server):
    for path in ("/health", "/", "/ping"):
        assert [server.request(method, path)[::2] for method in ("GET", "HEAD")] == [(200, b"")] * 2
    status, headers, body = server.request("HEAD", "/info")
    assert (status, body) == (200, b"") and int(headers["content-length"]) > 100


def test_fields_of_other_apis_are_mapped_ignored_or_rejected(server, engine, nomic_server, nomic_folder):
    """As clients of Cohere, Voyage, Jina, NVIDIA, vLLM and Hugging Face's inference API send them."""
    key = {"authorization": "Bearer nk-one"}
    nomic = unpadded.load(nomic_folder, device="cpu")
    long = "a b " * 700
    nulls = ["images", "late_chunking", "output_dimension"]
    ignored = {"user": "u", "options": {"wait_for_model": True}, "add_special_tokens": True, "input_type": "query"}
    for path, fields, expected, names in [
        ("/embed", ignored, engine.encode([long]), ignored.keys()),
        ("/v1/embeddings", ignored, engine.encode([long]), ignored.keys()),
        ("/v1/embeddings", {"truncate": "START"}, engine.encode([long], truncation="left"), ()),
        ("/v1/embeddings", {"output_dimension": 64, "normalized": True}, engine.encode([long], dimensions=64), ()),
        ("/embed", {"truncate": "END", "model": MINILM_NAME}, engine.encode([long]), ()),
        ("/embed", dict.fromkeys(nulls), engine.encode([long]), nulls),
        ("/", {"parameters": {"truncation_direction": "left"}}, engine.encode([long], truncation="left"), ()),
        ("/", {"parameters": {"normalize": False}, "user": None}, engine.encode([long], normalize=False), ["user"]),
    ]:
        field = "input" if path.startswith("/v1") else "inputs"
        status, headers, body = server.request(
            "POST", path, {field: [long], **fields}, accept="application/octet-stream"
        )
        assert status == 200, body
        assert set(headers.get("x-ignored-fields", "").split(", ")) - {""} == set(names)
        assert np.array_equal(np.frombuffer(body, "<f4"), expected[0]), (path, fields)
    for input_type in ("query", "search_query"):
        found = nomic_server.post("/embed", {"inputs": ["a"], "input_type": input_type}, **key)
        assert np.array_equal(np.array(found, np.float32), nomic.encode(["a"], task="search_query", normalize=True))
    for server_, path, fields, status, message in [
        (server, "/v1/embeddings", {"input": long, "truncate": "NONE"}, 400, "too long"),
        (server, "/v1/embeddings", {"input": "a", "add_special_tokens": False}, 400, "add_special_tokens"),
        (server, "/embed", {"inputs": "a", "late_chunking": True}, 422, "late_chunking"),
        (server, "/embed", {"inputs": "a", "dimensions": 3, "output_dimension": 4}, 422, "two values: 3 and 4"),
        (
            server,
            "/",
            {"inputs": "a", "truncate": True, "parameters": {"truncate": False}},
            422,
            "two values: True and",
        ),
        (server, "/embed", {"inputs": "a", "model": "other"}, 404, "'other'"),
        (
            nomic_server,
            "/v1/embeddings",
            {"input": "a", "input_type": "poem"},
            400,
            "'poem'; nomic-embed-text-v1.5 has search_",
        ),
        (nomic_server, "/v1/embeddings", {"input": "a", "model": "nomic-embed-text-v1.5:poem"}, 400, "task is unknown"),
    ]:
        found, _, body = server_.request("POST", path, fields, **key)
        assert found == status and message in body.decode(), body


def test_the_default_task_holds_on_every_route(nomic_folder):
    """A default that changes the vectors, unlike search_document, which is also nomic's default."""
    engine = unpadded.load(nomic_folder, device="cpu")
    query = engine.encode(["a"], task="search_query")[0]
    with serving(nomic_folder, "--default-task", "search_query", "--long-input", "reject") as server:
        for path, body in [
            ("/v1/embeddings", {"input": ["a"], "normalize": False}),
            ("/embed", {"inputs": ["a"], "normalize": False}),
            ("/", {"inputs": ["a"], "normalize": False}),
        ]:
            found = server.request("POST", path, body, accept="application/octet-stream")[2]
            assert np.array_equal(np.frombuffer(found, "<f4"), query), path
        found = server.request("POST", "/v1/embedding/text", {"texts": ["a"]}, accept="application/octet-stream")[2]
        assert np.array_equal(np.frombuffer(found, "<f4"), engine.encode(["a"], task="search_query", normalize=True)[0])
        rows = np.array(server.post("/embed_all", {"inputs": "a"})[0], np.float32)
        assert np.array_equal(rows, engine.token_embeddings("a", task="search_query")[0])
        prompted = server.post("/tokenize", {"inputs": "a", "prompt_name": "search_query"})
        assert server.post("/tokenize", {"inputs": "a"}) == prompted
        long = {"texts": ["word " * 9000]}
        assert server.request("POST", "/v1/embedding/text", long)[0] == 413
        assert server.request("POST", "/v1/embedding/text", long | {"long_text_mode": "truncate"})[0] == 200
        status, _, answer = server.request("POST", "/v1/embedding/text", {"texts": ["a"], "long_text_mode": "mean"})
        assert status == 422 and b"long_text_mode is not supported: 'mean'; use 'truncate', or split" in answer


def test_cors_allows_the_configured_origin_only(nomic_server):
    preflight = {"origin": "https://a.example", "access_control_request_method": "POST"}
    status, headers, _ = nomic_server.request("OPTIONS", "/v1/embeddings", **preflight)
    assert status == 200 and headers["access-control-allow-origin"] == "https://a.example"
    assert nomic_server.request("OPTIONS", "/v1/embeddings", **preflight | {"origin": "https://b.example"})[0] == 400
    key = {"authorization": "Bearer nk-one", "origin": "https://a.example", "accept": "application/octet-stream"}
    headers = nomic_server.request("POST", "/embed", {"inputs": "a", "user": None}, **key)[1]
    assert headers["access-control-expose-headers"] == "*" and "access-control-allow-credentials" not in headers


def test_concurrent_clients_get_exactly_their_own_vectors(server, engine):
    calls = [PARAGRAPHS[start : start + size] for start, size in zip(range(0, 64, 2), [1, 1, 2, 5] * 8, strict=True)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda texts: server.post("/embed", {"inputs": texts}), calls))
    for texts, answer in zip(calls, answers, strict=True):
        assert np.array_equal(np.array(answer, np.float32), engine.encode(texts))


def test_metrics_and_log_count_the_request_and_contain_no_text(server):
    before = {name: server.metric(name) for name in ("unpadded_tokens_total", "unpadded_truncated_texts_total")}
    status, headers, _ = server.request(
        "POST", "/embed", {"inputs": ["zebra crossing", "w " * 300]}, x_request_id="abc-1"
    )
    assert status == 200 and headers["x-request-id"] == "abc-1"
    assert server.metric("unpadded_tokens_total") == before["unpadded_tokens_total"] + 4 + 256
    assert server.metric("unpadded_truncated_texts_total") == before["unpadded_truncated_texts_total"] + 1
    assert server.metric("unpadded_queued_tokens") == 0
    wait_until(lambda: any(line.get("id") == "abc-1" for line in server.log))
    line = next(line for line in server.log if line.get("id") == "abc-1")
    assert (line["client"], line["method"], line["path"], line["status"]) == ("127.0.0.1", "POST", "/embed", 200)
    assert (line["texts"], line["tokens"], line["truncated"]) == (2, 260, 1)
    assert "zebra" not in "".join(server.stderr)


def test_log_requests_adds_the_body_to_the_log(nomic_server):
    for body, encoding in ((b'{"inputs": "zebra crossing"}', ""), (gzip.compress(b'{"inputs": "\xff'), "gzip")):
        nomic_server.request("POST", "/embed", body, authorization="Bearer nk-one", content_encoding=encoding)
    expected = ['{"inputs": "zebra crossing"}', '{"inputs": "\ufffd']
    wait_until(lambda: [line["request"] for line in nomic_server.log if line.get("path") == "/embed"][-2:] == expected)
    assert "nk-one" not in "".join(nomic_server.stderr)
