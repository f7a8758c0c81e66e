"""LangChain and mteb: their real packages, with mteb's tasks on local data."""

import asyncio

import langchain_huggingface
import mteb
import numpy as np
import pytest
import sentence_transformers
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from mteb.mocks.mock_tasks.retrieval import MockRetrievalTask
from mteb.mocks.mock_tasks.sts import MockSTSTask
from mteb.models import EncoderProtocol
from mteb.types import PromptType
from support.checkpoints import MINILM, add_sentence_transformers_files, write_nomic

import unpadded
from unpadded.integrations.langchain import UnpaddedEmbeddings
from unpadded.integrations.mteb import UnpaddedEncoder
from unpadded.integrations.sentence_transformers import SentenceTransformer

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
