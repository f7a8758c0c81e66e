"""The CrossEncoder drop-in against the original, on seeded rerankers: values, types, errors, when modules run."""

import copy
import logging
import pickle
import shutil
from unittest import mock

import numpy as np
import pytest
import sentence_transformers
import torch
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from support.checkpoints import change_json, write_bert
from support.drop_in import assert_same
from support.rerankers import LENGTH, PAIRS, draw_pairs
from tokenizers.normalizers import NFKC

from unpadded.integrations.sentence_transformers import CrossEncoder

CLASSES = (CrossEncoder, sentence_transformers.CrossEncoder)
NAMES = ["bert", "bert, 3 labels", "xlm_roberta", "gte", "modernbert", "modernbert, mean", "nomic_bert"]
MANY = draw_pairs(40)
TEXTS = [document for _, document in MANY]
HALF = 2e-2


def load_both(folder, **options):
    return [cls(str(folder), device="cpu", **copy.deepcopy(options)) for cls in CLASSES]


@pytest.fixture(scope="module")
def both(rerankers):
    return load_both(rerankers["bert"])


@pytest.fixture(scope="module")
def labels(rerankers):
    return load_both(rerankers["bert, 3 labels"])


@pytest.fixture(scope="module")
def modular(rerankers):
    return load_both(rerankers["modular"])


def in_engine(model, inputs=PAIRS, **options):
    """Return whether a call runs in the engine, not in the modules."""
    with mock.patch.object(CLASSES[1], "_inference", return_value=torch.zeros(len(inputs))) as original:
        model.predict(inputs, **options)
    return not original.called


@pytest.mark.parametrize("name", [*NAMES, "saved", "modular"])
def test_predict_equals_the_original(rerankers, name):
    drop_in, original = load_both(rerankers[name])
    assert in_engine(drop_in)
    assert_same(drop_in.predict(MANY), original.predict(MANY))
    for attribute in ("num_labels", "max_seq_length", "device", "dtype", "prompts", "modalities"):
        assert getattr(drop_in, attribute) == getattr(original, attribute)
    assert type(drop_in.activation_fn) is type(original.activation_fn)
    assert drop_in.config.to_dict() == original.config.to_dict()
    assert type(drop_in.tokenizer) is type(original.tokenizer) and type(drop_in.model) is type(original.model)
    with pytest.warns(DeprecationWarning):
        assert drop_in.max_length == original.max_length == LENGTH


@pytest.mark.parametrize(
    "inputs",
    [
        MANY,
        PAIRS[0],
        list(PAIRS[0]),
        PAIRS[:1],
        tuple(PAIRS),
        np.array(PAIRS),
        np.array(PAIRS[0]),
        [],
        "tide of",
        TEXTS,
    ],
    ids=["pairs", "tuple", "list", "one pair", "tuples", "array", "one array", "none", "text", "texts"],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"activation_fn": torch.nn.Identity()},
        {"activation_fn": torch.tanh},
        {"activation_fn": lambda logits: logits[:, 0], "convert_to_tensor": True},
        {"apply_softmax": True},
        {"prompt": "query: "},
        {"batch_size": 1, "show_progress_bar": True},
        {"device": "cpu"},
    ],
    ids=", ".join,
)
@pytest.mark.parametrize("model", ["both", "labels"])
def test_inputs_and_options_equal_the_original(model, inputs, options, request):
    outcomes = []
    for one in request.getfixturevalue(model):
        try:
            outcomes.append(one.predict(inputs, **options))
        except Exception as error:
            outcomes.append((type(error), str(error)))
    assert_same(*outcomes)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"return_documents": True, "prompt": "a "}], ids=str)
def test_rank_equals_the_original(both, options):
    documents = list(dict.fromkeys(TEXTS))
    found, expected = (model.rank("tide of bread", documents, **options) for model in both)
    scores = [[one.pop("score") for one in ranking] for ranking in (found, expected)]
    assert found == expected and scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert both[0].rank("tide", []) == []


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.predict(PAIRS, batch_size=0),
        lambda model: model.predict(PAIRS, prompt_name="none"),
        lambda model: model.predict([("a", "b", "c")]),
        lambda model: model.predict([("a", 5)]),
        lambda model: model.predict(PAIRS, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12),
        lambda model: model.rank("a", ["b"], unknown=1),
    ],
)
def test_both_raise_the_same_errors(both, call, side):
    errors = []
    for model in both:
        with pytest.raises((ValueError, TypeError)) as caught:
            call(model)
        errors.append((caught.type, str(caught.value).replace("CrossEncoder", "")))
    assert errors[0] == errors[1]


def test_several_labels_cannot_be_ranked(labels):
    with pytest.raises(ValueError, match="only works for models with num_labels=1"):
        labels[0].rank("a", ["b"])


