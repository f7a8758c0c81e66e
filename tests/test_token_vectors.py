"""Token vectors: the values of sentence-transformers for each format, the same bits in any batch, and clear errors."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling
from sentence_transformers.util import maxsim as peer_maxsim
from support.checkpoints import change_json, write_json
from support.late_interaction import DIMENSIONS, bert, write_bge, write_late_interaction, write_pylate, write_stanford
from support.rerankers import draw_pairs
from transformers import XLMRobertaModel

import unpadded
from unpadded.checkpoint.reader import open_checkpoint
from unpadded.errors import ConfigError, InputError, OptionError, WeightsError
from unpadded.execution import cuda_graphs
from unpadded.execution.token_vectors import pool_tokens

TEXTS = [text for pair in draw_pairs(8) for text in pair] + ["", "tide, of; bread! [unused0] [Q] [MASK] x", "Of THE 7?"]
NAMES = [
    *("stanford", "stanford, attended", "pylate", "pylate, attended", "pylate, not expanded", "modernbert"),
    *("saved", "saved, pooled"),
]
KINDS = ["document", "query"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_late_interaction(tmp_path_factory.mktemp("late interaction"))


@pytest.fixture(scope="module")
def loaded(models: dict[str, Path]) -> Callable[[str], unpadded.Engine]:
    return cache(lambda name: unpadded.load(models[name], device="cpu", token_budget=256))


@pytest.fixture(scope="module")
def peer(models: dict[str, Path]) -> Callable[[str], MultiVectorEncoder]:
    return cache(lambda name: MultiVectorEncoder(str(models[name]), device="cpu"))


@pytest.fixture
def stanford(tmp_path: Path, models: dict[str, Path]) -> Path:
    """Return a copy that a test may change."""
    return Path(shutil.copytree(models["stanford"], tmp_path / "stanford"))


@pytest.fixture
def pylate(tmp_path: Path, models: dict[str, Path]) -> Path:
    return Path(shutil.copytree(models["pylate"], tmp_path / "pylate"))


@pytest.fixture
def saved(tmp_path: Path, models: dict[str, Path]) -> Path:
    return Path(shutil.copytree(models["saved, pooled"], tmp_path / "saved"))


def expected(model: MultiVectorEncoder, kind: str, texts: list[str] = TEXTS, **options: Any) -> list[np.ndarray]:
    encode = model.encode_query if kind == "query" else model.encode_document
    vectors: list[np.ndarray] = encode(texts, convert_to_numpy=True, **options)
    return vectors


def assert_close(found: Any, wanted: list[np.ndarray]) -> None:
    assert [one.shape for one in found] == [one.shape for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()


def assert_equal(found: Any, wanted: Any) -> None:
    assert [one.shape for one in found] == [one.shape for one in wanted]
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_vectors_equal_those_of_sentence_transformers(
    name: str, kind: Any, loaded: Callable[[str], unpadded.Engine], peer: Callable[[str], MultiVectorEncoder]
) -> None:
    found, wanted = loaded(name).encode_tokens(TEXTS, kind=kind), expected(peer(name), kind)
    assert found.vectors.dtype == np.float32
    assert_close(found, wanted)
    alone = [loaded(name).encode_tokens(text, kind=kind)[0] for text in TEXTS]
    assert_equal(alone, found)


@pytest.mark.parametrize("name", ["stanford", "modernbert"])
def test_scores_rank_as_those_of_sentence_transformers(
    name: str, loaded: Callable[[str], unpadded.Engine], peer: Callable[[str], MultiVectorEncoder]
) -> None:
    engine, model = loaded(name), peer(name)
    distinct = list(dict.fromkeys(TEXTS))
    documents = engine.encode_tokens(distinct)
    scores = np.stack([unpadded.maxsim(query, documents) for query in engine.encode_tokens(distinct, kind="query")])
    wanted = model.similarity(expected(model, "query", distinct), expected(model, "document", distinct)).numpy()
    assert np.abs(scores - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert np.array_equal(np.argsort(-scores, axis=1), np.argsort(-wanted, axis=1))


@pytest.mark.parametrize("factor", [1.5, 2, 4, 100])
def test_pooled_documents_equal_those_of_sentence_transformers(
    factor: float, loaded: Callable[[str], unpadded.Engine], peer: Callable[[str], MultiVectorEncoder]
) -> None:
    pooling = HierarchicalTokenPooling(factor)
    for name in ("pylate", "saved, pooled"):  # the second one pools twice
        wanted = expected(peer(name), "document", token_pooling=pooling)
        found = loaded(name).encode_tokens(TEXTS, pool_factor=factor)
        assert_close(found, wanted)
        assert_equal([loaded(name).encode_tokens(text, pool_factor=factor)[0] for text in TEXTS[:6]], found[:6])


def test_vectors_of_bge_m3(tmp_path: Path) -> None:
    """By FlagEmbedding's formula: the linear layer on all tokens but the first, each vector of length 1."""
    folder = write_bge(tmp_path / "bge")
    engine = unpadded.load(folder, device="cpu")
    model, linear = XLMRobertaModel.from_pretrained(folder).eval(), load_file(folder / "colbert_linear.safetensors")
    wanted = []
    for row in engine.tokenizer.encode(TEXTS, max_length=48):
        with torch.no_grad():
            hidden = model(torch.from_numpy(row.ids).long()[None]).last_hidden_state[0, 1:]
        wanted.append(torch.nn.functional.normalize(hidden @ linear["weight"].T + linear["bias"], dim=-1).numpy())
    assert_close(engine.encode_tokens(TEXTS), wanted)
    assert_equal(engine.encode_tokens(TEXTS, kind="query"), engine.encode_tokens(TEXTS))


