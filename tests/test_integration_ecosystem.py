"""LangChain and mteb: their real packages, with mteb's tasks on local data."""

import asyncio

import langchain_huggingface
import mteb
import numpy as np
import pytest
import sentence_transformers
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from mteb.mocks.mock_tasks.reranking import MockRerankingTask
from mteb.mocks.mock_tasks.retrieval import MockRetrievalTask
from mteb.mocks.mock_tasks.sts import MockSTSTask
from mteb.models import CrossEncoderProtocol, CrossEncoderWrapper, EncoderProtocol
from mteb.types import PromptType
from support.checkpoints import MINILM, add_sentence_transformers_files, write_nomic

import unpadded
from unpadded.integrations.langchain import UnpaddedCrossEncoder, UnpaddedEmbeddings, UnpaddedReranker
from unpadded.integrations.mteb import UnpaddedCrossEncoder as MtebCrossEncoder
from unpadded.integrations.mteb import UnpaddedEncoder
from unpadded.integrations.sentence_transformers import CrossEncoder, SentenceTransformer

TEXTS = ["The weather is lovely today.", "He drove to the stadium.\nTwice.", "It's so sunny outside!"]


@pytest.fixture(scope="module")
def nomic(tmp_path_factory):
    return unpadded.load(write_nomic(tmp_path_factory.mktemp("nomic")), device="cpu")


def test_langchain_embeddings_equal_the_engine(minilm_engine, nomic):
    embeddings = UnpaddedEmbeddings(nomic)
    assert isinstance(embeddings, Embeddings)
    documents, query = embeddings.embed_documents(TEXTS), embeddings.embed_query(TEXTS[0])
    assert documents == nomic.encode(TEXTS, task="search_document").tolist()
    assert query == nomic.encode(TEXTS[0], task="search_query").tolist()
    assert asyncio.run(embeddings.aembed_documents(TEXTS)) == documents
    assert asyncio.run(embeddings.aembed_query(TEXTS[0])) == query
    assert UnpaddedEmbeddings(nomic, query={"prompt": ""}).embed_query("") == nomic.encode("", prompt="").tolist()
    store = InMemoryVectorStore.from_texts(TEXTS, UnpaddedEmbeddings(minilm_engine))
    assert [found.page_content for found in store.similarity_search("sun", k=2)] == [TEXTS[2], TEXTS[0]]


def test_langchain_hugging_face_embeddings_run_on_the_drop_in(monkeypatch):
    arguments = {"model_name": str(MINILM), "encode_kwargs": {"normalize_embeddings": True}}
    original = langchain_huggingface.HuggingFaceEmbeddings(**arguments)
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", SentenceTransformer)
    patched = langchain_huggingface.HuggingFaceEmbeddings(**arguments)
    assert isinstance(patched._client, SentenceTransformer) and not isinstance(original._client, SentenceTransformer)
    assert np.abs(np.array(patched.embed_documents(TEXTS)) - original.embed_documents(TEXTS)).max() <= 1e-5
    assert np.abs(np.array(patched.embed_query(TEXTS[1])) - original.embed_query(TEXTS[1])).max() <= 1e-5


@pytest.mark.filterwarnings("default")
def test_mteb_scores_equal_those_of_sentence_transformers(minilm_engine):
    """On a similarity task and a retrieval task."""
    original, *others = (
        [
            result.scores["test"][0]["main_score"]
            for result in mteb.evaluate(model, [MockSTSTask(), MockRetrievalTask()], cache=None).task_results
        ]
        for model in (
            sentence_transformers.SentenceTransformer(str(MINILM), device="cpu"),
            SentenceTransformer(str(MINILM), device="cpu"),
            UnpaddedEncoder(minilm_engine),
        )
    )
    for scores in others:
        assert scores == pytest.approx(original, abs=1e-5)