def test_prompts_of_the_model(rerankers):
    prompts = {"query": "the tide: ", "other": "7 of: "}
    drop_in, original = load_both(rerankers["bert"], prompts=prompts, default_prompt_name="other")
    for options in ({}, {"prompt_name": "query"}, {"prompt": ""}):
        assert_same(drop_in.predict(MANY, **options), original.predict(MANY, **options))
    assert in_engine(drop_in) and not np.allclose(drop_in.predict(MANY), drop_in.predict(MANY, prompt=""), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "engine"),
    [
        ({"max_length": 9}, True),
        ({"num_labels": 1}, True),
        ({"activation_fn": torch.nn.Tanh()}, True),
        ({"model_kwargs": {"attn_implementation": "eager"}}, True),
        ({"processor_kwargs": {"do_lower_case": False}}, False),
        ({"processor_kwargs": {"truncation_side": "left"}}, False),
        ({"config_kwargs": {"hidden_act": "relu"}}, False),
    ],
    ids=str,
)
def test_arguments_of_the_constructor_equal_the_original(rerankers, options, engine, caplog):
    drop_in, original = load_both(rerankers["bert"], **options)
    assert_same(drop_in.predict(MANY), original.predict(MANY))
    assert in_engine(drop_in) == engine
    assert engine or f"the engine does not support {next(iter(next(iter(options.values()))))}" in caplog.text


def decay(model):
    with torch.no_grad():
        model.model.classifier.weight.mul_(0.5)


def half_and_back(model):
    model.half().float()


@pytest.mark.parametrize(
    ("change", "engine"),
    [
        (lambda model: setattr(model, "max_seq_length", 9), True),
        (lambda model: setattr(model, "activation_fn", torch.nn.Identity()), True),
        (lambda model: model.to("cpu").share_memory(), True),
        (lambda model: model.half(), True),
        (lambda model: model.to(torch.bfloat16), True),
        (lambda model: model.model.half(), True),
        (lambda model: model.train(), True),
        (half_and_back, False),
        (decay, False),
        (lambda model: model.model.bert.encoder.layer[0].output.dense.weight.data.mul_(-1), False),
        (lambda model: model.model.load_state_dict({k: v * 0.9 for k, v in model.model.state_dict().items()}), False),
        (lambda model: setattr(model.model, "classifier", torch.nn.Linear(32, 1)), False),
        (lambda model: setattr(model.tokenizer.backend_tokenizer, "normalizer", NFKC()), False),
        (lambda model: setattr(model.tokenizer, "model_input_names", ["input_ids", "attention_mask"]), False),
        (lambda model: setattr(model.tokenizer, "truncation_side", "left"), False),
        (lambda model: model[0].processing_kwargs.update(text={"max_length": 8, "truncation": True}), False),
        (lambda model: model.model.bert.encoder.layer[1].register_forward_hook(lambda *given: given[2]), False),
    ],
)
def test_a_changed_model_equals_the_original(both, change, engine, caplog):
    models = copy.deepcopy(both)
    for model in models:
        torch.manual_seed(1)
        change(model)
    atol = 1e-5 if models[0].dtype == torch.float32 else HALF
    with caplog.at_level(logging.WARNING, "unpadded"):
        for _ in range(2):
            assert_same(*(model.predict(MANY) for model in models), atol=atol)
    assert in_engine(models[0]) == engine
    assert caplog.text.count("runs in sentence-transformers' modules") == (not engine)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model[1], "pooling_mode", "cls"),
        lambda model: setattr(model[2], "activation_function", torch.nn.ReLU()),
        lambda model: setattr(model[3].norm, "eps", 0.5),
        lambda model: model.pop(3),
    ],
)
def test_changed_modules_run(modular, change):
    models = copy.deepcopy(modular)
    assert in_engine(models[0])
    for model in models:
        change(model)
    assert not in_engine(models[0])
    assert_same(*(model.predict(MANY) for model in models))


def test_other_keywords_and_autocast_run_in_the_modules(both):
    keywords = {"processing_kwargs": {"text": {"max_length": 8, "truncation": True}}}
    assert not in_engine(both[0], **keywords)
    assert_same(*(model.predict(MANY, **keywords) for model in both))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not in_engine(both[0])
    assert in_engine(both[0])


def test_copies_run_in_engines_of_their_own(both):
    expected = both[1].predict(MANY)
    for model in (copy.deepcopy(both[0]), pickle.loads(pickle.dumps(both[0]))):
        assert in_engine(model) and model._engine is not both[0]._engine
        assert_same(model.predict(MANY), expected)


