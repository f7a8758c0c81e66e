"""The interfaces, through the clients people have: openai, huggingface_hub, langchain-openai, nomic; and by hand."""

import asyncio
import base64
import gzip
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pyarrow.parquet
import pytest
import zstandard
from huggingface_hub import AsyncInferenceClient, InferenceClient
from langchain_huggingface import HuggingFaceEndpointEmbeddings
from support.checkpoints import add_sentence_transformers_files, change_json, write_nomic
from support.corpus import PARAGRAPHS
from support.serving import ENVIRONMENT, serving

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


@pytest.fixture(scope="module")
def nomic_folder(tmp_path_factory):
    folder = write_nomic(tmp_path_factory.mktemp("served") / "nomic-embed-text-v1.5", hidden=128)
    change_json(folder / "config.json", matryoshka_dimensions=[128, 64], matryoshka_layer_norm=True)
    add_sentence_transformers_files(folder, normalize=False, max_seq_length=8192)
    return folder


@pytest.fixture(scope="module")
def nomic_server(nomic_folder):
    flags = "--api-key nk-one --default-task search_document --cors-origin https://a.example --log-requests"
    with serving(nomic_folder, *flags.split()) as server:
        yield server


def vectors(response):
    return np.array([item.embedding for item in response.data], np.float32)


def test_a_gpu_is_warmed_for_every_bucket_of_its_graphs(engine):
    service = Service(engine, ServerOptions())
    assert list(service._sizes()) == [(1, 1), (engine._pipeline.token_budget, 1)]
    service.device = "cuda"
    sizes = set(service._sizes())
    buckets = {(tokens, texts) for tokens in cuda_graphs.TOKENS for texts in cuda_graphs.TEXTS if texts <= tokens}
    assert buckets - sizes == {(tokens, texts) for tokens, texts in buckets if tokens > engine._pipeline.token_budget}
    service.warm_up()
    service.batcher.close()


@pytest.mark.parametrize("format", ["base64", "float"])
def test_openai_client_gets_the_bits_of_encode(client, engine, format):
    response = client.embeddings.create(model="text-embedding-3-small", input=TEXTS, encoding_format=format)
    found = [item.embedding for item in response.data]
    if format == "base64":
        found = [np.frombuffer(base64.b64decode(row), "<f4") for row in found]
    assert np.array_equal(np.array(found, np.float32), engine.encode(TEXTS))
    assert [item.index for item in response.data] == list(range(len(TEXTS)))
    assert response.usage.prompt_tokens == response.usage.total_tokens == engine.embed(TEXTS).token_counts.sum()
    assert response.model == "text-embedding-3-small" and response.object == "list"


def test_openai_client_by_default(client, engine):
    assert np.array_equal(vectors(client.embeddings.create(model="model", input=TEXTS[0]))[0], engine.encode(TEXTS[0]))
    cut = client.embeddings.create(model="model", input=TEXTS, dimensions=128, user="someone")
    assert np.array_equal(vectors(cut), engine.encode(TEXTS, dimensions=128))


def test_openai_token_ids(client, engine):
    ids = [[101, 2054, 2003, 102], [101, 102]]
    assert np.array_equal(vectors(client.embeddings.create(model="model", input=ids)), engine.encode(ids))
    assert np.array_equal(vectors(client.embeddings.create(model="model", input=ids[0]))[0], engine.encode(ids)[0])
    with pytest.raises(openai.BadRequestError, match="whose tokenizer the served model does not have"):
        client.embeddings.create(model="text-embedding-3-small", input=ids)


