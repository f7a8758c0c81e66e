"""Sparse weights: the values of sentence-transformers and of published formulas, the same bits in any batch, errors."""

import asyncio
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SparseEncoder
from support.checkpoints import add_sentence_transformers_files, change_json
from support.rerankers import SIZES
from support.sparse import OLD, draw_texts, write_models, write_modules
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM

import unpadded
from unpadded.errors import ConfigError, InputError, OptionError, OutputError, WeightsError
from unpadded.execution import pipeline
from unpadded.execution.batcher import run_windows
from unpadded.model.encoder import Encoder
from unpadded.model.layer import HeadLayer

TEXTS = draw_texts(30)
ROLES = ("cls_token", "eos_token", "pad_token", "unk_token")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("sparse"))


@pytest.fixture(scope="module")
def engine(models: dict[str, Path]) -> unpadded.Engine:
    return unpadded.load(models["bert"], device="cpu", token_budget=256)


@pytest.fixture
def copy(models: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(models["saved"], tmp_path / "model")


def assert_same(found: unpadded.Sparse, expected: unpadded.Sparse) -> None:
    for name in ("indptr", "ids", "weights", "token_counts", "truncated"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def assert_valid(found: unpadded.Sparse, texts: Sequence[str]) -> None:
    assert (found.indptr.dtype, found.ids.dtype, found.weights.dtype) == (np.int64, np.int32, np.float32)
    assert len(found) == len(texts) == len(found.indptr) - 1 and found.indptr[-1] == len(found.ids)
    assert (found.weights > 0).all()
    assert all((np.diff(ids) > 0).all() for ids in np.split(found.ids, found.indptr[1:-1]))


def parts(found: unpadded.Sparse, index: int) -> tuple[np.ndarray, np.ndarray]:
    part = slice(found.indptr[index], found.indptr[index + 1])
    return found.ids[part], found.weights[part]


def assert_alone_equals_together(engine: unpadded.Engine, found: unpadded.Sparse, texts: Sequence[str]) -> None:
    for index, text in enumerate(texts):
        for actual, expected in zip(parts(engine.encode_sparse([text]), 0), parts(found, index), strict=True):
            assert np.array_equal(actual, expected)


@pytest.mark.parametrize("name", ["bert", "bert, tanh", "xlm_roberta", "modernbert", "saved", "old"])
def test_weights_equal_those_of_sentence_transformers(name: str, models: dict[str, Path]) -> None:
    engine, reference = unpadded.load(models[name], device="cpu"), SparseEncoder(str(models[name]), device="cpu")
    expected = reference.encode(TEXTS, convert_to_sparse_tensor=False).numpy()
    found = engine.encode_sparse(TEXTS)
    assert_valid(found, TEXTS)
    dense = found.to_scipy().toarray()
    assert dense.shape == expected.shape == (len(TEXTS), 30522) and (expected == 0).any()
    assert np.abs(dense - expected).max() <= 1e-5 * expected.max()
    assert max(np.maximum(dense, expected)[(dense > 0) != (expected > 0)], default=0) <= 1e-5 * expected.max()
    assert_alone_equals_together(engine, found, TEXTS[:8])


def published_weights(folder: Path, texts: Sequence[str]) -> Iterator[dict[int, float]]:
    """Compute as FlagEmbedding for bge-m3 and as the published code of gte-multilingual-base; yield weights by id."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    if (folder / "sparse_linear.safetensors").exists():
        head = load_file(folder / "sparse_linear.safetensors")
    else:
        head = {kind: load_file(folder / "model.safetensors")[f"classifier.{kind}"] for kind in ("weight", "bias")}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    unused = {getattr(tokenizer, f"{role}_id") for role in ROLES if role in settings}
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=48)
        with torch.no_grad():
            states = model(**inputs).last_hidden_state[0]
        weights = torch.relu(states @ head["weight"].T + head["bias"])[:, 0].tolist()
        found: dict[int, float] = {}
        for weight, id_ in zip(weights, inputs["input_ids"][0].tolist(), strict=True):
            if id_ not in unused and weight > found.get(id_, 0):
                found[id_] = weight
        yield found


@pytest.mark.parametrize("name", ["bge-m3", "gte"])
def test_weights_of_tokens_equal_the_published_formula(name: str, models: dict[str, Path]) -> None:
    engine = unpadded.load(models[name], device="cpu", token_budget=256)
    texts = [*TEXTS, "tide \U00010380 of tide of bread"]  # with an unknown token
    found = engine.encode_sparse(texts)
    assert_valid(found, texts)
    for index, expected in enumerate(published_weights(models[name], texts)):
        ids, weights = parts(found, index)
        assert ids.tolist() == sorted(expected)
        assert np.abs(weights - [expected[id_] for id_ in ids.tolist()]).max(initial=0) <= 1e-5 * max(
            expected.values(), default=0
        )
    assert len(found.ids) > 0 and min(np.diff(found.indptr)) == 0
    assert_alone_equals_together(engine, found, texts)
    assert np.array_equal(
        engine.encode_sparse(texts, top_k=2).to_scipy().toarray().max(1), found.to_scipy().max(1).toarray()[:, 0]
    )


def test_top_k_keeps_the_heaviest_and_of_equal_ones_the_lowest_ids(engine: unpadded.Engine) -> None:
    whole, found = engine.encode_sparse(TEXTS), engine.encode_sparse(TEXTS, top_k=7)
    assert_valid(found, TEXTS)
    for index in range(len(TEXTS)):
        assert found.tokens(index) == whole.tokens(index)[:7]
    head = engine.checkpoint.sparse
    assert not isinstance(head, str)
    row = np.array([3, 5, 8, 9], np.int32), np.array([1, 2, 1, 2], np.float32)
    assert [pipeline.terms(row, row[0], head, [], k)[0].tolist() for k in (1, 2, 3, 9)] == [
        [5],
        [5, 9],
        [3, 5, 9],
        [3, 5, 8, 9],
    ]
    for top_k in (0, -1, 2.0, "7"):
        with pytest.raises(OptionError, match="top_k is not a positive whole number: "):
            engine.encode_sparse(TEXTS, top_k=top_k)  # type: ignore[arg-type]


def test_the_checkpoint_states_top_k(models: dict[str, Path], copy: Path) -> None:
    change_json(copy / "config_sentence_transformers.json", max_active_dims=5)
    engine, reference = unpadded.load(copy, device="cpu"), SparseEncoder(str(copy), device="cpu")
    expected = reference.encode(TEXTS, convert_to_sparse_tensor=False).numpy()
    found = engine.encode_sparse(TEXTS)
    assert np.abs(found.to_scipy().toarray() - expected).max() <= 1e-5 * expected.max()
    assert np.diff(found.indptr).tolist() == [5] * len(TEXTS)
    assert np.diff(engine.encode_sparse(TEXTS[:2], top_k=9).indptr).tolist() == [9, 9]


def test_the_result(engine: unpadded.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    found = engine.encode_sparse(["tide of bread", "", "tide " * 60], top_k=3)
    counts = engine.embed(["tide of bread", "", "tide " * 60])
    assert np.array_equal(found.token_counts, counts.token_counts) and found.truncated.tolist() == [False, False, True]
    tokens = found.tokens(0)
    weights = [weight for _, weight in tokens]
    assert weights == sorted(weights, reverse=True) and set(weights) == set(parts(found, 0)[1].tolist())
    ids = [engine.tokenizer.backend.token_to_id(token) for token, _ in tokens]
    assert sorted(ids) == parts(found, 0)[0].tolist()
    assert found.tokens(-1) == found.tokens(2) != found.tokens(1)
    with pytest.raises(IndexError):
        found.tokens(3)
    again = pickle.loads(pickle.dumps(found))
    assert_same(again, found)
    assert again.tokens(0) == tokens and "tokenizer" not in repr(found)
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(OptionError, match=r"scipy is not installed: .*; run pip install scipy"):
        found.to_scipy()


def test_kinds_of_texts(engine: unpadded.Engine) -> None:
    found = engine.encode_sparse(["tide", "bread", "tide"])
    assert found.tokens(0) == found.tokens(2) != found.tokens(1)
    assert_same(engine.encode_sparse("tide"), engine.encode_sparse(["tide"]))
    ids = engine.tokenizer.encode(["tide"], max_length=48)[0].ids
    assert_same(engine.encode_sparse([ids.tolist()]), engine.encode_sparse(["tide"]))
    none = engine.encode_sparse([])
    assert len(none) == 0 and none.indptr.tolist() == [0] and none.to_scipy().shape == (0, 30522)
    with pytest.raises(InputError, match="text 1 is too long"):
        engine.encode_sparse(["tide", "tide " * 60], truncation="error")


def test_tasks_and_prompts(copy: Path) -> None:
    change_json(copy / "config_sentence_transformers.json", prompts={"query": "tide: ", "document": ""})
    engine, reference = unpadded.load(copy, device="cpu"), SparseEncoder(str(copy), device="cpu")
    expected = reference.encode_query(["bread"], convert_to_sparse_tensor=False).numpy()
    for options in ({"task": "query"}, {"prompt": "tide: "}):
        found = engine.encode_sparse(["bread"], **options)  # type: ignore[arg-type]
        assert np.abs(found.to_scipy().toarray() - expected).max() <= 1e-5 * expected.max()
    with pytest.raises(OptionError, match="task is unknown: 'other'"):
        engine.encode_sparse(["bread"], task="other")
    with pytest.raises(TypeError, match="dimensions"):
        engine.encode_sparse(["bread"], dimensions=8)  # type: ignore[call-arg]


def shared_batches(engine: unpadded.Engine) -> unpadded.Sparse:
    """Return the weights of TEXTS as a server computes them."""
    steps = engine._pipeline
    plan, batcher = steps.sparse_plan(None, None, "right"), steps.batcher()
    done = asyncio.run(run_windows(batcher, steps.reader.windows(TEXTS, plan), steps.work(plan)))
    batcher.close()
    return steps.sparse(done, plan)


@pytest.mark.parametrize("name", ["bert", "bge-m3"])
def test_shared_batches(name: str, models: dict[str, Path]) -> None:
    engine = unpadded.load(models[name], device="cpu", token_budget=256)
    assert_same(shared_batches(engine), engine.encode_sparse(TEXTS))


def test_several_devices(engine: unpadded.Engine, models: dict[str, Path]) -> None:
    with unpadded.load(models["bert"], device="cpu,cpu", token_budget=256) as two:
        assert_same(two.encode_sparse(TEXTS), engine.encode_sparse(TEXTS))
        assert_same(shared_batches(two), engine.encode_sparse(TEXTS))


def test_the_rows_of_a_batch_are_bounded(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = unpadded.load(models["bert"], device="cpu", token_budget=256)
    expected, sizes = engine.encode_sparse(TEXTS), []
    steps, launch = engine._pipeline, engine._pipeline.backend.launch
    monkeypatch.setattr(pipeline, "MAX_ELEMENTS", 4 * 30522)
    monkeypatch.setattr(steps.backend, "launch", lambda ids, options: (sizes.append(len(ids)), launch(ids, options))[1])
    assert_same(engine.encode_sparse(TEXTS), expected)
    assert max(sizes) == 4
    sizes.clear()
    assert_same(shared_batches(engine), expected)
    assert max(sizes) == 4


def test_bf16(engine: unpadded.Engine, models: dict[str, Path]) -> None:
    found = unpadded.load(models["bert"], device="cpu", dtype="bfloat16").encode_sparse(TEXTS[:8])
    expected = engine.encode_sparse(TEXTS[:8]).to_scipy().toarray()
    assert found.weights.dtype == np.float32
    assert np.abs(found.to_scipy().toarray() - expected).max() <= 0.03 * expected.max()


def test_a_device_with_graphs_matches_the_cpu(tmp_path: Path, cuda: str) -> None:
    config = BertConfig(**SIZES, max_position_embeddings=64, vocab_size=130)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    texts = [[1, 2, 3], [4, 5], [6] * 9, [7]]
    expected = unpadded.load(tmp_path, device="cpu").encode_sparse(texts)
    with unpadded.load(tmp_path, device=cuda, dtype="float32", token_budget=12) as engine:
        for _ in range(2):
            found = engine.encode_sparse(texts)
            assert np.array_equal(found.ids, expected.ids) and np.abs(found.weights - expected.weights).max() <= 1e-5
        assert not engine._pipeline.runner.graphs.by_key  # each would keep its rows
        assert len(engine.encode(texts)) == 4 and engine._pipeline.runner.graphs.by_key


def test_weights_that_are_not_finite_raise(models: dict[str, Path]) -> None:
    for name in ("bert", "bge-m3"):
        engine = unpadded.load(models[name], device="cpu")
        runner = engine._pipeline.runner
        *layers, last = runner.heads["sparse"].layers
        broken = HeadLayer(torch.full_like(last.weight, float("nan")), last.bias, last.activation)
        runner.heads["sparse"] = runner.heads["sparse"]._replace(layers=(*layers, broken))
        with pytest.raises(OutputError, match="the vector of text 0 is not finite"):
            engine.encode_sparse(["tide", "bread"])


def test_a_model_without_the_head_raises(
    minilm: Path, rerankers: dict[str, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    for folder in (minilm, rerankers["bert"]):
        engine = unpadded.load(folder, device="cpu")
        with pytest.raises(OptionError, match="has no head for sparse weights; load a model such as SPLADE"):
            engine.encode_sparse(["tide"])
        assert engine.describe()["sparse"] is None
    masked, classifier = (shutil.copytree(models[name], tmp_path / name) for name in ("bert", "gte"))
    add_sentence_transformers_files(masked, normalize=False, max_seq_length=48)
    change_json(classifier / "config.json", id2label={"0": "A", "1": "B"}, label2id={"A": 0, "B": 1})
    for folder in (masked, classifier):
        assert unpadded.load(folder, device="cpu").describe()["sparse"] is None
    kinds = {name: unpadded.load(models[name], device="cpu").describe()["sparse"] for name in ("saved", "gte")}
    assert kinds == {"saved": "masked-LM logits", "gte": "token weights"}


def test_a_pickled_head_raises_with_the_way_to_convert_it(models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models["bge-m3"], tmp_path / "model")
    head = load_file(folder / "sparse_linear.safetensors")
    torch.save(head, folder / "sparse_linear.pt")
    (folder / "sparse_linear.safetensors").unlink()
    engine = unpadded.load(folder, device="cpu")
    assert np.array_equal(engine.encode(["tide"]), unpadded.load(models["bge-m3"], device="cpu").encode(["tide"]))
    with pytest.raises(WeightsError, match="is a pickle, which is never loaded; convert it") as raised:
        engine.encode_sparse(["tide"])
    code = f"import torch; from safetensors.torch import save_file; {str(raised.value).partition('safetensors: ')[2]}"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    found = unpadded.load(folder, device="cpu").encode_sparse(TEXTS)
    assert_same(found, unpadded.load(models["bge-m3"], device="cpu").encode_sparse(TEXTS))


def test_a_masked_model_without_the_weights_of_its_head_still_gives_vectors(copy: Path) -> None:
    expected = unpadded.load(copy, device="cpu").encode(["tide"])
    (copy / "modules.json").unlink()
    tensors = load_file(copy / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "cls." not in name}, copy / "model.safetensors")
    engine = unpadded.load(copy, device="cpu")
    assert np.array_equal(engine.encode(["tide"]), expected)
    with pytest.raises(OptionError, match="has no head for sparse weights"):
        engine.encode_sparse(["tide"])


def test_names_of_norms_from_tensorflow(copy: Path, engine: unpadded.Engine) -> None:
    tensors, norm = load_file(copy / "model.safetensors"), "cls.predictions.transform.LayerNorm"
    tensors[f"{norm}.gamma"], tensors[f"{norm}.beta"] = tensors.pop(f"{norm}.weight"), tensors.pop(f"{norm}.bias")
    save_file(tensors, copy / "model.safetensors")
    assert_same(unpadded.load(copy, device="cpu").encode_sparse(TEXTS[:4]), engine.encode_sparse(TEXTS[:4]))


def unsupported(folder: Path) -> Iterator[tuple[str, str]]:
    """Change one file of a folder at a time; yield the setting and its value as an error names them."""
    pooling = folder / "1_SpladePooling/config.json"
    for key, value in (("pooling_strategy", "sum"), ("activation_function", "gelu")):
        before = pooling.read_text()
        change_json(pooling, **{key: value})
        yield key, value
        pooling.write_text(before)
    before = (folder / "config.json").read_text()
    change_json(folder / "config.json", tie_word_embeddings=False)
    yield "tie_word_embeddings", "False"
    (folder / "config.json").write_text(before)
    before = (folder / "sentence_bert_config.json").read_text()
    change_json(folder / "sentence_bert_config.json", transformer_task=...)
    yield "modules.json", "Transformer, SpladePooling"
    change_json(folder / "sentence_bert_config.json", transformer_task="feature-extraction")
    yield "transformer_task", "feature-extraction"
    (folder / "sentence_bert_config.json").write_text(before)
    for kinds in (["MLMTransformer", "SpladePooling", "Normalize"], ["SpladePooling"], ["MLMTransformer"]):
        write_modules(folder, *kinds)
        yield "modules.json", ", ".join(kinds)
    for kind in ("Router", "SparseStaticEmbedding", "SparseAutoEncoder"):
        write_modules(folder, "MLMTransformer", kind)
        yield "the module type", OLD + kind
    change_json(folder / "config_sentence_transformers.json", model_type="SentenceTransformer")
    write_modules(folder, "MLMTransformer", "SpladePooling")
    yield "model_type", "SentenceTransformer"


def test_unsupported_settings_raise_by_name(models: dict[str, Path], copy: Path) -> None:
    for key, value in unsupported(copy):
        with pytest.raises(ConfigError) as raised:
            unpadded.load(copy, device="cpu")
        assert key in str(raised.value) and value in str(raised.value), str(raised.value)
    modern = shutil.copytree(models["modernbert"], copy / "modernbert")
    change_json(modern / "config.json", decoder_bias=False)
    with pytest.raises(ConfigError, match="decoder_bias = False is not implemented"):
        unpadded.load(modern, device="cpu")
    write_modules(copy, "Router")
    with pytest.raises(ConfigError, match="of a Router, pass a folder with the modules for documents"):
        unpadded.load(copy, device="cpu")


def test_all_results_come_from_one_pass(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(models["bge-m3"], tmp_path / "model")
    add_sentence_transformers_files(folder, pooling="cls", normalize=True)
    with pytest.raises(OptionError, match="does not give all results in one pass; call encode"):
        unpadded.load(folder, device="cpu").encode_all(["tide"])
    save_file({"weight": torch.randn(24, 32), "bias": torch.randn(24)}, folder / "colbert_linear.safetensors")
    engine, texts = unpadded.load(folder, device="cpu", token_budget=256), [*draw_texts(30), "", "tide"]
    expected = engine.embed(texts).vectors, engine.encode_sparse(texts), engine.encode_tokens(texts)
    passes, call = [], Encoder.__call__
    monkeypatch.setattr(
        Encoder, "__call__", lambda self, batch, **options: passes.append(batch.lengths) or call(self, batch, **options)
    )
    embeddings, sparse, tokens = engine.encode_all(texts)
    assert sum(map(len, passes)) == len({*texts})
    assert np.array_equal(embeddings.vectors, expected[0])
    for name in ("indptr", "ids"):
        assert np.array_equal(getattr(sparse, name), getattr(expected[1], name)), name
    np.testing.assert_allclose(sparse.weights, expected[1].weights, rtol=1e-4, atol=1e-6)
    assert np.array_equal(tokens.offsets, expected[2].offsets)
    np.testing.assert_allclose(tokens.vectors, expected[2].vectors, rtol=1e-4, atol=1e-6)
    assert len(embeddings) == len(tokens) == 32 and tokens.vectors.shape[1] == 24
