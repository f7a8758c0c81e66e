"""Scores over HTTP: /rerank and /predict of TEI, and /v1/rerank and /v2/rerank of Jina, Cohere and Voyage."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import numpy as np
import pytest
from support.checkpoints import MINILM_NAME, change_json, write_bert_reranker
from support.serving import serving

import unpadded
from unpadded.server.options import ServerOptions
from unpadded.server.service import Service

WORDS = ["tide", "bread", "coroutine", "of", "the", "7", "what", "is", "a", "window", "unbelievable"]
QUERY = "what is a tide"
LENGTH = 48
LABELS = ("negative", "neutral", "positive")
ROUTES = ("/v1/rerank", "/v2/rerank")


def draw_texts(count, seed=0, longest=30):
    """Return texts of 1 to `longest` words; with 30, a pair with QUERY is not truncated."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]


DOCUMENTS = draw_texts(20)


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    """A reranker whose own activation is the identity, as that of ms-marco-MiniLM."""
    folder = write_bert_reranker(tmp_path_factory.mktemp("served") / "reranker", positions=LENGTH)
    change_json(folder / "config.json", sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"})
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return write_bert_reranker(tmp_path_factory.mktemp("served") / "classifier", positions=LENGTH, labels=LABELS)


@pytest.fixture(scope="module")
def engine(reranker):
    return unpadded.load(reranker, device="cpu")


@pytest.fixture(scope="module")
def server(reranker):
    with serving(reranker, "--alias", "rerank-v3.5", "--max-inputs", "64", "--max-body", "200000") as server:
        yield server


@pytest.fixture(scope="module")
def classifier_server(classifier):
    with serving(classifier) as server:
        yield server


@pytest.fixture(scope="module")
def embedder_server(minilm):
    with serving(minilm) as server:
        yield server


def ranking(engine, query=QUERY, documents=DOCUMENTS, **options):
    return [(one.index, one.score) for one in engine.rank(query, documents, **{"activation": "sigmoid", **options})]


def error_of(server, path, body):
    status, _, content = server.request("POST", path, body)
    return status, json.loads(content)


def test_tei_rerank(server, engine):
    body = {"query": QUERY, "texts": DOCUMENTS}
    status, headers, content = server.request("POST", "/rerank", body)
    found = json.loads(content)
    assert status == 200 and [(one["index"], one["score"]) for one in found] == ranking(engine)
    assert all(one.keys() == {"index", "score"} and 0 < one["score"] < 1 for one in found)
    plan = engine._pipeline.score_plan()[0]
    [window] = engine._pipeline.reader.windows([(QUERY, document) for document in DOCUMENTS], plan)
    assert headers["x-compute-tokens"] == str(window.token_counts.sum()) and headers["x-truncated"] == "0"
    assert headers["x-compute-characters"] == str(len(QUERY) * len(DOCUMENTS) + sum(map(len, DOCUMENTS)))
    found = server.post("/rerank", body | {"raw_scores": True, "return_text": True})
    assert (
        [(one["index"], one["score"]) for one in found]
        == ranking(engine, activation="none")
        == ranking(engine, activation="auto")
    )
    assert [one["text"] for one in found] == [DOCUMENTS[one["index"]] for one in found]
    ties = server.post("/rerank", {"query": "a", "texts": ["b", "b", "b"], "truncation_direction": "Right"})
    assert [one["index"] for one in ties] == [0, 1, 2]


def test_truncation(server, engine, reranker):
    long = [" ".join(DOCUMENTS[:4]), "tide"]
    status, headers, content = server.request("POST", "/rerank", {"query": QUERY, "texts": long})
    assert [(one["index"], one["score"]) for one in json.loads(content)] == ranking(engine, documents=long)
    assert status == 200 and headers["x-truncated"] == "1"
    message = f"text 0 is too long: more than {LENGTH} tokens; shorten it or request truncation"
    status, error = error_of(server, "/rerank", {"query": QUERY, "texts": long, "truncate": False})
    assert status == 413 and error == {"error": message, "error_type": "Validation"}
    for path in ROUTES:
        status, error = error_of(server, path, {"query": QUERY, "documents": long, "truncate": False})
        assert status == 400 and error == {"message": message, "detail": message}
    with serving(reranker, "--long-input", "reject") as strict:
        assert strict.request("POST", "/predict", {"inputs": [long]})[0] == 413
        assert strict.request("POST", "/predict", {"inputs": [long], "truncate": True})[0] == 200


def test_tei_predict_with_labels(classifier_server, classifier):
    engine = unpadded.load(classifier, device="cpu")
    inputs = [["tide of bread"], ["what is", "a window"], [""], ["a " * 100]]
    pairs = [tuple(item) if len(item) == 2 else item[0] for item in inputs]
    for raw, activation in ((False, "softmax"), (True, "none")):
        expected = engine.score(pairs, activation=activation)
        found = classifier_server.post("/predict", {"inputs": inputs, "raw_scores": raw})
        for row, scores in zip(found, expected, strict=True):
            assert [one["label"] for one in row] == [LABELS[index] for index in np.argsort(-scores)]
            assert [one["score"] for one in row] == sorted(scores.tolist(), reverse=True)
    batch = classifier_server.post("/predict", {"inputs": inputs})
    assert classifier_server.post("/predict", {"inputs": inputs[0][0]}) == batch[0]
    assert classifier_server.post("/predict", {"inputs": inputs[0]}) == batch[0]
    assert classifier_server.post("/predict", {"inputs": inputs[1]}) == batch[1]
    assert abs(sum(one["score"] for one in batch[1]) - 1) < 1e-6


def test_tei_predict_with_a_reranker(server, engine):
    pairs = [(QUERY, document) for document in DOCUMENTS[:3]]
    for raw, activation in ((False, "sigmoid"), (True, "none")):
        found = server.post("/predict", {"inputs": pairs, "raw_scores": raw})
        expected = engine.score(pairs, activation=activation).tolist()
        assert found == [[{"score": score, "label": "LABEL_0"}] for score in expected]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["a", "b", "c"], "input 0 is not a text or a pair of texts: ['a', 'b', 'c']; send [text] or [text, text]"),
        ([["a"], ["a", "b", "c"]], "input 1 is not a text or a pair"),
        ([["a"], "b"], "input 1 is not a text or a pair of texts: 'b'"),
        ([["a"], "ab"], "input 1 is not a text or a pair of texts: 'ab'"),
        (["a", ["b"]], "input 0 is not a text or a pair"),
        ([["a"], []], "input 1 is not a text or a pair"),
        ([], "length >= 1"),
        ([[["a", "b"]]], "Expected `str`"),
        ([1], "Expected `str | array`"),
    ],
)
def test_invalid_inputs_of_predict(server, inputs, message):
    status, error = error_of(server, "/predict", {"inputs": inputs})
    assert status == 422 and message in error["error"] and error["error_type"] == "Validation"


