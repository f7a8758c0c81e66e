"""Several models in one server: each request gets its model's exact results, the device runs one batch at a time."""

import asyncio
import base64
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from support.checkpoints import add_sentence_transformers_files, write_bert, write_bert_reranker, write_nomic
from support.corpus import PARAGRAPHS
from support.serving import serving, wait_until

import unpadded
from unpadded.errors import OutputError, OverloadedError
from unpadded.execution.batcher import Work
from unpadded.server.errors import HTTPError
from unpadded.server.metrics import Usage
from unpadded.server.options import ServerOptions
from unpadded.server.service import Service

SMALL = {"layers": 2, "hidden": 64, "heads": 2, "intermediate": 256}
PROMPTS = {"search_query": "search_query: ", "search_document": "search_document: "}
TEXTS = [text[:150] for text in PARAGRAPHS[:80]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An embedder and a reranker whose vectors have the same length, so that they could share a batch by mistake."""
    root = tmp_path_factory.mktemp("served")
    embedder = add_sentence_transformers_files(write_nomic(root / "embedder", **SMALL), prompts=PROMPTS)
    return [embedder, write_bert_reranker(root / "reranker", **SMALL)]


@pytest.fixture(scope="module")
def engines(folders):
    return [unpadded.load(folder, device="cpu") for folder in folders]


@pytest.fixture
def serve(folders):
    """Return a function that makes a service of both models, each loaded anew with its own options."""
    services = []

    def make(*options, **server_options):
        loaded = [unpadded.load(folder, device="cpu", **one) for folder, one in zip(folders, options, strict=True)]
        services.append(Service(loaded, ServerOptions(**server_options)))
        return services[-1]

    yield make
    for service in services:
        service.batcher.close()


@pytest.fixture(scope="module")
def server(folders):
    with serving(folders, "--alias", "default", "--default-task", "search_document", "--max-inputs", "64") as server:
        yield server


def floats(rows):
    return [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in rows["data"]]


def test_concurrent_clients_of_both_models_get_exactly_their_own(server, engines):
    """Also between requests that are invalid, for an unknown model, or for what a model does not have."""
    embedder, reranker = engines
    calls = []
    for start, size in enumerate([1, 2, 7, 20, 3, 40] * 5):
        texts = TEXTS[start : start + size]
        body = {"input": texts, "encoding_format": "base64"}
        for model in engines:
            task = {"task": "search_query"} if model is embedder else {}
            expected = model.encode(texts, **task)
            calls.append(("/v1/embeddings", body | task | {"model": model.checkpoint.name}, 200, floats, expected))
        expected = [(one.index, one.score) for one in reranker.rank(texts[0], texts, activation="sigmoid")]

        def ranking(answer):
            return [(one["index"], one["relevance_score"]) for one in answer["results"]]

        request = {"query": texts[0], "documents": texts}
        calls.append(("/v2/rerank", request | {"model": "reranker"}, 200, ranking, expected))
        calls.append(("/v1/rerank", request, 200, ranking, expected))
        expected = [[{"score": score, "label": "LABEL_0"}] for score in reranker.score(texts).tolist()]
        calls.append(("/predict", {"inputs": [[text] for text in texts]}, 200, list, expected))
        for model in engines:  # with equal options, of which a batch would have the texts of both models
            fields = {"inputs": texts, "model": model.checkpoint.name}
            task = "search_document" if model is embedder else None
            calls.append(("/embed", fields, 200, np.float32, model.encode(texts, task=task, normalize=True)))
        calls.append(("/v1/rerank", request | {"model": "embedder"}, 400, None, None))
        calls.append(("/v1/embeddings", body | {"model": "other"}, 404, None, None))
        calls.append(("/v1/embeddings", {"input": [[30_000_000]], "model": "reranker"}, 400, None, None))
    before = server.metric("unpadded_batch_texts_count")
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda call: server.request("POST", *call[:2]), calls))
    for (path, _, status, read, expected), (found, _, body) in zip(calls, answers, strict=True):
        assert found == status, (path, body)
        if status == 200:
            assert np.array_equal(read(json.loads(body)), expected), path
    good = sum(call[2] == 200 for call in calls)
    assert server.metric("unpadded_batch_texts_count") - before < good  # requests of one model share batches
    assert server.metric("unpadded_queued_tokens") == 0


def test_a_request_is_for_the_model_that_it_names_or_the_first_that_suits(engines):
    for ordered in (engines, engines[::-1]):
        service = Service(ordered, ServerOptions(alias=("default",)))
        found = {
            (name, scores): service.find(name, head=("score" if scores else "vector")).name
            for name in (None, "default", "embedder", "reranker", "embedder:search_query", "default:search_query")
            for scores in (False, True)
        }
        service.batcher.close()
        for (name, scores), model in found.items():
            named = (name or "").partition(":")[0]
            assert model == (named if named.endswith("er") else ("reranker" if scores else "embedder")), (name, scores)
        names = [engine.checkpoint.name for engine in ordered]
        assert service.names == (names[0], "default", names[1])
        for name in ("", "other", "other:search_query", "Embedder"):
            with pytest.raises(HTTPError, match=r"the model is not served: .*; use (em|re).*(em|re)") as raised:
                service.find(name)
            assert raised.value.kind == "unknown_model"


def test_requests_name_a_model_in_every_api(server, engines):
    for engine, task in zip(engines, ("search_query", None), strict=True):
        name, prompt = engine.checkpoint.name, {"prompt_name": task}
        expected = engine.encode(TEXTS[:2], task=task, normalize=True)
        for path, fields in [
            ("/embed", {"inputs": TEXTS[:2], "model": name, **prompt}),
            ("/", {"inputs": TEXTS[:2], "model": name, "parameters": prompt}),
            ("/", {"inputs": TEXTS[:2], "parameters": {**prompt, "model": name}}),
        ]:
            assert np.array_equal(np.float32(server.post(path, fields)), expected), (name, path)
        rows = server.post("/embed_all", {"inputs": TEXTS[0], "model": name, **prompt})[0]
        assert np.array_equal(np.float32(rows), engine.token_embeddings(TEXTS[0], task=task)[0])
        inputs = {"source_sentence": TEXTS[0], "sentences": TEXTS[1:2]}
        found = server.post("/similarity", {"inputs": inputs, "model": name, "parameters": prompt})
        assert np.float32(found[0]) == expected[1] @ expected[0]
    for path in ("/embed", "/v1/embeddings", "/v1/rerank", "/v2/embed"):
        status, _, body = server.request("POST", path, {"model": "other"})
        assert status == 404 and b"'other'; use embedder or default or reranker" in body, (path, body)
    status, _, body = server.request("POST", "/rerank", {"query": "a", "texts": ["b"], "model": "embedder"})
    assert status == 424 and b"embedder has no head for scores; serve a reranker" in body


def test_the_server_shows_all_models(server, engines):
    names = [model["id"] for model in json.loads(server.request("GET", "/v1/models")[2])["data"]]
    assert names == ["embedder", "default", "reranker"]
    statuses = dict.fromkeys([*names, "embedder:search_query"], 200) | {"embedder:poem": 400, "x": 404}
    for name, status in statuses.items():
        assert server.request("GET", f"/v1/models/{name}")[0] == status, name
    info = json.loads(server.request("GET", "/info")[2])
    assert info["model_id"] == "embedder" and [one["model_id"] for one in info["models"]] == ["embedder", "reranker"]
    assert [one["names"] for one in info["models"]] == [["embedder", "default"], ["reranker", "default"]]
    for one, engine in zip(info["models"], engines, strict=True):
        assert one["max_input_length"] == engine.checkpoint.max_length and one["dimensions"] == 64
    assert [[*one["model_type"]] for one in info["models"]] == [["embedding"], ["reranker"]]
    assert server.request("GET", "/health")[0] == 200
    [ready] = [line for line in server.log if line["message"] == "ready"]
    assert ready["models"] == names
    loading = [line["model"] for line in server.log if line["message"] == "loading the model"]
    assert [name.rpartition("/")[2] for name in loading] == ["embedder", "reranker"]

    def count(model):
        return server.metric(f'unpadded_texts_total{{model="{model}"}}')

    before = {model: count(model) for model in ("embedder", "reranker")}
    server.request("POST", "/v1/rerank", {"query": "a", "documents": ["b", "c", "d"]}, x_request_id="of-two-models")
    server.post("/embed", {"inputs": ["a", "b"]})
    assert {model: count(model) - before[model] for model in before} == {"embedder": 2, "reranker": 3}
    wait_until(lambda: any(line.get("id") == "of-two-models" for line in server.log))
    assert next(line for line in server.log if line.get("id") == "of-two-models")["model"] == "reranker"


def test_one_batch_runs_at_a_time_within_the_smallest_budget(serve):
    service = serve({"token_budget": 200}, {"token_budget": 500})
    assert service.batcher.token_budget == 200
    running, sizes = threading.Semaphore(1), {}

    def record(model, launch):
        def run(sequences, *args, **options):
            assert running.acquire(blocking=False), "two batches at once"
            sizes.setdefault(model.name, []).append(sum(map(len, sequences)))
            wait = launch(sequences, *args, **options)
            running.release()
            return wait

        return run

    for model in service.models:
        backend = model.pipeline.backend
        backend.launch = record(model, backend.launch)

    async def flood():
        embedder, reranker = service.models
        pairs = [[(TEXTS[0], text) for text in TEXTS[start : start + 9]] for start in range(0, 60, 9)]
        await asyncio.gather(
            *(embedder.embed(TEXTS[start : start + 9], Usage()) for start in range(0, 60, 9)),
            *(reranker.score(some, Usage()) for some in pairs),
            *(reranker.embed_tokens(some, Usage()) for some in (TEXTS[:5], TEXTS[5:9])),
        )

    asyncio.run(flood())
    assert sizes.keys() == {"embedder", "reranker"} and max(map(max, sizes.values())) <= 200
    assert {len(found) > 5 for found in sizes.values()} == {True}


def test_models_take_turns_and_share_the_limit_of_the_queue(serve):
    """Large requests of one model hold up neither a query nor large requests of the other."""
    service = serve({"token_budget": 100}, {"token_budget": 100}, max_queued_tokens=4000)
    entered, opened, batches = threading.Event(), threading.Event(), []

    def submit(model, lengths):
        def run(sequences):
            entered.set()
            assert opened.wait(60)
            batches.append((model, sorted(map(len, sequences))))
            return np.zeros((len(sequences), 1))

        return service.batcher.submit([np.zeros(length, np.int32) for length in lengths], Work((model, "a"), run))

    first, second = service.models
    calls = [submit(first, [90])]
    assert entered.wait(60)
    calls += [submit(first, [80] * 8), submit(second, [70] * 8), submit(second, [5]), submit(first, [6])]
    with pytest.raises(OverloadedError, match=r"1211 tokens wait, .* more exceed the limit of 4000"):
        asyncio.run(second.score([("a", f"{index} " * 300) for index in range(20)], Usage()))
    opened.set()
    for call in calls:
        call.future.result()
    assert batches[:3] == [(first, [90]), (second, [5, 70]), (first, [6, 80])]
    assert [model for model, _ in batches[1:]] == [second, first] * 8


@pytest.mark.parametrize("broken", [0, 1])
def test_a_failure_of_one_model_does_not_disturb_the_other(serve, engines, broken):
    service = serve({}, {})
    backend = service.models[broken].pipeline.backend
    launch, marker = backend.launch, "zebra crossing " * 9

    def fail(sequences, *args, **options):
        if max(map(len, sequences)) in lengths:
            raise RuntimeError("a kernel failed")
        return launch(sequences, *args, **options)

    lengths = set(engines[broken].embed([marker]).token_counts)
    backend.launch = fail
    short = [text[:20] for text in TEXTS]

    async def embed_all():
        calls = [model.embed(short[at : at + 3], Usage()) for at in range(0, 60, 3) for model in service.models]
        failing = [service.models[broken].embed([marker], Usage()) for _ in range(3)]
        return await asyncio.gather(*calls, *failing, return_exceptions=True)

    found = asyncio.run(embed_all())
    for at, results in zip(range(0, 60, 3), zip(found[:40:2], found[1:40:2], strict=True), strict=True):
        for engine, result in zip(engines, results, strict=True):
            assert np.array_equal(result.vectors, engine.encode(short[at : at + 3])), (at, engine)
    assert [type(one) for one in found[40:]] == [OutputError] * 3


def test_the_default_task_is_for_the_models_that_have_it(engines, folders):
    service = Service(engines, ServerOptions(default_task="search_query"))

    async def embed():
        return [(await model.embed(TEXTS[:2], Usage())).vectors for model in service.models]

    found = asyncio.run(embed())
    service.batcher.close()
    assert np.array_equal(found[0], engines[0].encode(TEXTS[:2], task="search_query"))
    assert np.array_equal(found[1], engines[1].encode(TEXTS[:2]))
    with pytest.raises(unpadded.OptionError, match=r"task is unknown: 'poem'; embedder has search_query"):
        Service(engines, ServerOptions(default_task="poem"))


def test_what_cannot_be_served_together_is_an_error(engines, monkeypatch):
    with pytest.raises(unpadded.OptionError, match="two models have the same name: embedder; rename or omit one"):
        Service([engines[0], engines[0]], ServerOptions())
    pool = SimpleNamespace(describe=lambda: {"device": "cuda:0,cuda:1"}, devices=2, depth=3)
    monkeypatch.setattr(engines[0]._pipeline, "backend", pool)
    with pytest.raises(unpadded.OptionError, match="several models need one device: cuda:0,cuda:1; pass one"):
        Service(engines, ServerOptions())


def test_models_on_a_gpu_share_a_stream_and_get_their_own_results(cuda, tmp_path):
    small = {"layers": 1, "hidden": 64, "intermediate": 64, "heads": 4}
    folders = [write_bert(tmp_path / "bert", seed=1, **small), write_bert_reranker(tmp_path / "reranker", **small)]
    engines = [unpadded.load(folder, device=cuda, dtype="float32", token_budget=16) for folder in folders]
    service, texts = Service(engines, ServerOptions()), ["tide", "bread"]
    first, second = [engine._pipeline.runner.encoder for engine in engines]
    assert first.stream is second.stream is not None and first.lock is second.lock

    async def embed():
        return await asyncio.gather(*(model.embed([text], Usage()) for text in texts for model in service.models))

    found = np.concatenate([one.vectors for one in asyncio.run(embed())])
    service.batcher.close()
    expected = [unpadded.load(folder, device="cpu").encode(text) for text in texts for folder in folders]
    np.testing.assert_allclose(found, expected, atol=1e-5)