def test_a_dtype_of_the_weights(rerankers):
    drop_in, original = load_both(rerankers["bert"], model_kwargs={"torch_dtype": torch.bfloat16})
    assert drop_in.dtype == torch.bfloat16 and in_engine(drop_in)
    assert_same(drop_in.predict(MANY), original.predict(MANY), atol=HALF)
    for model in (drop_in, original):
        model.float()  # the engine would load weights that were never rounded
    assert not in_engine(drop_in)
    assert_same(drop_in.predict(MANY), original.predict(MANY))


def test_a_pool_equals_the_original(both):
    assert_same(both[0].predict(MANY, device=["cpu", "cpu"], chunk_size=16), both[1].predict(MANY))


def test_a_saved_model_is_loaded_by_both_classes(both, modular, tmp_path):
    for name, models in (("bert", both), ("modular", modular)):
        models[0].save_pretrained(str(tmp_path / name))
        assert "unpadded" not in (tmp_path / name / "modules.json").read_text()
        drop_in, original = load_both(tmp_path / name)
        assert in_engine(drop_in)
        for model in (drop_in, original):
            assert_same(model.predict(MANY), models[1].predict(MANY))


def test_training_changes_the_scores_as_in_the_original(both):
    models = copy.deepcopy(both)
    before = models[0].predict(MANY)
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(2):
            loss = model(model.preprocess(MANY))["scores"].square().mean()
            loss.backward()
            optimizer.step()
    found, expected = (model.predict(MANY) for model in models)
    assert_same(found, expected, atol=1e-4)
    assert np.abs(found - before).max() > 1e-3


def test_an_evaluator_gives_the_same_scores(both):
    samples = [
        {"query": "tide", "positive": TEXTS[i : i + 2], "negative": TEXTS[i + 2 : i + 6]} for i in range(0, 30, 6)
    ]
    evaluator = CrossEncoderRerankingEvaluator(samples, write_csv=False)
    found, expected = (evaluator(model) for model in both)
    assert found == pytest.approx(expected, abs=1e-6)


def test_unsupported_checkpoints_run_as_the_original_loads_them(rerankers, tmp_path, caplog):
    tanh = tmp_path / "tanh"
    sentence_transformers.CrossEncoder(str(rerankers["bert"]), device="cpu").save_pretrained(str(tanh))
    change_json(tanh / "config_sentence_transformers.json", activation_fn="torch.nn.modules.activation.Tanh")
    modules = [Transformer(str(write_bert(tmp_path / "bert"))), Pooling(128, "cls"), LayerNorm(128)]
    modules.append(Dense(128, 1, activation_function=torch.nn.Tanh(), module_output_name="scores"))
    sentence_transformers.CrossEncoder(modules=modules, device="cpu").save_pretrained(str(tmp_path / "other"))
    for name, reason in (("tanh", "Tanh' is not implemented"), ("bert", "has no head for scores")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "unpadded"):
            torch.manual_seed(0)
            drop_in = CrossEncoder(str(tmp_path / name), device="cpu")
        assert f"{name} runs as sentence-transformers loads it" in caplog.text and reason in caplog.text
        torch.manual_seed(0)
        assert_same(drop_in.predict(MANY), CLASSES[1](str(tmp_path / name), device="cpu").predict(MANY))
    assert_same(*(model.predict(MANY) for model in load_both(tmp_path / "other")))


def test_weights_that_the_engine_rejects(rerankers, tmp_path, caplog):
    drop_in = CrossEncoder(str(rerankers["bert"]), device="cpu")
    drop_in.save_pretrained(str(tmp_path))
    drop_in, original = load_both(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # it is mapped into memory
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with caplog.at_level(logging.WARNING, "unpadded"):
        assert_same(drop_in.predict(MANY), original.predict(MANY))
    assert "runs in sentence-transformers' modules" in caplog.text


@pytest.mark.gpu
def test_moved_to_the_gpu(both):
    drop_in, original = copy.deepcopy(both)
    assert_same(drop_in.predict(MANY, device="cuda"), original.predict(MANY), atol=1e-4)
    assert drop_in.predict(MANY, convert_to_tensor=True).device.type == "cuda"
    assert_same(drop_in.half().predict(MANY), original.predict(MANY), atol=HALF)
    assert in_engine(drop_in)


def test_code_of_a_checkpoint_is_not_run(rerankers, tmp_path):
    folder = shutil.copytree(rerankers["bert"], tmp_path / "bert")
    (folder / "code.py").write_text("raise SystemExit")
    change_json(folder / "config.json", auto_map={"AutoModelForSequenceClassification": "code.Model"})
    found = CrossEncoder(str(folder), device="cpu", trust_remote_code=True).predict(PAIRS)
    assert_same(found, load_both(rerankers["bert"])[1].predict(PAIRS))