def test_info_has_the_kind_of_the_model(server, classifier_server):
    info = json.loads(server.request("GET", "/info")[2])
    assert info["model_type"] == {"reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}}
    info = json.loads(classifier_server.request("GET", "/info")[2])
    assert info["model_type"]["classifier"]["id2label"] == dict(zip("012", LABELS, strict=True))
    assert info["model_type"]["classifier"]["label2id"] == {"negative": 0, "neutral": 1, "positive": 2}


@pytest.mark.parametrize("path", ROUTES)
def test_rerank_of_jina_cohere_and_voyage(server, engine, path):
    documents = [*DOCUMENTS[:10], *({"text": text, "id": index} for index, text in enumerate(DOCUMENTS[10:]))]
    request = {"model": "rerank-v3.5", "query": QUERY, "documents": documents}
    status, headers, content = server.request("POST", path, request, x_request_id="abc-1")
    answer, expected = json.loads(content), ranking(engine)
    assert status == 200 and [(one["index"], one["relevance_score"]) for one in answer["results"]] == expected
    assert all(one.keys() == {"index", "relevance_score"} for one in answer["results"])
    assert answer["id"] == "abc-1" and answer["model"] == "rerank-v3.5"
    assert answer["object"] == "list" and answer["data"] == answer["results"]
    tokens = int(headers["x-compute-tokens"])
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "truncated_texts": 0}
    assert answer["meta"] == {
        "api_version": {"version": path[2]},
        "tokens": {"input_tokens": tokens, "output_tokens": 0},
    }
    best = server.post(path, {"query": QUERY, "documents": documents, "top_n": 3, "return_documents": True})["results"]
    assert [(one["index"], one["relevance_score"]) for one in best] == expected[:3]
    whole = [{"text": item} if isinstance(item, str) else item for item in documents]
    assert [one["document"] for one in best] == [whole[one["index"]] for one in best]
    assert len(server.post(path, request | {"top_n": 100})["results"]) == len(documents)