def test_openai_models(client):
    assert [model.id for model in client.models.list()] == ["model", "text-embedding-3-small"]
    assert client.models.retrieve("model").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("owner/other")


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"model": "other"}, openai.NotFoundError, "'other'; use model or text-embedding-3-small"),
        ({"dimensions": 385}, openai.BadRequestError, "dimensions are out of range: 385"),
        ({"dimensions": 0}, openai.BadRequestError, "Expected `int` >= 1"),
        ({"input": []}, openai.BadRequestError, "length >= 1"),
        ({"input": [[]]}, openai.BadRequestError, "text 0 has 0 token ids"),
        ({"input": [1, "a"]}, openai.BadRequestError, "mixes token ids with texts"),
        ({"input": [[40000]]}, openai.BadRequestError, "out of range: 40000"),
        ({"input": ["a"] * 2049}, openai.BadRequestError, "2049, at most 2048"),
        ({"extra_body": {"task": "search_query"}}, openai.BadRequestError, "task is unknown: 'search_query'"),
        ({"extra_body": {"dimension": 3}}, openai.BadRequestError, "unknown field `dimension`"),
    ],
)
def test_openai_errors(client, request_, error, message):
    with pytest.raises(error) as raised:
        client.embeddings.create(**{"model": "model", "input": "a", **request_})
    assert message in raised.value.body["message"]
    assert raised.value.body["type"] == "invalid_request_error" and "code" in raised.value.body


def test_langchain_client(server, engine):
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


def test_huggingface_client(server, engine):
    client = InferenceClient(model=server.url, timeout=30)
    assert np.array_equal(client.feature_extraction(TEXTS[0], normalize=True)[0], engine.encode(TEXTS[0]))
    found = client.feature_extraction(TEXTS, truncate=True, truncation_direction="left", dimensions=64)
    assert np.array_equal(found, engine.encode(TEXTS, truncation="left", dimensions=64))
    scores = client.sentence_similarity("What is TSNE?", other_sentences=["a map of points", "bread"])
    expected = engine.encode(["a map of points", "bread"]) @ engine.encode("What is TSNE?")
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_langchain_client_of_tei(server, engine):
    """Its constructor takes repository names alone; a server of one's own is reached through its clients."""
    embeddings = HuggingFaceEndpointEmbeddings(
        model="owner/name", huggingfacehub_api_token="none", model_kwargs={"truncate": True, "normalize": True}
    )
    embeddings.client = InferenceClient(model=server.url, timeout=30)
    expected = engine.encode(TEXTS)
    assert np.array_equal(np.array(embeddings.embed_documents(TEXTS), np.float32), expected)
    assert np.array_equal(np.array(embeddings.embed_query(TEXTS[0]), np.float32), engine.encode(TEXTS[0]))

    async def embed():
        async with AsyncInferenceClient(model=server.url, timeout=30) as embeddings.async_client:
            return await embeddings.aembed_documents(TEXTS)

    found = asyncio.run(embed())
    assert np.array_equal(np.array(found, np.float32), expected)