def test_a_pickled_linear_layer_is_rejected_when_it_is_needed(tmp_path: Path) -> None:
    folder = write_bge(tmp_path / "bge")
    linear = load_file(folder / "colbert_linear.safetensors")
    (folder / "colbert_linear.safetensors").unlink()
    torch.save(linear, folder / "colbert_linear.pt")
    engine = unpadded.load(folder, device="cpu")
    assert engine.encode(["a"]).shape == (1, 32)
    with pytest.raises(WeightsError, match=r"colbert_linear\.pt is a pickle, .*; convert it .*: save_file\(") as error:
        engine.encode_tokens(["a"])
    code = str(error.value).rpartition(": ")[2].replace("'colbert_linear", f"'{folder}/colbert_linear")
    exec(code, {"torch": torch, "save_file": save_file})  # from the message
    assert unpadded.load(folder, device="cpu").encode_tokens(["a"]).vectors.shape == (2, 32)


def test_several_devices(models: dict[str, Path], loaded: Callable[[str], unpadded.Engine]) -> None:
    with unpadded.load(models["stanford"], device="cpu,cpu", token_budget=256) as two:
        for kind in KINDS:
            assert_equal(two.encode_tokens(TEXTS, kind=kind), loaded("stanford").encode_tokens(TEXTS, kind=kind))


def test_cuda(models: dict[str, Path], loaded: Callable[[str], unpadded.Engine], cuda: str) -> None:
    """One text is replayed from a graph; two queries are too many for one."""
    engine, texts = unpadded.load(models["stanford"], device=cuda, dtype="float32"), ["tide of", "a window, 7"]
    for kind in KINDS:
        wanted = loaded("stanford").encode_tokens(texts, kind=kind)
        assert_close(engine.encode_tokens(texts, kind=kind), wanted)
        for index in (1, 0):
            assert_close(engine.encode_tokens(texts[index], kind=kind), wanted[index : index + 1])
    assert {key[2] for key in engine._pipeline.runner.graphs.by_key} == {False, True}


def test_a_graph_takes_other_numbers_of_queries(
    models: dict[str, Path], cuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "TOKEN_BUCKETS", (32,))
    options = {"dtype": "float32", "max_length": 4}
    engine, other = (unpadded.load(models["stanford"], device=device, **options) for device in (cuda, "cpu"))
    for texts in (["", "a", "b", "c", "d"], ["", "a", "b"]):  # only the first one has a token that is appended
        assert_close(engine.encode_tokens(texts, kind="query"), other.encode_tokens(texts, kind="query"))
    assert len(engine._pipeline.runner.graphs.by_key) == 1


def test_windows_without_a_key_on_cuda(models: dict[str, Path], loaded: Any, cuda: str) -> None:
    engine = unpadded.load(models["modernbert"], device=cuda, dtype="float32")
    assert_close(engine.encode_tokens("a", kind="query"), loaded("modernbert").encode_tokens("a", kind="query"))