@pytest.mark.parametrize("path", ROUTES)
def test_fields_that_change_nothing_are_accepted(server, path):
    request = {"query": QUERY, "documents": ["a", "b"]}
    expected = server.post(path, request)["results"]
    for field in (
        {"rank_fields": ["text"], "max_chunks_per_doc": 1, "max_tokens_per_doc": 4096},
        {"rank_fields": None, "max_chunks_per_doc": None, "max_tokens_per_doc": None, "top_n": None},
        {"priority": 3, "return_embeddings": False, "user": "someone", "truncation": True},
    ):
        assert server.post(path, request | field)["results"] == expected


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"rank_fields": ["title", "text"]}, 400, "$.rank_fields[0]"),
        ({"max_chunks_per_doc": 10}, 400, "$.max_chunks_per_doc"),
        ({"max_tokens_per_doc": 47}, 400, "max_tokens_per_doc is not supported below 48: 47; omit it"),
        ({"return_embeddings": True}, 400, "return_embeddings"),
        ({"task": "search_query"}, 400, "unknown field `task`"),
        ({"truncate": "START"}, 400, "truncation_direction"),
        ({"top_n": 0}, 400, "$.top_n"),
        ({"documents": []}, 400, "$.documents"),
        ({"documents": ["a", {"image": "url"}]}, 400, "document 1 has no text: {'image': 'url'}"),
        ({"documents": [{"text": 5}]}, 400, "document 0 has no text: {'text': 5}"),
        ({"documents": [5]}, 400, "$.documents"),
        ({"query": None}, 400, "$.query"),
        ({"documents": ["a"] * 65}, 400, "too many texts: 65, maximum 64 texts; send fewer"),
        ({"query": "a" * 20_000, "documents": ["b"] * 10}, 413, "the pairs are too long: 200010, maximum 200000"),
        ({"model": "other"}, 404, "the model is not served: 'other'; use reranker or rerank-v3.5"),
    ],
)
def test_errors_of_jina_and_cohere(server, fields, status, message):
    for path in ROUTES:
        found, error = error_of(server, path, {"query": QUERY, "documents": ["a"], **fields})
        assert found == status and message in error["message"] and error["detail"] == error["message"], error
        assert error.keys() == {"message", "detail"}


def test_errors_of_tei(server):
    for fields, status, message in [
        ({"truncation_direction": "left"}, 422, "$.truncation_direction"),
        ({"top_n": 3}, 422, "unknown field `top_n`"),
        ({"texts": []}, 422, "$.texts"),
        ({"texts": ["a"] * 65}, 413, "too many texts: 65"),
        ({"query": "a" * 20_000, "texts": ["b"] * 10}, 413, "the pairs are too long"),
        ({"model": "other"}, 404, "the model is not served: 'other'"),
    ]:
        found, error = error_of(server, "/rerank", {"query": QUERY, "texts": ["a"], **fields})
        assert found == status and message in error["error"] and error["error_type"] == "Validation", error
    for path in ROUTES:
        status, _, content = server.request("GET", path)
        assert status == 405 and json.loads(content)["detail"].startswith(f"there is no endpoint GET {path}")
        status, _, content = server.request("POST", path, b"{")
        assert status == 400 and "not JSON" in json.loads(content)["message"]