def test_nomic_client(nomic_server, nomic_folder, tmp_path):
    code = (
        "import json, nomic; from nomic import embed; nomic.login('nk-one');"
        "print(json.dumps(embed.text(json.loads(input()), model='nomic-embed-text-v1.5', task_type='search_query',"
        " dimensionality=64, long_text_mode='mean')))"
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
    found = unpadded.load(nomic_folder, device="cpu").embed(texts, task="search_query", dimensions=64, long_text="mean")
    assert np.array_equal(np.array(answer["embeddings"], np.float32), found.vectors)
    assert answer["usage"]["total_tokens"] == found.token_counts.sum()


def test_tasks_by_field_suffix_and_default(nomic_server, nomic_folder):
    engine, key = unpadded.load(nomic_folder, device="cpu"), {"authorization": "Bearer nk-one"}

    def ask(**request):
        answer = nomic_server.post("/v1/embeddings", {"input": "what?", **request}, **key)
        return np.array(answer["data"][0]["embedding"], np.float32)

    query, document = (engine.encode("what?", task=task) for task in ("search_query", "search_document"))
    assert np.array_equal(ask(task="search_query"), query)
    assert np.array_equal(ask(model="nomic-embed-text-v1.5:search_query"), query)
    assert np.array_equal(ask(), document) and not np.array_equal(query, document)


def test_keys(nomic_server):
    for header in ({}, {"authorization": "Bearer nk-two"}, {"authorization": "nk"}):
        status, headers, body = nomic_server.ask("POST", "/v1/embeddings", {"input": "a"}, **header)
        assert status == 401 and headers["www-authenticate"] == "Bearer"
        assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert nomic_server.ask("GET", "/info")[0] == 401 and nomic_server.ask("GET", "/v1/user")[0] == 401
    assert nomic_server.ask("GET", "/health")[0] == nomic_server.ask("GET", "/metrics")[0] == 200


def test_embed_of_tei(server, engine):
    status, headers, body = server.ask("POST", "/embed", {"inputs": TEXTS})
    assert status == 200 and np.array_equal(np.array(json.loads(body), np.float32), engine.encode(TEXTS))
    assert headers["x-compute-tokens"] == str(engine.embed(TEXTS).token_counts.sum())
    assert headers["x-compute-characters"] == str(sum(map(len, TEXTS))) and headers["x-truncated"] == "1"
    assert {
        "x-compute-type",
        "x-total-time",
        "x-tokenization-time",
        "x-queue-time",
        "x-inference-time",
    } <= headers.keys()
    raw = np.array(server.post("/embed", {"inputs": "one", "normalize": False}), np.float32)
    assert np.array_equal(raw, engine.encode(["one"], normalize=False))
    status, _, body = server.ask("POST", "/embed", {"inputs": TEXTS, "truncate": False})
    error = json.loads(body)
    assert status == 413 and error["error_type"] == "Validation" and "text 3 is too long" in error["error"]


def test_embed_all_of_tei(server, engine):
    found = server.post("/embed_all", {"inputs": TEXTS[:2]})
    for rows, expected in zip(found, engine.token_embeddings(TEXTS[:2]), strict=True):
        assert np.array_equal(np.array(rows, np.float32), expected)
    assert server.ask("POST", "/embed_all", {"inputs": ["a " * 300] * 129})[0] == 413


def test_tokenize_and_decode_of_tei(server):
    tokens = server.post("/tokenize", {"inputs": "Hello, naïve 🙂"})[0]
    assert [token["text"] for token in tokens] == ["[CLS]", "Hello", ",", "naïve", "🙂", "[SEP]"]
    assert tokens[3] == {"id": 15743, "text": "naïve", "special": False, "start": 7, "stop": 12}
    ids = [token["id"] for token in tokens]
    assert server.post("/decode", {"ids": ids[:4]}) == ["hello, naive"]
    assert server.post("/decode", {"ids": [ids[:2], ids[1:3]], "skip_special_tokens": False}) == [
        "[CLS] hello",
        "hello,",
    ]


def test_info_and_document(server):
    info = json.loads(server.ask("GET", "/info")[2])
    assert info["max_input_length"] == 256 and info["model_type"] == {"embedding": {"pooling": "mean"}}
    document = json.loads(server.ask("GET", "/openapi.json")[2])
    for path, operations in document["paths"].items():
        for method in operations:
            assert server.ask(method.upper(), path.replace("{name}", "model"), {} if method == "post" else None)[0] in (
                200,
                400,
                422,
            )
    assert set(document["components"]["schemas"]) >= {"EmbeddingsRequest", "TextRequest", "EmbedRequest"}


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embed"])
def test_raw_rows(server, engine, path):
    field = "input" if path.startswith("/v1") else "inputs"
    status, headers, body = server.ask("POST", path, {field: TEXTS}, accept="application/octet-stream")
    assert status == 200 and headers["x-dtype"] == "float32"
    shape = tuple(map(int, headers["x-shape"].split(",")))
    assert np.array_equal(np.frombuffer(body, "<f4").reshape(shape), engine.encode(TEXTS))
    status, headers, body = server.ask("POST", path, {field: TEXTS}, accept="application/vnd.apache.parquet")
    assert status == 200 and headers["content-type"] == "application/vnd.apache.parquet"
    column = pyarrow.parquet.read_table(pyarrow.BufferReader(body))["vector"]
    assert np.array_equal(np.stack(column.to_numpy()), engine.encode(TEXTS))
    status, headers, body = server.ask("POST", path, {field: TEXTS}, accept="application/vnd.apache.arrow.stream")
    assert status == 200 and headers["content-type"] == "application/vnd.apache.arrow.stream"
    column = pyarrow.ipc.open_stream(body).read_all()["vector"]
    assert np.array_equal(np.stack(column.to_numpy()), engine.encode(TEXTS))


@pytest.mark.parametrize(
    ("encoding", "compress"), [("gzip", gzip.compress), ("zstd", zstandard.ZstdCompressor().compress)]
)
def test_compressed_requests(server, engine, encoding, compress):
    packed = compress(json.dumps({"inputs": TEXTS}).encode())
    found = server.post("/embed", packed, content_encoding=encoding)
    assert np.array_equal(np.array(found, np.float32), engine.encode(TEXTS))
    bomb = compress(b" " * (20 << 20))
    for body, expected in ((packed[:-9], 400), (b"plain", 400), (bomb, 413)):
        assert server.ask("POST", "/embed", body, content_encoding=encoding)[0] == expected
    assert server.ask("POST", "/embed", packed, content_encoding="br")[0] == 415


def test_pages_of_other_origins(nomic_server):
    asked = {"origin": "https://a.example", "access_control_request_method": "POST"}
    status, headers, _ = nomic_server.ask("OPTIONS", "/v1/embeddings", **asked)
    assert status == 200 and headers["access-control-allow-origin"] == "https://a.example"
    assert nomic_server.ask("OPTIONS", "/v1/embeddings", **asked | {"origin": "https://b.example"})[0] == 400


def test_many_clients_get_their_own_bits(server, engine):
    calls = [PARAGRAPHS[start : start + size] for start, size in zip(range(0, 128, 2), [1, 1, 2, 5] * 16, strict=True)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda texts: server.post("/embed", {"inputs": texts}), calls))
    for texts, answer in zip(calls, answers, strict=True):
        assert np.array_equal(np.array(answer, np.float32), engine.encode(texts))