def test_bf16(models: dict[str, Path], loaded: Callable[[str], unpadded.Engine]) -> None:
    engine = unpadded.load(models["stanford"], device="cpu", dtype="bfloat16")
    for kind in KINDS:
        found, wanted = engine.encode_tokens(TEXTS, kind=kind), loaded("stanford").encode_tokens(TEXTS, kind=kind)
        assert (found.vectors * wanted.vectors).sum(1).min() >= 0.99


def test_token_vectors_are_a_sequence(loaded: Callable[[str], unpadded.Engine]) -> None:
    found = loaded("stanford").encode_tokens(["tide of", "", "bread, 7"])
    assert len(found) == 3 and [len(one) for one in found] == [5, 3, 5]  # without the comma
    assert found.offsets.tolist() == [0, 5, 8, 13] and found.vectors.shape == (13, DIMENSIONS)
    assert found.token_counts.tolist() == [5, 3, 6] and not found.truncated.any()
    assert np.array_equal(found[-1], found.vectors[8:]) and np.array_equal(found[1], found.vectors[5:8])
    assert_equal(found[1:], [found[1], found[2]])
    assert repr(found) == "TokenVectors(3 texts, 13 x 16, 0 truncated)"
    assert_equal(pickle.loads(pickle.dumps(found)), found)
    with pytest.raises(IndexError):
        found[3]
    empty = loaded("stanford").encode_tokens([])
    assert len(empty) == 0 and empty.vectors.shape == (0, DIMENSIONS) and empty.offsets.tolist() == [0]


def test_maxsim() -> None:
    draw = np.random.default_rng(0)
    query = draw.standard_normal((5, 16), np.float32)
    documents = [draw.standard_normal((size, 16), np.float32) for size in (1, 30, 7)]
    scores = unpadded.maxsim(query, documents)
    assert scores.dtype == np.float32 and np.allclose(scores, peer_maxsim([query], documents)[0], rtol=1e-6)
    assert np.array_equal(unpadded.maxsim(query, documents[1:2]), scores[1:2])
    assert unpadded.maxsim(query, [documents[0][:0]]).tolist() == [0] and unpadded.maxsim(query, []).shape == (0,)
    for wrong in (documents[0][:, :8], documents[0][0]):
        with pytest.raises(InputError, match=r"shapes are not .* of one width: \(5, 16\), \(.*\); use"):
            unpadded.maxsim(query, [documents[0], wrong])
    for wrong in (query[0], query[0, 0]):
        with pytest.raises(InputError, match="shapes are not"):
            unpadded.maxsim(wrong, documents)


def test_truncation_and_prompt(
    loaded: Callable[[str], unpadded.Engine], models: dict[str, Path], peer: Callable[[str], MultiVectorEncoder]
) -> None:
    engine = loaded("stanford")
    found = engine.encode_tokens(["tide " * 30, "tide"])
    assert found.truncated.tolist() == [True, False] and found.token_counts.tolist() == [24, 4]
    with pytest.raises(InputError, match="text 1 is too long: more than 24 tokens"):
        engine.encode_tokens(["a", "tide " * 30], truncation="error")
    with pytest.raises(InputError, match="text 0 is too long: more than 12 tokens"):
        engine.encode_tokens(["tide " * 15], kind="query", truncation="error")
    assert_close(
        engine.encode_tokens(TEXTS, kind="query", prompt="ask: "), expected(peer("stanford"), "query", prompt="ask: ")
    )
    short = unpadded.load(models["stanford"], device="cpu", max_length=8)
    for kind in KINDS:
        assert short.encode_tokens(["tide " * 30], kind=kind).token_counts.tolist() == [8]
    long = unpadded.load(models["stanford"], device="cpu", max_length=40)
    counts = [long.encode_tokens(["tide " * 50, "a"], kind=kind).token_counts.tolist() for kind in KINDS]
    assert counts == [[40, 4], [12, 12]]


def test_token_ids_are_embedded_unchanged(loaded: Callable[[str], unpadded.Engine]) -> None:
    engine = loaded("stanford")
    given = engine.tokenizer.encode(["[unused1] tide, of"], max_length=24)[0].ids
    assert_equal(engine.encode_tokens([given]), engine.encode_tokens(["tide, of"]))
    assert len(engine.encode_tokens([given], kind="query")[0]) == len(given)  # the comma included


