"""LangChain's and LlamaIndex's classes for the APIs of Cohere, Jina, TEI and Voyage, with the address of the server."""

import asyncio
import gc

import numpy as np
import pytest
from support.checkpoints import add_sentence_transformers_files, write_bert_reranker, write_nomic
from support.corpus import PARAGRAPHS
from support.serving import encode_chunks, serving

import unpadded

MODEL = "embed-v4.0"  # LlamaIndex's class for Cohere accepts only the names of Cohere's models
TEXTS = [text[:80] for text in PARAGRAPHS[:25]]  # LlamaIndex sends ten per request
QUERY = "what is a tide"
TASKS = ("search_document", "search_query")

# The packages warn about their own future, and some classes have no method that closes their connections.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]


@pytest.fixture(autouse=True)
def closed_connections():
    yield
    gc.collect()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    prompts = {task: f"{task}: " for task in TASKS}
    embedder = write_nomic(folder / "embedder", hidden=64)
    add_sentence_transformers_files(embedder, normalize=True, max_seq_length=64, prompts=prompts)
    return [embedder, write_bert_reranker(folder / "reranker", positions=128)]


@pytest.fixture(scope="module")
def server(folders):
    with serving(folders, "--alias", MODEL) as server:
        yield server


@pytest.fixture(scope="module")
def engine(folders):
    return unpadded.load(folders[0], device="cpu")


@pytest.fixture(scope="module")
def ranking(folders):
    ranked = unpadded.load(folders[1], device="cpu").rank(QUERY, TEXTS, top_k=7, activation="sigmoid")
    return [(TEXTS[one.index], one.score) for one in ranked]


def package(name):
    return pytest.importorskip(name, exc_type=ImportError)


def langchain_cohere(url, monkeypatch):
    return package("langchain_cohere").CohereEmbeddings(model=MODEL, cohere_api_key="-", base_url=url)


def langchain_jina(url, monkeypatch):
    module = package("langchain_community.embeddings.jina")
    monkeypatch.setattr(module, "JINA_API_URL", f"{url}/v1/embeddings")  # the class has no argument for it
    return module.JinaEmbeddings(model_name=MODEL, jina_api_key="-")


def langchain_voyage(url, monkeypatch):
    module = package("langchain_voyageai")
    monkeypatch.setattr("voyageai.Client.tokenize", lambda self, texts, model: texts)  # downloads Voyage's tokenizer
    return module.VoyageAIEmbeddings(model=MODEL, api_key="-", base_url=f"{url}/v1")


def llama_index_cohere(url, monkeypatch):
    return package("llama_index.embeddings.cohere").CohereEmbedding(model_name=MODEL, api_key="-", base_url=url)


def llama_index_jina(url, monkeypatch, **options):
    embedding = package("llama_index.embeddings.jinaai").JinaEmbedding(model=MODEL, api_key="-", **options)
    embedding._api.api_url = f"{url}/v1/embeddings"  # the class has no argument for it
    return embedding


def llama_index_tei(url, monkeypatch):
    module = package("llama_index.embeddings.text_embeddings_inference")
    document, query = (f"{task}:" for task in TASKS)
    return module.TextEmbeddingsInference(
        model_name="embedder", base_url=url, text_instruction=document, query_instruction=query
    )


def llama_index_voyage(url, monkeypatch):
    module = package("llama_index.embeddings.voyageai")
    monkeypatch.setattr("voyageai.Client.tokenize", lambda self, texts, model: texts)
    embedding = module.VoyageEmbedding(model_name=MODEL, voyage_api_key="-")
    for client in (embedding._client, embedding._aclient):
        client._params["base_url"] = f"{url}/v1"  # the class has no argument for it
    return embedding


def methods_of(client, prefix=""):
    """Return a client's methods for documents and for a query; those with the prefix "a" are coroutines."""
    names = ("get_text_embedding_batch", "get_query_embedding")
    if hasattr(client, "embed_documents"):
        names = ("embed_documents", "embed_query")
    return [getattr(client, prefix + name) for name in names]


