"""Scores of pairs: the values of sentence-transformers, the same bits in any batch, and clear errors."""

import asyncio
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from support.checkpoints import change_json
from support.rerankers import PAIRS, draw_pairs
from tokenizers import Encoding
from transformers import AutoTokenizer

import unpadded
from unpadded.errors import InputError, OptionError
from unpadded.model.layer import HeadLayer
from unpadded_kernels import linear


@pytest.fixture(scope="module")
def engine(rerankers: dict[str, Path]) -> unpadded.Engine:
    return unpadded.load(rerankers["bert"], device="cpu", token_budget=256)


NAMES = ["bert", "bert, 3 labels", "xlm_roberta", "gte", "modernbert", "modernbert, mean", "nomic_bert"]


@pytest.mark.parametrize("name", [*NAMES, "saved", "modular"])
def test_scores_equal_those_of_sentence_transformers(name: str, rerankers: dict[str, Path]) -> None:
    pairs = draw_pairs(60)
    engine, reference = unpadded.load(rerankers[name], device="cpu"), CrossEncoder(str(rerankers[name]), device="cpu")
    expected = reference.predict(pairs, activation_fn=torch.nn.Identity())
    logits = engine.score(pairs, activation="none")
    assert logits.dtype == np.float32 and logits.shape == expected.shape
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.array_equal(np.argsort(logits, axis=0, kind="stable"), np.argsort(expected, axis=0, kind="stable"))
    assert np.abs(engine.score(pairs) - reference.predict(pairs)).max() <= 1e-5 * np.abs(expected).max()
    for text in ("tide of bread", ""):
        assert np.abs(engine.score([text])[0] - reference.predict(text)).max() <= 1e-5 * np.abs(expected).max()
    alone = np.concatenate([engine.score([pair], activation="none") for pair in pairs])
    assert np.array_equal(alone, logits)


@pytest.mark.parametrize("length", [5, 6, 7, 17, 48])
def test_pairs_are_truncated_as_transformers_does(length: int, rerankers: dict[str, Path]) -> None:
    engine, tokenizer = unpadded.load(rerankers["bert"], device="cpu"), AutoTokenizer.from_pretrained(rerankers["bert"])
    counts = itertools.product((0, 1, 7, 8, 60), (0, 8, 9, 61))
    pairs = [(" ".join(["tide"] * first), " ".join(["of"] * second)) for first, second in counts]
    found = engine.tokenizer.encode_pairs(pairs, range(len(pairs)), length, "right", True)
    sides = [list(side) for side in zip(*pairs, strict=True)]
    expected = tokenizer(*sides, truncation="longest_first", max_length=length)
    for row, ids, types in zip(found, expected["input_ids"], expected["token_type_ids"], strict=True):
        assert row.ids.tolist() == [~id_ if kind else id_ for id_, kind in zip(ids, types, strict=True)]
    assert [not row.truncated for row in found] == [len(ids) <= length for ids in tokenizer(*sides)["input_ids"]]


