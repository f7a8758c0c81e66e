"""sentence-transformers' SparseEncoder and MultiVectorEncoder with a packed forward pass, and the originals."""

import copy
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import torch
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling
from support.checkpoints import change_json
from support.late_interaction import write_bge, write_late_interaction
from support.sparse import draw_texts, write_models

from unpadded.integrations.sentence_transformers import MultiVectorEncoder, SparseEncoder

TEXTS = ["The sea rises, twice a day.", "Bread!", "", "A piston moves up and down in its cylinder. " * 8]
LIMIT = {"processing_kwargs": {"text": {"max_length": 4, "truncation": True}}}  # the engine does not support it
Models = Callable[[str], tuple[Any, Any]]  # that of this project and the original


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folders = write_models(tmp_path_factory.mktemp("sparse"))
    return cache(lambda name: pair(SparseEncoder, folders[name]))


@pytest.fixture(scope="module")
def multi_vector(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folders = write_late_interaction(tmp_path_factory.mktemp("late interaction"))
    return cache(lambda name: pair(MultiVectorEncoder, folders[name]))


def pair(own: type, folder: Path) -> tuple[Any, Any]:
    original = getattr(sentence_transformers, own.__name__)
    return own(str(folder), device="cpu"), original(str(folder), device="cpu")


def runs_in_the_engine(model: Any) -> bool:
    return model._engine is not None and not model._logged_reasons


def assert_close(found: Any, expected: Any) -> None:
    found, expected = ([one] if isinstance(one, torch.Tensor) else list(one) for one in (found, expected))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.is_sparse, one.shape) == (other.dtype, other.is_sparse, other.shape)
        one, other = (value.to_dense() if value.is_sparse else value for value in (one, other))
        assert torch.linalg.norm(one - other) <= 1e-5 * torch.linalg.norm(other)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"convert_to_sparse_tensor": False},
        {"convert_to_tensor": False},
        {"max_active_dims": 5},
        {"save_to_cpu": True, "prompt": "query: "},
    ],
    ids=str,
)
def test_sparse_vectors_equal_the_original(sparse: Models, options: dict[str, Any]) -> None:
    own, original = sparse("saved")
    texts = [*TEXTS, *draw_texts(12)]
    assert_close(own.encode(texts, **options), original.encode(texts, **options))
    assert runs_in_the_engine(own)


def test_queries_documents_and_single_texts(sparse: Models) -> None:
    own, original = sparse("saved")
    for method in ("encode_query", "encode_document", "encode"):
        assert_close(getattr(own, method)(TEXTS[0]), getattr(original, method)(TEXTS[0]))
        assert_close(getattr(own, method)(TEXTS), getattr(original, method)(TEXTS))
    assert own.encode([]).shape == original.encode([]).shape


@pytest.mark.parametrize("options", [{}, LIMIT], ids=["engine", "modules"])
def test_sparse_vectors_are_usable_outside_inference_mode(sparse: Models, options: dict[str, Any]) -> None:
    found, expected = (model.decode(model.encode(TEXTS, **options), top_k=3) for model in sparse("xlm_roberta"))
    assert [[token for token, _ in text] for text in found] == [[token for token, _ in text] for text in expected]


def test_the_dimension_is_set_by_the_first_call_and_is_not_a_change(sparse: Models) -> None:
    own, original = (copy.deepcopy(model) for model in sparse("bert"))
    for model in (own, original):
        model.encode(TEXTS)
        assert model.get_embedding_dimension() == 30522
    again = copy.deepcopy(own)
    again[-1].embedding_dimension = None
    again.encode(TEXTS, **LIMIT)  # in the modules
    again.encode(TEXTS)
    assert again._engine is not None and len(again._logged_reasons) == 1


def test_a_saved_maximum_of_active_dimensions_can_be_removed(sparse: Models, tmp_path: Path) -> None:
    sentence_transformers.SparseEncoder.save_pretrained(sparse("saved")[1], str(tmp_path))
    change_json(tmp_path / "config_sentence_transformers.json", max_active_dims=3)
    own, original = pair(SparseEncoder, tmp_path)
    assert_close(own.encode(TEXTS), original.encode(TEXTS))
    own.max_active_dims = original.max_active_dims = None
    assert_close(own.encode(TEXTS), original.encode(TEXTS))
    assert runs_in_the_engine(own)


def test_heads_that_sentence_transformers_does_not_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = {MultiVectorEncoder: write_bge(tmp_path), SparseEncoder: write_models(tmp_path / "sparse")["bge-m3"]}
    for own, folder in folders.items():
        options = {"max_active_dims": 4} if own is SparseEncoder else {}
        models = []
        for model in (own, getattr(sentence_transformers, own.__name__)):
            torch.manual_seed(0)  # of the head that sentence-transformers adds
            models.append(model(str(folder), device="cpu", **options))
        assert_close(*(model.encode_document(TEXTS) for model in models))
    assert "that sentence-transformers loads" in caplog.text and "or are not supported" in caplog.text


@pytest.mark.parametrize("name", ["stanford", "pylate", "saved, pooled"])
@pytest.mark.parametrize("method", ["encode_query", "encode_document"])
def test_token_vectors_equal_the_original(multi_vector: Models, name: str, method: str) -> None:
    own, original = multi_vector(name)
    assert_close(getattr(own, method)(TEXTS), getattr(original, method)(TEXTS))
    assert_close(getattr(own, method)(TEXTS[0]), getattr(original, method)(TEXTS[0]))
    assert runs_in_the_engine(own)


def test_token_vectors_are_pooled_and_converted(multi_vector: Models) -> None:
    own, original = multi_vector("pylate")
    pooled = {"token_pooling": HierarchicalTokenPooling(pool_factor=2), "normalize_embeddings": True}
    assert_close(own.encode_document(TEXTS, **pooled), original.encode_document(TEXTS, **pooled))
    arrays = [model.encode_document(TEXTS, convert_to_numpy=True) for model in (own, original)]
    assert_close(*([torch.from_numpy(one) for one in found] for found in arrays))
    assert runs_in_the_engine(own)


def test_without_a_kind_the_modules_run(multi_vector: Models, caplog: pytest.LogCaptureFixture) -> None:
    own, original = (copy.deepcopy(model) for model in multi_vector("pylate"))
    assert_close(own.encode(TEXTS), original.encode(TEXTS))
    assert "runs in sentence-transformers' modules: the engine gives the vectors of queries" in caplog.text


@pytest.mark.parametrize("change", ["weights", "length", "expansion"])
def test_changed_models_run_in_their_modules(
    multi_vector: Models, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    own, original = (copy.deepcopy(model) for model in multi_vector("stanford"))
    for model in (own, original):
        if change == "weights":
            with torch.no_grad():
                next(model.parameters()).mul_(1.5)
        elif change == "length":
            model[0].document_length = 9
        else:
            model[0].query_expansion = None
    for method in ("encode_query", "encode_document"):
        assert_close(getattr(own, method)(TEXTS), getattr(original, method)(TEXTS))
    assert own._engine is None and "have changed" in caplog.text


def test_a_pickled_model_loads_an_engine_of_its_own(sparse: Models) -> None:
    own, original = sparse("saved")
    own.encode(TEXTS)
    again = pickle.loads(pickle.dumps(own))
    assert again._engine is None
    assert_close(again.encode(TEXTS), original.encode(TEXTS))
    assert runs_in_the_engine(again)