def test_the_mteb_encoder_uses_the_prompt_of_the_task(nomic, tmp_path):
    def encode(encoder, task, prompt_type=None):
        batches = [{"text": TEXTS[:2]}, {"text": TEXTS[2:]}]
        return encoder.encode(
            batches, task_metadata=task.metadata, hf_split="test", hf_subset="", prompt_type=prompt_type
        )

    encoder = UnpaddedEncoder(nomic)
    assert isinstance(encoder, EncoderProtocol)
    for task, prompt_type, expected in [
        (MockRetrievalTask, PromptType.query, "search_query"),
        (MockRetrievalTask, PromptType.document, "search_document"),
        (MockSTSTask, None, "classification"),
    ]:
        assert np.array_equal(encode(encoder, task, prompt_type), nomic.encode(TEXTS, task=expected))
    named = UnpaddedEncoder(nomic, prompts={"MockSTSTask": "clustering: "})
    assert np.array_equal(encode(named, MockSTSTask), nomic.encode(TEXTS, task="clustering"))
    folder = add_sentence_transformers_files(write_nomic(tmp_path), prompts={"query": "q: "})
    other = unpadded.load(folder, device="cpu")
    assert np.array_equal(
        encode(UnpaddedEncoder(other), MockRetrievalTask, PromptType.query), other.encode(TEXTS, task="query")
    )


@pytest.fixture(scope="module")
def reranker(rerankers):
    return unpadded.load(rerankers["bert"], device="cpu")


def test_langchain_rerankers_equal_sentence_transformers(reranker, rerankers):
    original = sentence_transformers.CrossEncoder(str(rerankers["bert"]), device="cpu")
    pairs = [("sun", text) for text in TEXTS]
    encoder = UnpaddedCrossEncoder(reranker)
    assert isinstance(encoder, BaseCrossEncoder)
    assert encoder.score(pairs) == pytest.approx(original.predict(pairs).tolist(), abs=1e-6)

    documents = [Document(text, metadata={"place": place}) for place, text in enumerate(TEXTS)]
    expected = original.rank("sun", TEXTS, return_documents=True)
    for top_n in (None, 2):
        compressor = UnpaddedReranker(engine=reranker, top_n=top_n)
        assert isinstance(compressor, BaseDocumentCompressor)
        found = compressor.compress_documents(documents, "sun")
        assert found == asyncio.run(compressor.acompress_documents(documents, "sun"))
        assert [(one.page_content, one.metadata["place"]) for one in found] == [
            (one["text"], one["corpus_id"]) for one in expected[:top_n]
        ]
        scores = [one.metadata["relevance_score"] for one in found]
        assert scores == pytest.approx([one["score"] for one in expected[:top_n]], abs=1e-6)
    assert (
        documents[0].metadata == {"place": 0} and UnpaddedReranker(engine=reranker).compress_documents([], "sun") == []
    )
    with pytest.raises(ValueError, match="top_n"):
        UnpaddedReranker(engine=reranker, top_n=0)


@pytest.mark.parametrize("make", [UnpaddedCrossEncoder, MtebCrossEncoder])
def test_models_without_one_score_per_pair_raise(make, rerankers, nomic):
    with pytest.raises(unpadded.OptionError, match="has no head for scores"):
        make(nomic)
    with pytest.raises(unpadded.OptionError, match="3 scores per pair"):
        make(unpadded.load(rerankers["bert, 3 labels"], device="cpu"))


@pytest.mark.filterwarnings("default")
def test_mteb_reranking_scores_equal_those_of_sentence_transformers(reranker, rerankers):
    assert isinstance(MtebCrossEncoder(reranker), CrossEncoderProtocol)
    original, *others = (
        mteb.evaluate(model, MockRerankingTask(), cache=None).task_results[0].scores["test"][0]
        for model in (
            CrossEncoderWrapper(sentence_transformers.CrossEncoder(str(rerankers["bert"]), device="cpu")),
            CrossEncoderWrapper(CrossEncoder(str(rerankers["bert"]), device="cpu")),
            MtebCrossEncoder(reranker),
        )
    )
    names = [name for name, value in original.items() if isinstance(value, float)]
    assert len(names) > 20
    for scores in others:
        assert [scores[name] for name in names] == pytest.approx(
            [original[name] for name in names], abs=1e-6, nan_ok=True
        )


def test_the_mteb_cross_encoder_scores_batches_in_pairs(reranker, rerankers):
    original = CrossEncoderWrapper(sentence_transformers.CrossEncoder(str(rerankers["bert"]), device="cpu"))
    queries = [{"text": TEXTS[:2]}, {"text": TEXTS[2:]}]
    documents = [{"text": TEXTS[1:]}, {"text": TEXTS[:1]}]
    found = MtebCrossEncoder(reranker).predict(
        queries, documents, task_metadata=MockRerankingTask.metadata, hf_split="test", hf_subset=""
    )
    expected = original.model.predict(list(zip(TEXTS, [*TEXTS[1:], TEXTS[0]], strict=True)))
    assert np.abs(found - expected).max() <= 1e-6