def test_the_checkpoint_lists_its_head(models: dict[str, Path], minilm: Path, tmp_path: Path) -> None:
    described = open_checkpoint(models["stanford"]).describe()
    assert described["tokens"] == {"dimensions": DIMENSIONS, "max_lengths": {"query": 12, "document": 24}}
    assert described["prompts"] == {"query": "[unused0] ", "document": "[unused1] "}
    assert open_checkpoint(models["saved, pooled"]).describe()["tokens"]["max_lengths"] == {"query": 21, "document": 48}
    assert json.loads(json.dumps(described))["defaults"]
    assert open_checkpoint(minilm).describe()["tokens"] is None


def test_bad_options_raise(
    loaded: Callable[[str], unpadded.Engine], minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = loaded("stanford")
    with pytest.raises(OptionError, match="has no head for token vectors; load a late-interaction model"):
        unpadded.load(minilm, device="cpu").encode_tokens(["a"])
    with pytest.raises(OptionError, match="kind is unknown: 'passage'"):
        engine.encode_tokens(["a"], kind="passage")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="truncation is unknown: 'left'"):
        engine.encode_tokens(["a"], truncation="left")  # type: ignore[arg-type]
    for factor, kind in ((0.5, "document"), (float("nan"), "document"), (2, "query")):
        with pytest.raises(OptionError, match=f"pool_factor is {factor} for kind='{kind}'; pass 1"):
            engine.encode_tokens(["a"], kind=kind, pool_factor=factor)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "scipy.cluster.hierarchy", None)
    with pytest.raises(OptionError, match=r"pool_factor = 2 needs scipy: .*; run pip install scipy"):
        engine.encode_tokens(["tide of bread"], pool_factor=2)


def test_other_attention_backends_reject_unattended_tokens(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unpadded.loading.attention_backend", lambda *_: None)  # which needs a GPU
    with pytest.raises(OptionError, match="attention='torch' has no tokens without keys for stanf"):
        unpadded.load(models["stanford"], device="cpu", attention="torch")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"interaction": "flipr"}, "interaction in .*artifact.metadata = 'flipr' is not implemented"),
        ({"similarity": "l2"}, "similarity in .* = 'l2' is not implemented"),
        ({"dim": 128}, "dim in .* = 128 is not implemented, only 16"),
        ({"query_maxlen": "32"}, "length = '32' is not a whole number"),
        ({"doc_maxlen": 0}, "document_length = 0 is not a whole number"),
        ({"attend_to_mask_tokens": "no"}, "attend = 'no' is neither true nor false"),
        ({"query_token_id": 5}, "query_token_id = 5 is not a string"),
    ],
)
def test_settings_of_stanford_that_are_not_supported(setting: dict[str, Any], message: str, stanford: Path) -> None:
    change_json(stanford / "artifact.metadata", **setting)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(stanford)


@pytest.mark.parametrize(
    ("file", "setting", "message"),
    [
        ("2_MultiVectorMask", {"keep_only_token_ids": [5]}, r"keep_only_token_ids in MultiVectorMask = \[5\] is not"),
        ("2_MultiVectorMask", {"skiplist_words": 5}, "skiplist_words = 5 is not implemented, only 'a list of tokens'"),
        ("3_Normalize", {"module_input_name": "sentence_embedding"}, "module_input_name in .* 'sentence_embedding'"),
        ("3_Normalize", {"module_input_name": ...}, "module_input_name in .* 'sentence_embedding'"),
        ("1_Dense", {"module_output_name": "scores"}, "module_output_name in .* = 'scores' is not implemented"),
        ("1_Dense", {"in_features": 31}, "in_features = 31 in .* does not fit"),
        ("4_HierarchicalTokenPooling", {"pool_factor": 0}, "pool_factor = 0 is not a positive number"),
        ("4_HierarchicalTokenPooling", {"num_protected_tokens": -1}, "num_protected_tokens = -1 is not a whole number"),
    ],
)
def test_settings_of_modules_that_are_not_supported(
    file: str, setting: dict[str, Any], message: str, saved: Path
) -> None:
    change_json(saved / file / "config.json", **setting)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(saved)


EXPANSION = {"strategy": "fixed", "length": 8}


@pytest.mark.parametrize(
    ("expansion", "message"),
    [
        (EXPANSION | {"strategy": "max"}, "the strategy of query_expansion = 'max' is not implemented"),
        (EXPANSION | {"side": "left"}, "side in query_expansion = 'left' is not implemented"),
        ({"strategy": "fixed"}, "query_expansion lacks length"),
        (EXPANSION | {"length": 22}, "contradicts itself: query_length = 21 but .*'length': 22"),
        ([8], r"query_expansion = \[8\] is not implemented, only 'an object'"),
    ],
)
def test_query_expansions_that_are_not_supported(expansion: Any, message: str, saved: Path) -> None:
    change_json(saved / "sentence_bert_config.json", query_expansion=expansion)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(saved)