def test_a_task_is_rejected(tmp_path):
    folder = write_bert_reranker(tmp_path / "reranker", prompts={"query": "query: ", "document": ""})
    with serving(folder) as server:
        request = {"query": "a", "documents": ["b"], "model": "reranker:query"}
        status, error = error_of(server, "/v1/rerank", request)
        assert status == 400 and error["message"] == "scores have no task: 'reranker:query'; use reranker"


def test_a_model_without_scores(embedder_server, classifier_server):
    message = f"{MINILM_NAME} has no head for scores; serve a reranker"
    for path, body in (("/rerank", {"query": "a", "texts": ["b"]}), ("/predict", {"inputs": "a"})):
        status, error = error_of(embedder_server, path, body)
        assert status == 424 and message in error["error"] and error["error_type"] == "Backend"
    for path in ROUTES:
        status, error = error_of(embedder_server, path, {"query": "a", "documents": ["b"]})
        assert status == 400 and message in error["message"]
        status, error = error_of(classifier_server, path, {"query": "a", "documents": ["b"]})
        assert status == 400 and error["message"] == "the model gives 3 scores per pair, not one; use /predict"
    status, error = error_of(classifier_server, "/rerank", {"query": "a", "texts": ["b"]})
    assert status == 424 and "3 scores per pair" in error["error"]


def test_cohere_client(server, engine, cohere, connection):
    client = cohere.Client(base_url=server.url, **connection)
    documents = [*DOCUMENTS[:10], *({"text": text, "title": "t"} for text in DOCUMENTS[10:])]
    found = client.rerank(model="rerank-v3.5", query=QUERY, documents=documents, top_n=5, return_documents=True)
    assert [(one.index, one.relevance_score) for one in found.results] == ranking(engine)[:5]
    assert [one.document.text for one in found.results] == [DOCUMENTS[one.index] for one in found.results]
    assert found.meta.api_version.version == "1" and found.meta.tokens.input_tokens > 0 and found.id
    found = cohere.ClientV2(base_url=server.url, **connection).rerank(
        model="rerank-v3.5", query=QUERY, documents=DOCUMENTS, max_tokens_per_doc=4096, priority=1
    )
    assert [(one.index, one.relevance_score) for one in found.results] == ranking(engine)
    assert found.meta.api_version.version == "2"