@pytest.mark.parametrize(
    ("make", "tasks"),
    [
        (langchain_cohere, TASKS),
        (langchain_jina, (None, None)),
        (langchain_voyage, TASKS),
        (llama_index_cohere, TASKS),
        (llama_index_jina, (None, None)),
        (llama_index_tei, TASKS),
        (llama_index_voyage, TASKS),
    ],
)
def test_embeddings_of_documents_and_a_query(server, engine, monkeypatch, make, tasks):
    client = make(server.url, monkeypatch)
    expected = [engine.encode(given, task=task) for given, task in zip((TEXTS, QUERY), tasks, strict=True)]

    async def embed():
        documents, query = methods_of(client, "a")
        return [await documents(TEXTS), await query(QUERY)]

    documents, query = methods_of(client)
    for found in ([documents(TEXTS), query(QUERY)], asyncio.run(embed())):
        assert all(map(np.array_equal, map(np.float32, found), expected))


def test_options_of_jina_in_llama_index(server, engine, monkeypatch):
    def embed(texts, **options):
        return llama_index_jina(server.url, monkeypatch, **options).get_text_embedding_batch(texts)

    expected = engine.encode(TEXTS, task="search_query", dimensions=16)
    assert np.array_equal(np.float32(embed(TEXTS, task="retrieval.query", dimensions=16)), expected)
    for kind in ("binary", "ubinary"):  # of which the class returns the bits
        assert np.array_equal(embed(TEXTS, encoding_documents=kind), engine.encode(TEXTS) > 0), kind
    chunks = TEXTS[:5]
    assert np.array_equal(np.float32(embed(chunks, late_chunking=True)), encode_chunks(engine, [chunks]))


@pytest.mark.parametrize("make", [langchain_jina, llama_index_jina])
def test_classes_for_jina_raise_the_message_of_an_error(server, monkeypatch, make):
    client = make(server.url, monkeypatch)
    with pytest.raises(RuntimeError, match="a text is too long: 524289, maximum 524288 characters; split it"):
        methods_of(client)[1]("a" * 524_289)


def langchain_cohere_rerank(url, monkeypatch):
    return package("langchain_cohere").CohereRerank(model=MODEL, cohere_api_key="-", base_url=url, top_n=7)


def langchain_jina_rerank(url, monkeypatch):
    module = package("langchain_community.document_compressors.jina_rerank")
    monkeypatch.setattr(module, "JINA_API_URL", f"{url}/v1/rerank")  # the class has no argument for it
    return module.JinaRerank(model=MODEL, jina_api_key="-", top_n=7)


def langchain_voyage_rerank(url, monkeypatch):
    return package("langchain_voyageai").VoyageAIRerank(model=MODEL, api_key="-", base_url=f"{url}/v1", top_k=7)


def llama_index_cohere_rerank(url, monkeypatch):
    module = package("llama_index.postprocessor.cohere_rerank")
    return module.CohereRerank(model=MODEL, api_key="-", base_url=url, top_n=7)


def llama_index_jina_rerank(url, monkeypatch):
    module = package("llama_index.postprocessor.jinaai_rerank")
    return module.JinaRerank(model=MODEL, api_key="-", base_url=f"{url}/v1", top_n=7)


def llama_index_tei_rerank(url, monkeypatch):
    return package("llama_index.postprocessor.tei_rerank").TextEmbeddingInference(base_url=url, top_n=7)


@pytest.mark.parametrize("make", [langchain_cohere_rerank, langchain_jina_rerank, langchain_voyage_rerank])
def test_rerankers_of_langchain(server, ranking, monkeypatch, make):
    client = make(server.url, monkeypatch)
    documents = [package("langchain_core.documents").Document(text) for text in TEXTS]
    for found in (
        client.compress_documents(documents, QUERY),
        asyncio.run(client.acompress_documents(documents, QUERY)),
    ):
        assert [(one.page_content, one.metadata["relevance_score"]) for one in found] == ranking


@pytest.mark.parametrize("make", [llama_index_cohere_rerank, llama_index_jina_rerank, llama_index_tei_rerank])
def test_rerankers_of_llama_index(server, ranking, monkeypatch, make):
    client, schema = make(server.url, monkeypatch), package("llama_index.core.schema")
    nodes = [schema.NodeWithScore(node=schema.TextNode(text=text), score=0.5) for text in TEXTS]
    assert [(one.text, one.score) for one in client.postprocess_nodes(nodes, query_str=QUERY)] == ranking