def test_a_repeated_text_is_tokenized_once(engine: unpadded.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenized: list[str] = []
    encode = engine.tokenizer._encodings

    def record(texts: Iterable[str]) -> Iterator[Encoding]:
        tokenized.extend(texts := list(texts))
        return encode(texts)

    monkeypatch.setattr(engine.tokenizer, "_encodings", record)
    engine.rank("tide", ["bread", "window", "tide", "bread"])
    assert sorted(tokenized) == ["bread", "tide", "window"]


def test_rank_returns_the_best_first(engine: unpadded.Engine, rerankers: dict[str, Path]) -> None:
    documents = [document for _, document in draw_pairs(30)]
    found = engine.rank("tide of bread", documents)
    reference = CrossEncoder(str(rerankers["bert"]), device="cpu").rank("tide of bread", documents)
    assert [one.index for one in found] == [one["corpus_id"] for one in reference]
    scores = [one.score for one in found]
    assert scores == sorted(scores, reverse=True) and np.allclose(
        scores, [one["score"] for one in reference], atol=1e-6
    )
    assert engine.rank("tide of bread", documents, top_k=3) == found[:3]
    assert [one.index for one in engine.rank("a", ["b", "c", "b", "b"]) if one.index != 1] == [0, 2, 3]
    assert engine.rank("a", []) == []


def test_activations(rerankers: dict[str, Path], engine: unpadded.Engine) -> None:
    several = unpadded.load(rerankers["bert, 3 labels"], device="cpu")
    logits = torch.from_numpy(several.score(PAIRS, activation="none"))
    assert np.array_equal(several.score(PAIRS), logits.numpy())
    assert np.allclose(several.score(PAIRS, activation="softmax"), logits.softmax(1), atol=1e-7)
    logits = torch.from_numpy(engine.score(PAIRS, activation="none"))
    assert np.allclose(engine.score(PAIRS), logits.sigmoid(), atol=1e-7)
    with pytest.raises(OptionError, match="3 scores per pair"):
        several.rank("a", ["b"])


@pytest.mark.parametrize("place", ["config.json", "sentence_transformers", "sbert_ce_default_activation_function"])
def test_the_checkpoint_states_the_activation(place: str, rerankers: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in rerankers["bert"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name, key in (("Identity", "linear"), ("Sigmoid", "activation"), ("Tanh", "activation")):
        path = f"torch.nn.modules.{key}.{name}"
        if place == "sentence_transformers":
            change_json(folder / "config.json", sentence_transformers={"activation_fn": path})
        elif place == "config.json":
            (folder / "config_sentence_transformers.json").write_text(
                json.dumps({"activation_fn": path, "model_type": "CrossEncoder"})
            )
            kind = "sentence_transformers.base.modules.transformer.Transformer"
            modules = [{"idx": 0, "name": "0", "type": kind, "path": ""}]
            (folder / "modules.json").write_text(json.dumps(modules))
            config = {"transformer_task": "sequence-classification", "module_output_name": "scores"}
            modality = {"text": {"method": "forward", "method_output_name": "logits"}}
            (folder / "sentence_bert_config.json").write_text(json.dumps({**config, "modality_config": modality}))
        else:
            change_json(folder / "config.json", sbert_ce_default_activation_function=path)
        if name == "Tanh":
            with pytest.raises(unpadded.ConfigError, match=r"activation_fn = '.*Tanh' is not implemented"):
                unpadded.load(folder, device="cpu")
        else:
            expected = CrossEncoder(str(folder), device="cpu").predict(PAIRS)
            assert np.abs(unpadded.load(folder, device="cpu").score(PAIRS) - expected).max() <= 1e-6


def test_a_prompt_precedes_the_first_text(engine: unpadded.Engine, rerankers: dict[str, Path]) -> None:
    reference = CrossEncoder(str(rerankers["bert"]), device="cpu").predict(PAIRS, prompt="query: ")
    assert np.abs(engine.score(PAIRS, prompt="query: ") - reference).max() <= 1e-6


def test_ascore_equals_score_in_shared_batches(engine: unpadded.Engine) -> None:
    pairs = draw_pairs(20)

    async def calls() -> list[np.ndarray]:
        vectors = asyncio.gather(*(engine.aencode(list(pair)) for pair in pairs))
        return [*await asyncio.gather(*(engine.ascore([pair]) for pair in pairs)), *await vectors]

    results = asyncio.run(calls())
    assert np.array_equal(np.concatenate(results[:20]), engine.score(pairs))
    assert all(np.array_equal(row, engine.encode(list(pair))) for row, pair in zip(results[20:], pairs, strict=True))


def test_several_devices(engine: unpadded.Engine, rerankers: dict[str, Path]) -> None:
    pairs = draw_pairs(40)
    with unpadded.load(rerankers["bert"], device="cpu,cpu", token_budget=256) as two:
        assert np.array_equal(two.score(pairs), engine.score(pairs))
        assert np.array_equal(asyncio.run(two.ascore(pairs)), engine.score(pairs))


def test_bf16(engine: unpadded.Engine, rerankers: dict[str, Path]) -> None:
    found = unpadded.load(rerankers["bert"], device="cpu", dtype="bfloat16").score(PAIRS, activation="none")
    assert np.abs(found - engine.score(PAIRS, activation="none")).max() <= 0.03 * np.abs(found).max()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("a", "b"), ("a",)], "pair 1 is not a pair of strings: .*; pass"),
        ([("a", "b", "c")], "pair 0 is not a pair"),
        ([("a", 5)], "pair 0 is not a pair of strings: .*5"),
        ([[1, 2]], "pair 0 is not a pair of strings: .*1, 2"),
        ([("a", "\ud800")], "text 0 contains a lone surrogate"),
        ({"a": "b"}, "texts are not a sequence: dict"),
    ],
)
def test_bad_pairs_raise(pairs: object, message: str, engine: unpadded.Engine) -> None:
    with pytest.raises(InputError, match=message):
        engine.score(pairs)  # type: ignore[arg-type]


def test_bad_options_raise(engine: unpadded.Engine, minilm: Path) -> None:
    with pytest.raises(OptionError, match="activation is unknown: 'tanh'"):
        engine.score(PAIRS, activation="tanh")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="pair 1 is too long: more than 48 tokens"):
        engine.score([PAIRS[0], ("tide " * 30, "of " * 30)], truncation="error")
    with pytest.raises(OptionError, match="has no head for scores"):
        unpadded.load(minilm, device="cpu").score(PAIRS)


def test_no_pairs(engine: unpadded.Engine) -> None:
    assert engine.score([]).shape == (0,)


def test_a_classifier_that_is_absent_raises(rerankers: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in rerankers["bert"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(unpadded.WeightsError, match=r"missing: classifier\.bias"):
        unpadded.load(tmp_path, device="cpu")


@pytest.mark.parametrize("activation", ["tanh", "gelu", "relu"])
def test_bits_of_a_head_layer_do_not_depend_on_the_number_of_rows(activation: str) -> None:
    torch.manual_seed(0)
    layer, rows = HeadLayer(torch.randn(5, 32), torch.randn(5), activation), torch.randn(40, 32)
    together = layer(rows, linear)
    assert all(torch.equal(layer(rows[:count], linear), together[:count]) for count in range(1, 40))
