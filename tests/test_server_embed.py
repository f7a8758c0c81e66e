"""Cohere's /v1/embed and /v2/embed, by its clients and by plain HTTP, and Jina's fields of /v1/embeddings."""

import base64
import json

import numpy as np
import pytest
from support.checkpoints import add_sentence_transformers_files, change_json, write_bert_reranker, write_nomic
from support.corpus import PARAGRAPHS
from support.serving import encode_chunks, serving
from support.sparse import draw_texts, write_models

import unpadded
from unpadded.quantization import quantize
from unpadded.server.options import ServerOptions
from unpadded.server.service import Service

LENGTH = 48
PROMPTS = {"search_query": "search_query: ", "search_document": "search_document: ", "clustering": "clustering: "}
TEXTS = [text[:80] for text in PARAGRAPHS[:5]]
CHUNKS = ["one two three four five six " * 5, "tides rise and fall", "one two " * 9, "bread"]
LONG = ["one two three four five six seven eight nine ten " * 10, "short"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_nomic(tmp_path_factory.mktemp("served") / "embedder", hidden=64)
    change_json(folder / "config.json", matryoshka_dimensions=[64, 32, 16])
    return add_sentence_transformers_files(folder, normalize=False, max_seq_length=LENGTH, prompts=PROMPTS)


@pytest.fixture(scope="module")
def engine(folder):
    return unpadded.load(folder, device="cpu")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("sparse"))


@pytest.fixture(scope="module")
def server(folder, sparse, tmp_path_factory):
    """A server of a model with prompts, of one without, and of two with sparse weights."""
    plain = write_bert_reranker(tmp_path_factory.mktemp("served") / "plain", hidden=64, heads=2)
    add_sentence_transformers_files(plain, pooling="cls")
    with serving(
        [folder, plain, sparse["bert"], sparse["bge-m3"]], "--alias", "embed-v4.0", "--long-input", "reject"
    ) as server:
        yield server


def encode(engine, texts, task, **options):
    return engine.encode(texts, task=task, normalize=True, **options)


def test_cohere_client_gets_every_type_of_the_vectors_of_each_input_type(server, engine, cohere, connection):
    client = cohere.ClientV2(base_url=server.url, **connection)
    types = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    for task in PROMPTS:
        expected = encode(engine, TEXTS, task)
        answer = client.embed(model="embed-v4.0", texts=TEXTS, input_type=task, embedding_types=types)
        found = answer.embeddings
        assert np.array_equal(np.float32(found.float_), expected)
        assert np.array_equal([np.frombuffer(base64.b64decode(row), "<f4") for row in found.base64], expected)
        assert np.array_equal(found.int8, np.rint(expected.astype(np.float64) * 127))
        assert np.array_equal(found.uint8, np.array(found.int8) + 128)
        assert found.binary == quantize(expected, "binary").tolist()
        assert found.ubinary == quantize(expected, "ubinary").tolist()
        assert answer.id and answer.texts == TEXTS and answer.response_type == "embeddings_by_type"
        tokens = engine.embed(TEXTS, task=task).token_counts.sum()
        assert answer.meta.api_version.version == "2" and answer.meta.tokens.input_tokens == tokens
    default = client.embed(model="embed-v4.0", texts=TEXTS, input_type="clustering").embeddings
    assert np.array_equal(np.float32(default.float_), encode(engine, TEXTS, "clustering")) and default.int8 is None