def test_modules_that_are_not_supported(saved: Path, pylate: Path) -> None:
    modules = json.loads((saved / "modules.json").read_text())
    for order, kinds in (([0, 1, 4, 2, 3], "Transformer, Dense, Hier"), ([0, 2, 3, 1, 4], "Transformer, MultiVectorM")):
        write_json(saved / "modules.json", [modules[index] for index in order])
        with pytest.raises(ConfigError, match=rf"modules\.json = '{kinds}.* is not implemented"):
            open_checkpoint(saved)
    write_json(saved / "modules.json", [modules[index] for index in (0, 1, 3, 4)])
    with pytest.raises(ConfigError, match=r"query_expansion = Expansion.* is not implemented, only 'null without"):
        open_checkpoint(saved)
    write_json(saved / "modules.json", [modules[index] for index in (0, 1, 3, 2)])  # any order of these two
    assert open_checkpoint(saved).tokens is not None
    change_json(pylate / "1_Dense" / "config.json", use_residual=True)
    with pytest.raises(ConfigError, match=r"use_residual in .* = True is not implemented"):
        open_checkpoint(pylate)


def test_a_tokenizer_without_the_appended_token(saved: Path, pylate: Path) -> None:
    change_json(saved / "sentence_bert_config.json", query_expansion=EXPANSION | {"token": "<expand>"})
    with pytest.raises(ConfigError, match="queries are expanded by <expand>, which the tokenizer lacks; add it"):
        unpadded.load(saved, device="cpu").encode_tokens(["a"], kind="query")
    change_json(pylate / "tokenizer_config.json", padding_side="left")
    with pytest.raises(ConfigError, match=r"padding_side in tokenizer_config\.json = 'left' is not implemented"):
        open_checkpoint(pylate)


def test_a_model_without_projection_and_norm(
    tmp_path: Path, saved: Path, peer: Callable[[str], MultiVectorEncoder]
) -> None:
    """As sentence-transformers, no norm without the module; and no markers, so that no token is dropped."""
    modules = json.loads((saved / "modules.json").read_text())
    write_json(saved / "modules.json", [modules[0], modules[2]])
    engine, model = unpadded.load(saved, device="cpu"), MultiVectorEncoder(str(saved), device="cpu")
    for kind in KINDS:
        assert_close(engine.encode_tokens(TEXTS, kind=kind), expected(model, kind))
    folder = write_pylate(tmp_path / "bare", bert(), query_prefix=..., document_prefix=..., model_type=...)
    engine, model = unpadded.load(folder, device="cpu"), MultiVectorEncoder(str(folder), device="cpu")
    assert_close(engine.encode_tokens(TEXTS), expected(model, "document"))


def test_stanford_without_metadata(stanford: Path) -> None:
    (stanford / "artifact.metadata").unlink()
    engine, model = unpadded.load(stanford, device="cpu"), MultiVectorEncoder(str(stanford), device="cpu")
    assert engine.checkpoint.tokens is not None and engine.checkpoint.tokens.max_lengths["query"] == 32
    for kind in KINDS:
        assert_close(engine.encode_tokens(TEXTS, kind=kind), expected(model, kind))


def test_a_matrix_that_is_absent_raises(stanford: Path) -> None:
    tensors = load_file(stanford / "model.safetensors")
    del tensors["linear.weight"]
    save_file(tensors, stanford / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model.safetensors has no matrix linear\.weight \(found: bert"):
        open_checkpoint(stanford)


def test_pooling_keeps_protected_vectors() -> None:
    vectors = np.eye(6, dtype=np.float32)
    assert np.array_equal(pool_tokens(vectors, 1, 1, False), vectors)
    pooled = pool_tokens(vectors, 2, 3, True)
    assert np.array_equal(pooled[:3], vectors[:3]) and len(pooled) == 4
    assert np.allclose(pooled[3], np.array([0, 0, 0, 1, 1, 1]) / 3**0.5)
    assert pool_tokens(vectors[:1], 2, 3, True).shape == (1, 6)


def test_stanford_reads_only_safetensors(tmp_path: Path) -> None:
    folder = write_stanford(tmp_path / "model")
    assert unpadded.load(folder, device="cpu").describe()["tokens"]["dimensions"] == DIMENSIONS