def test_metrics_and_logs_say_what_happened_and_quote_nothing(server):
    before = {name: server.metric(name) for name in ("unpadded_tokens_total", "unpadded_truncated_texts_total")}
    status, headers, _ = server.ask("POST", "/embed", {"inputs": ["zebra crossing", "w " * 300]}, x_request_id="abc-1")
    assert status == 200 and headers["x-request-id"] == "abc-1"
    assert server.metric("unpadded_tokens_total") == before["unpadded_tokens_total"] + 4 + 256
    assert server.metric("unpadded_truncated_texts_total") == before["unpadded_truncated_texts_total"] + 1
    assert server.metric("unpadded_queued_tokens") == 0
    line = next(line for line in server.lines if line.get("id") == "abc-1")
    assert (line["path"], line["status"], line["texts"], line["tokens"], line["truncated"]) == (
        "/embed",
        200,
        2,
        260,
        1,
    )
    assert "zebra" not in "".join(server.said)


def test_the_log_quotes_requests_where_asked(nomic_server):
    for body, encoding in ((b'{"inputs": "zebra crossing"}', ""), (gzip.compress(b'{"inputs": "\xff'), "gzip")):
        nomic_server.ask("POST", "/embed", body, authorization="Bearer nk-one", content_encoding=encoding)
    nomic_server.metric("unpadded_texts_total")  # the lines are written after the answers
    quoted = [line["request"] for line in nomic_server.lines if line.get("path") == "/embed"]
    assert quoted[-2:] == ['{"inputs": "zebra crossing"}', '{"inputs": "\ufffd']
    assert "nk-one" not in "".join(nomic_server.said)