def test_cohere_client_with_dimensions_and_truncation(server, engine, cohere, connection):
    client = cohere.ClientV2(base_url=server.url, **connection)

    def embed(texts, **options):
        answer = client.embed(model="embedder", texts=texts, input_type="search_query", **options)
        return np.float32(answer.embeddings.float_)

    cut = encode(engine, TEXTS, "search_query", dimensions=16)
    assert np.array_equal(embed(TEXTS, output_dimension=16, priority=3), cut)
    for word, truncation in (("END", "right"), ("START", "left")):
        expected = encode(engine, LONG, "search_query", truncation=truncation)
        assert np.array_equal(embed(LONG, truncate=word), expected), word
    for options in ({}, {"truncate": "NONE"}):
        with pytest.raises(cohere.BadRequestError, match="text 0 is too long: more than 48 tokens"):
            embed(LONG, **options)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"max_tokens": 12}, "BadRequestError", "unknown field `max_tokens`"),
        ({"images": ["data:image/png;base64,aa"]}, "BadRequestError", "unknown field `images`"),
        ({"inputs": [{"content": []}]}, "BadRequestError", "unknown field `inputs`"),
        ({"input_type": "image"}, "BadRequestError", "'image'; embedder has search_query, search_document, clustering"),
        ({"embedding_types": ["float", "int4"]}, "BadRequestError", "'int4' - at `$.embedding_types[1]`"),
        ({"output_dimension": 65}, "BadRequestError", "65; embedder supports 1 to 64"),
        ({"truncate": "MIDDLE"}, "BadRequestError", "$.truncate"),
        ({"texts": []}, "BadRequestError", "$.texts"),
        ({"model": "embed-v9"}, "NotFoundError", "'embed-v9'; use embedder or embed-v4.0 or plain or bert or bge-m3"),
    ],
)
def test_cohere_client_raises_its_own_errors(server, cohere, connection, fields, error, message):
    client = cohere.ClientV2(base_url=server.url, **connection)
    with pytest.raises(getattr(cohere, error)) as raised:
        client.embed(**{"model": "embedder", "texts": ["a"], "input_type": "clustering", **fields})
    assert message in raised.value.body["message"] and raised.value.body["detail"] == raised.value.body["message"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by the client
def test_cohere_client_of_version_1(server, engine, cohere, connection):
    """It sends 96 texts per request."""
    texts = [f"text {index}" for index in range(100)]
    expected = encode(engine, texts, "search_document")
    client = cohere.Client(base_url=server.url, **connection)
    found = client.embed(texts=texts, model="embed-v4.0", input_type="search_document")
    assert np.array_equal(np.float32(found.embeddings), expected) and found.response_type == "embeddings_floats"
    assert found.texts == texts and found.meta.api_version.version == "1" and found.meta.billed_units.input_tokens > 0
    found = client.embed(texts=texts, model="embedder", input_type="search_document", embedding_types=["float", "int8"])
    assert np.array_equal(np.float32(found.embeddings.float_), expected) and len(found.embeddings.int8) == 100


def test_quantized_vectors_depend_on_their_text_alone(server):
    """Unlike those of `encode` without ranges, which are those of the texts that are embedded together."""
    types = ["int8", "uint8", "binary", "ubinary"]
    together = server.post("/v2/embed", {"texts": TEXTS, "embedding_types": types})["embeddings"]
    for index, text in enumerate(TEXTS):
        alone = server.post("/v2/embed", {"texts": [text], "embedding_types": types})["embeddings"]
        assert alone == {kind: [together[kind][index]] for kind in types}


def test_a_model_without_prompts_ignores_the_input_type(server, folder):
    for fields in ({}, {"truncate": "END"}):
        body = {"texts": TEXTS, "model": "plain"} | fields
        status, headers, content = server.request("POST", "/v2/embed", body | {"input_type": "search_query"})
        assert status == 200 and headers["x-ignored-fields"] == "input_type"
        assert json.loads(content)["embeddings"] == server.post("/v2/embed", body)["embeddings"]
    status, _, content = server.request("POST", "/v1/embedding/text", {"texts": TEXTS, "model": "plain"})
    assert status == 200 and len(json.loads(content)["embeddings"]) == len(TEXTS)
    status, _, content = server.request(
        "POST", "/v1/embeddings", {"input": "a", "model": "plain", "task": "clustering"}
    )
    assert status == 400 and b"task is unknown: 'clustering'; plain has" in content


def test_tasks_have_other_names_in_other_checkpoints(tmp_path):
    def options(prompts, *tasks):
        folder = add_sentence_transformers_files(write_nomic(tmp_path / "model", layers=1, hidden=64), prompts=prompts)
        service = Service([unpadded.load(folder, device="cpu")], ServerOptions())
        service.batcher.close()
        return [service.models[0].task_options(task) for task in tasks]

    jina = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
    own = [{"task": name} for name in jina]
    assert options(dict.fromkeys(jina, "a"), *jina) == own
    cohere = ("search_query", "search_document", "clustering", "classification")
    assert options(dict.fromkeys(jina, "a"), *cohere) == own[:4]
    e5 = {"query": "query: ", "passage": "passage: "}
    for tasks in (jina, cohere):
        unknown = [{"task": tasks[2]}]
        assert options(e5, *tasks[:3]) == [{"task": "query"}, {"task": "passage"}, *unknown]
        # as in arctic-embed: documents have no prompt
        assert options({"query": "query: "}, *tasks[:3]) == [{"task": "query"}, {"prompt": ""}, *unknown]
        both = {"query": "a", "search_query": "b", "document": "c"}
        found = options(both, *tasks[:2], "query")
        assert found == [{"task": "search_query"}, {"task": "document"}, {"task": "query"}]


def embed(server, **fields):
    return [
        row["embedding"]
        for row in server.post("/v1/embeddings", {"input": TEXTS, "model": "embedder"} | fields)["data"]
    ]


def test_jina_fields(server, engine):
    for jina, task in (("retrieval.query", 0), ("retrieval.passage", 1), ("separation", 2)):
        expected = engine.encode(TEXTS, task=[*PROMPTS][task])
        found = embed(server, task=jina, late_chunking=False, embedding_type="float")
        assert np.array_equal(np.float32(found), expected), jina
        assert np.array_equal(np.float32(embed(server, model=f"embedder:{jina}")), expected), jina
    task, expected = {"task": "retrieval.query"}, encode(engine, TEXTS, "search_query")
    assert np.array_equal(np.float32(embed(server, normalized=True, **task)), expected)
    raw = engine.encode(TEXTS, task="search_query", normalize=False)
    assert np.array_equal(np.float32(embed(server, normalized=False, **task)), raw)
    cut = encode(engine, TEXTS, "search_query", dimensions=32)
    assert np.array_equal(np.float32(embed(server, dimensions=32, **task)), cut)
    for kind in ("binary", "ubinary"):
        for name in ("embedding_type", "output_dtype", "encoding_type"):
            assert embed(server, **{name: kind}, **task) == quantize(raw, kind).tolist()
    for fields in (
        {"embedding_type": "base64"},
        {"encoding_format": "base64"},
        {"encoding_format": "base64", "embedding_type": "float"},
        {"encoding_format": "base64", "embedding_type": "base64"},
        {"encoding_format": "float", "embedding_type": "base64"},
    ):
        found = [np.frombuffer(base64.b64decode(row), "<f4") for row in embed(server, **fields, **task)]
        assert np.array_equal(found, raw), fields
    long = encode(engine, LONG, "search_query")
    assert np.array_equal(np.float32(embed(server, input=LONG, truncate=True, normalized=True, **task)), long)


def test_binary_vectors_are_json_for_a_client_that_prefers_bytes(server):
    body = {"input": TEXTS, "model": "embedder", "embedding_type": "binary"}
    _, headers, content = server.request("POST", "/v1/embeddings", body, accept="application/octet-stream")
    assert headers["content-type"] == "application/json" and len(json.loads(content)["data"][0]["embedding"]) == 8


def test_fields_of_jina_that_cannot_be_honored_are_errors(server):
    for fields, message in [
        ({"task": "text-matching"}, "task is unknown: 'text-matching'; embedder has search_query"),
        ({"late_chunking": True, "input": [[101, 102]]}, "late_chunking is not supported for token ids: [101, 102]"),
        ({"late_chunking": True, "input": ["a", ""]}, "span 1 of text 0 is not a range of 1 to "),
        ({"late_chunking": True, "model": "plain"}, "plain has cls pooling, spans are means of tokens"),
        ({"embedding_type": "int8"}, "'int8' - at `$.embedding_type`"),
        ({"embedding_type": ["float", "binary"]}, "$.embedding_type"),
        (
            {"encoding_format": "base64", "embedding_type": "ubinary"},
            "embedding_type is 'ubinary' with base64; send enc",
        ),
        ({"task": "retrieval.query", "model": "embedder:clustering"}, "two tasks: 'clustering' in model"),
    ]:
        status, _, body = server.request("POST", "/v1/embeddings", {"input": "a", "model": "embedder"} | fields)
        error = json.loads(body)
        assert status == 400 and message in error["error"]["message"] and error["detail"] == error["error"]["message"]


def test_jina_late_chunking(server, engine):
    """The inputs have more tokens than the model's maximum, and a server with --long-input reject embeds them."""
    expected = encode_chunks(engine, [CHUNKS], task="search_query")
    found = embed(server, input=CHUNKS, late_chunking=True, task="retrieval.query")
    assert np.array_equal(np.float32(found), expected)
    assert not np.allclose(expected[1], engine.encode(CHUNKS[1], task="search_query"))
    cut = encode_chunks(engine, [CHUNKS], dimensions=16)
    body = {"input": CHUNKS, "model": "embedder", "late_chunking": True, "dimensions": 16}
    _, headers, content = server.request("POST", "/v1/embeddings", body, accept="application/octet-stream")
    assert np.array_equal(np.frombuffer(content, "<f4").reshape(4, 16), cut)
    assert headers["x-compute-characters"] == str(len("\n".join(CHUNKS))) and headers["x-truncated"] == "0"
    alone = embed(server, input="bread", late_chunking=True)
    assert np.array_equal(np.float32(alone), encode_chunks(engine, [["bread"]]))
    assert embed(server, input=["bread"], late_chunking=True) == alone


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by the client
def test_voyage_client_gets_chunks_in_context(server, engine):
    client = pytest.importorskip("voyageai").Client(api_key="none", base_url=f"{server.url}/v1")
    documents, before = [CHUNKS, TEXTS[:2], TEXTS[:2], TEXTS[2:3]], server.metric("unpadded_texts_total")
    expected = encode_chunks(engine, documents, task="search_document", normalize=True)
    answer = client.contextualized_embed(documents, "embedder", input_type="document")
    assert [len(one.embeddings) for one in answer.results] == [4, 2, 2, 1]
    assert [one.index for one in answer.results] == [0, 1, 2, 3]
    assert np.array_equal(np.float32([row for one in answer.results for row in one.embeddings]), expected)
    assert server.metric("unpadded_texts_total") - before == 9
    queries = [[text] for text in TEXTS]
    answer = client.contextualized_embed(TEXTS, "embedder", input_type="query", output_dimension=32)
    expected = encode_chunks(engine, queries, task="search_query", dimensions=32)
    assert np.array_equal(np.float32([one.embeddings[0] for one in answer.results]), expected)
    assert answer.total_tokens == engine.embed(TEXTS, task="search_query").token_counts.sum()
    unit = encode_chunks(engine, [CHUNKS], normalize=True)
    rounded = np.rint(unit.astype(np.float64) * 127)
    quantized = {"int8": rounded, "uint8": rounded + 128, "binary": quantize(unit, "binary")}
    for dtype, rows in (quantized | {"ubinary": quantize(unit, "ubinary")}).items():
        [found] = client.contextualized_embed([CHUNKS], "embedder", output_dtype=dtype).results
        assert np.array_equal(found.embeddings, rows), dtype
        body = {"inputs": [CHUNKS], "model": "embedder", "output_dtype": dtype, "encoding_format": None}
        [plain] = server.post("/v1/contextualizedembeddings", body | {"enable_auto_chunking": False})["data"]
        assert [row["embedding"] for row in plain["data"]] == found.embeddings


def test_contextualized_embeddings_are_lists_of_lists(server, engine):
    body = {"inputs": [["a", "b"], ["c"]], "model": "plain", "input_type": "query"}
    status, _, content = server.request("POST", "/v1/contextualizedembeddings", body)
    assert status == 400 and "plain has cls pooling" in json.loads(content)["detail"]
    _, headers, _ = server.request("POST", "/v1/contextualizedembeddings", body | {"model": "bert"})
    assert headers["x-ignored-fields"] == "input_type"
    body |= {"model": "embedder"}
    found = server.post("/v1/contextualizedembeddings", body)
    vectors = [row.pop("embedding") for document in found["data"] for row in document["data"]]
    assert np.array_equal(
        np.float32(vectors), encode_chunks(engine, body["inputs"], task="search_query", normalize=True)
    )
    first = {"object": "list", "data": [{"object": "embedding", "index": index} for index in (0, 1)], "index": 0}
    second = {"object": "list", "data": [{"object": "embedding", "index": 0}], "index": 1}
    tokens = engine.embed(["a\nb", "c"], task="search_query").token_counts.sum()
    usage = {"total_tokens": tokens}
    assert found == {"object": "list", "data": [first, second], "model": "embedder", "usage": usage}
    for fields, status, message in [
        ({"enable_auto_chunking": True}, 400, "unknown field `enable_auto_chunking`"),
        ({"inputs": [["a"], []]}, 400, "$.inputs[1]"),
        ({"inputs": [["a"], ["b", ""]]}, 400, "span 1 of text 1 is not a range of 1 to"),
        ({"input_type": "clustering"}, 400, "'clustering' - at `$.input_type`"),
        ({"inputs": [["a"] * 1500, ["b"] * 1500]}, 400, "too many texts: 3000, maximum 2048 texts"),
        ({"inputs": [["a" * (1 << 18)] * 2]}, 400, "a text is too long: 524289, maximum 524288 characters"),
    ]:
        found, _, content = server.request("POST", "/v1/contextualizedembeddings", body | fields)
        assert found == status and message in json.loads(content)["detail"], content


def test_tei_embed_sparse(server, sparse):
    """The first model with such a head is used, and that of the masked language model is for nothing else."""
    for name, fields in (("bert", {}), ("bge-m3", {"model": "bge-m3"})):
        engine = unpadded.load(sparse[name], device="cpu")
        for texts, truncation in ((draw_texts(9), "right"), ("tide", "right"), (LONG, "left")):
            expected = engine.encode_sparse(texts, truncation=truncation)
            body = {"inputs": texts, "truncate": True, "truncation_direction": truncation.title(), "prompt_name": None}
            found = server.post("/embed_sparse", body | fields)
            for index, row in enumerate(found):
                part = slice(*expected.indptr[index : index + 2])
                assert [one["index"] for one in row] == expected.ids[part].tolist()
                assert np.array_equal(np.float32([one["value"] for one in row]), expected.weights[part])
            assert len(found) == len(expected) and (any(found) or len(texts) < 9)
    assert len(server.post("/embed", {"inputs": "a"})[0]) == 64
    for fields, status, message in [
        ({"inputs": LONG}, 413, "text 0 is too long: more than 48 tokens"),
        ({"model": "embedder"}, 422, "embedder has no head for sparse weights"),
        ({"prompt_name": "search_query"}, 422, "task is unknown: 'search_query'"),
        ({"inputs": ["a"] * 3000}, 413, "too many texts: 3000"),
    ]:
        found, _, content = server.request("POST", "/embed_sparse", {"inputs": "a"} | fields)
        assert found == status and message in json.loads(content)["error"], content