def test_cohere_client_raises_its_own_errors(server, cohere, connection):
    client = cohere.ClientV2(base_url=server.url, **connection)
    with pytest.raises(cohere.BadRequestError, match=r"max_tokens_per_doc is not supported below 48: 5; omit it"):
        client.rerank(model="rerank-v3.5", query="a", documents=["b"], max_tokens_per_doc=5)
    with pytest.raises(cohere.NotFoundError, match=r"'rerank-v4'; use reranker or rerank-v3\.5"):
        client.rerank(model="rerank-v4", query="a", documents=["b"])
    with pytest.raises(cohere.BadRequestError, match=r"rank_fields\[0\]"):
        cohere.Client(base_url=server.url, **connection).rerank(query="a", documents=["b"], rank_fields=["title"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by the client
def test_voyage_client(server, engine):
    client = pytest.importorskip("voyageai").Client(api_key="none", base_url=f"{server.url}/v1")
    for top_k in (None, 5):
        found = client.rerank(QUERY, DOCUMENTS, "rerank-v3.5", top_k=top_k)
        assert [(one.index, one.relevance_score) for one in found.results] == ranking(engine)[:top_k]
        assert found.total_tokens > 0 and found.results[0].document == DOCUMENTS[found.results[0].index]


def test_huggingface_client_classifies(classifier_server, classifier, monkeypatch):
    """It expects a batch of one and returns its first item; of TEI's single answer this is the best label."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    client = huggingface_hub.InferenceClient(timeout=600)
    best = client.text_classification("what is a tide", model=f"{classifier_server.url}/predict")
    scores = unpadded.load(classifier, device="cpu").score(["what is a tide"], activation="softmax")[0]
    assert best.label == LABELS[scores.argmax()] and best.score == scores.max().item()


def test_concurrent_requests_for_scores_and_vectors_get_their_own(server, engine):
    """Their batches are separate, and requests of one kind share batches."""
    calls = []
    for seed, size in enumerate([1, 2, 5, 17, 40] * 8):
        texts = draw_texts(size, seed, longest=60)
        calls.append(("/embed", {"inputs": texts}, engine.encode(texts, normalize=True).tolist()))
        expected = [{"index": index, "score": score} for index, score in ranking(engine, texts[0], texts)]
        calls.append(("/rerank", {"query": texts[0], "texts": texts}, expected))
        scores = engine.score(texts, activation="none").tolist()
        inputs = {"inputs": [[text] for text in texts], "raw_scores": True}
        calls.append(("/predict", inputs, [[{"score": score, "label": "LABEL_0"}] for score in scores]))
    before = server.metric("unpadded_batch_texts_count")
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda call: server.post(*call[:2]), calls))
    for (path, _, expected), answer in zip(calls, answers, strict=True):
        found = np.array(answer, np.float32).tolist() if path == "/embed" else answer
        assert found == expected
    assert server.metric("unpadded_batch_texts_count") - before < len(calls)


def test_metrics_and_log_count_pairs(server):
    before = {name: server.metric(f"unpadded_{name}_total") for name in ("texts", "tokens", "truncated_texts")}
    documents = ["zebra crossing", "w " * 60, "of"]
    _, headers, _ = server.request("POST", "/v2/rerank", {"query": "a", "documents": documents}, x_request_id="abc-2")
    counts = {"texts": 3, "tokens": int(headers["x-compute-tokens"]), "truncated_texts": 1}
    assert counts == {name: server.metric(f"unpadded_{name}_total") - value for name, value in before.items()}
    assert "zebra" not in "".join(server.stderr)


def test_api_keys_and_the_deadline(reranker):
    documents = ["tide of bread"] * 2 + DOCUMENTS
    flags = "--api-key key --deadline 0.001"
    with serving(reranker, *flags.split()) as server:
        for path in ROUTES:
            request = {"query": QUERY, "documents": documents}
            status, headers, content = server.request("POST", path, request)
            assert (
                status == 401
                and headers["www-authenticate"] == "Bearer"
                and "API key" in json.loads(content)["message"]
            )
            status, _, content = server.request("POST", path, request, authorization="Bearer key")
            assert status == 504 and "deadline passed" in json.loads(content)["detail"]


def test_a_full_queue_answers_429(reranker):
    with serving(reranker, "--max-queued-tokens", "300") as server, ThreadPoolExecutor(16) as pool:
        request = {"query": QUERY, "documents": DOCUMENTS}
        found = list(pool.map(lambda _: server.request("POST", "/v1/rerank", request), range(64)))
        assert {200, 429} == {status for status, _, _ in found}
        assert all(
            headers["retry-after"] and "queue is full" in json.loads(body)["message"]
            for status, headers, body in found
            if status == 429
        )


def test_warm_up_runs_pairs_of_a_reranker(reranker):
    service = Service([unpadded.load(reranker, device="cpu", token_budget=64)], ServerOptions())
    heads, launch = set(), service.backends[0].launch

    def record(sequences, options, **rest):
        heads.add((options.head, min(ids.min() for ids in sequences) < 0))
        return launch(sequences, options, **rest)

    service.backends[0].launch = record
    service.warm_up()
    service.batcher.close()
    assert heads == {("score", True)}
