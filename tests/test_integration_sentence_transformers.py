"""The SentenceTransformer drop-in against the original: values and types.

Most tests use a small seeded BERT with the tokenizer of all-MiniLM-L6-v2, some its real weights.
"""

import copy
import json
import logging

import datasets
import huggingface_hub
import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm
from sentence_transformers.util import mine_hard_negatives, semantic_search
from support.checkpoints import add_sentence_transformers_files, change_json, write_bert, write_nomic
from support.drop_in import TEXTS, assert_same
from tokenizers.normalizers import NFKC
from tokenizers.processors import ByteLevel

import unpadded
from unpadded.integrations.sentence_transformers import SentenceTransformer
from unpadded.integrations.transformers import UnpaddedModel

CLASSES = (SentenceTransformer, sentence_transformers.SentenceTransformer)
TINY = {"layers": 1, "hidden": 32, "heads": 2, "intermediate": 64}
CHAT = "{% for message in messages %}{{ message['content'] }} [SEP] {% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_bert(tmp_path_factory.mktemp("bert"))
    return str(add_sentence_transformers_files(folder, max_seq_length=256))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(add_sentence_transformers_files(write_bert(tmp_path_factory.mktemp("tiny"), **TINY)))


@pytest.fixture(scope="module")
def drop_in(folder):
    return SentenceTransformer(folder, device="cpu")


@pytest.fixture(scope="module")
def original(folder):
    return sentence_transformers.SentenceTransformer(folder, device="cpu")


@pytest.fixture(scope="module")
def minilm_pair(minilm):
    return [cls(str(minilm), device="cpu") for cls in CLASSES]


@pytest.fixture(scope="module")
def paragraphs(corpus):
    return corpus[:80]


@pytest.fixture(scope="module")
def minilm_vectors(minilm_pair, paragraphs):
    """Vectors of the paragraphs by the drop-in and by the original."""
    return [model.encode(paragraphs) for model in minilm_pair]


@pytest.mark.parametrize(
    "inputs",
    [TEXTS, TEXTS[0], tuple(TEXTS[:2]), np.array(TEXTS[:3]), [], [TEXTS[0]]],
    ids=["texts", "text", "tuple", "array", "empty", "one text"],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"convert_to_numpy": False, "convert_to_tensor": True},
        {"normalize_embeddings": True},
        {"truncate_dim": 64},
        {"truncate_dim": 64, "normalize_embeddings": True},
        {"prompt": "query: "},
        {"precision": "binary"},
        {"precision": "ubinary", "convert_to_tensor": True},
        {"output_value": "token_embeddings"},
        {"output_value": None},
        {"batch_size": 1, "show_progress_bar": False},
        {"batch_size": 2, "device": "cpu"},
    ],
    ids=str,
)
def test_encode_equals_the_original(drop_in, original, inputs, options):
    assert_same(drop_in.encode(inputs, **options), original.encode(inputs, **options))


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_integer_precisions_equal_the_original_up_to_rounding(drop_in, original, paragraphs, precision):
    """A value at the border of two buckets may fall into either."""
    found, expected = (model.encode(paragraphs, precision=precision) for model in (drop_in, original))
    assert found.dtype == expected.dtype
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_vectors_of_a_real_model_equal_the_original(minilm_pair, minilm_vectors):
    found, expected = minilm_vectors
    assert (found * expected).sum(1).min() >= 0.99999
    assert_same(found, expected)
    drop_in, original = minilm_pair
    assert_same(drop_in.encode(TEXTS), original.encode(TEXTS))


def test_the_engine_computes_sentence_and_token_embeddings(drop_in, monkeypatch):
    """The forward passes of the modules do not run."""
    monkeypatch.setattr(type(drop_in[0]), "forward", None)
    assert drop_in.encode(TEXTS).shape == (len(TEXTS), 128)
    assert drop_in.encode_query(TEXTS[0]).shape == (128,)
    assert drop_in.encode(TEXTS[0], output_value="token_embeddings").shape == (8, 128)


def test_dense_modules_run_in_the_engine(tmp_path, monkeypatch):
    """With their current weights, in their dtype; a text's vector is the same in any batch."""
    folder = str(add_sentence_transformers_files(write_bert(tmp_path), dense=(128, 64)))
    drop_in, original = (cls(folder, device="cpu") for cls in CLASSES)
    for change in (
        lambda model: None,
        lambda model: model[2].linear.weight.data.mul_(-0.5),
        lambda model: setattr(model[2], "activation_function", torch.nn.Identity()),
        lambda model: setattr(model[2], "linear", torch.nn.Linear(128, 32, bias=False, dtype=model.dtype)),
        lambda model: model.to(torch.bfloat16),
    ):
        for model in (drop_in, original):
            torch.manual_seed(1)
            change(model)
        with monkeypatch.context() as patch:
            patch.setattr(type(drop_in[0]), "forward", None)
            found = drop_in.encode(TEXTS)
            assert np.array_equal(found[:1], drop_in.encode(TEXTS[:1]))
        assert_same(found, original.encode(TEXTS), atol=1e-5 if drop_in.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("model", ["drop_in", "original"])
@pytest.mark.parametrize(
    "options",
    [{"precision": "int4"}, {"batch_size": 0}, {"prompt_name": "none"}, {"unknown": 1}],
    ids=str,
)
def test_both_reject_the_same_options(model, options, request):
    with pytest.raises(ValueError):
        request.getfixturevalue(model).encode(TEXTS, **options)


def test_queries_documents_and_prompts(folder):
    """The prompts of the constructor and of the call, a default prompt, and none."""
    prompts = {"query": "search_query: ", "document": "search_document: ", "topic": "clustering: "}
    models = [cls(folder, device="cpu", prompts=prompts, default_prompt_name="topic") for cls in CLASSES]
    for call in (
        lambda model: model.encode_query(TEXTS),
        lambda model: model.encode_document(TEXTS),
        lambda model: model.encode(TEXTS),
        lambda model: model.encode(TEXTS, prompt_name="query"),
        lambda model: model.encode(TEXTS, prompt=""),
    ):
        assert_same(*map(call, models))
    assert models[0].prompts == models[1].prompts
    assert not np.allclose(models[0].encode_query(TEXTS), models[0].encode_document(TEXTS), atol=1e-2)


@pytest.mark.parametrize("options", [{}, {"convert_to_tensor": True}, {"output_value": "token_embeddings"}], ids=str)
def test_pairs_of_texts_equal_the_original(drop_in, original, options):
    """Pairs as tuples, lists and arrays, and mixed with single texts. The second text has another token type."""
    pairs = list(zip(TEXTS[:3], TEXTS[3:], strict=True))
    for inputs in (pairs, [list(pair) for pair in pairs], np.array(pairs), [*pairs, *TEXTS[:2]]):
        assert_same(drop_in.encode(inputs, **options), original.encode(inputs, **options))
    swapped = drop_in.encode([pair[::-1] for pair in pairs])
    assert np.abs(swapped - drop_in.encode(pairs)).max(1).min() > 1e-2


def test_similarity_equals_the_original(drop_in, original):
    embeddings = drop_in.encode(TEXTS)
    assert_same(drop_in.similarity(embeddings, embeddings), original.similarity(embeddings, embeddings))
    assert_same(
        drop_in.similarity_pairwise(embeddings, embeddings), original.similarity_pairwise(embeddings, embeddings)
    )
    assert drop_in.similarity_fn_name == original.similarity_fn_name == "cosine"


def test_max_seq_length_and_truncate_dim(folder, original):
    drop_in, original = SentenceTransformer(folder, device="cpu", truncate_dim=32), copy.deepcopy(original)
    assert drop_in.max_seq_length == original.max_seq_length == 256
    assert drop_in.get_embedding_dimension() == 32
    with pytest.warns(FutureWarning):
        assert drop_in.get_sentence_embedding_dimension() == 32
    with drop_in.truncate_embeddings(None):
        for length in (256, 16, 300):
            drop_in.max_seq_length = original.max_seq_length = length
            assert_same(drop_in.encode(TEXTS), original.encode(TEXTS))
    assert drop_in.encode(TEXTS).shape == (len(TEXTS), 32)
    with pytest.raises(unpadded.InputError, match="512 learned positions"):
        drop_in.max_seq_length = 1024
        drop_in.encode([TEXTS[1] * 2])


def test_tokenize_equals_the_original(drop_in, original):
    assert_same(dict(drop_in.tokenize(TEXTS)), dict(original.tokenize(TEXTS)))
    assert drop_in.tokenizer.vocab_size == original.tokenizer.vocab_size


def test_forward_of_the_modules_equals_the_original(drop_in, original):
    features = [model.forward(model.preprocess(TEXTS))["sentence_embedding"] for model in (drop_in, original)]
    assert_same(features[0], features[1].detach())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model[1], "pooling_mode", "cls"),
        lambda model: model.append(copy.deepcopy(model[2])),
        lambda model: model.pop(2),
        lambda model: setattr(model.tokenizer, "truncation_side", "left"),
        lambda model: setattr(model.tokenizer, "padding_side", "left"),
        lambda model: setattr(model.tokenizer.backend_tokenizer, "normalizer", NFKC()),
        lambda model: setattr(model.tokenizer.backend_tokenizer, "post_processor", ByteLevel(trim_offsets=False)),
        lambda model: model[0].processing_kwargs.update(text={"max_length": 8, "truncation": True}),
        lambda model: model.half(),
        lambda model: model.to(torch.bfloat16),
    ],
    ids=[
        "pooling",
        "additional module",
        "removed module",
        "truncation on the left",
        "padding on the left",
        "normalizer",
        "no special tokens",
        "processing_kwargs",
        "fp16",
        "bf16",
    ],
)
def test_a_modified_model_equals_the_original(drop_in, original, change):
    drop_in, original = copy.deepcopy(drop_in), copy.deepcopy(original)
    change(drop_in)
    change(original)
    texts = [text for text in TEXTS if text]
    reduced = drop_in.dtype != torch.float32
    assert_same(drop_in.encode(texts), original.encode(texts), atol=1e-2 if reduced else 1e-5)
    assert drop_in.dtype == original.dtype
    assert_same(
        drop_in.encode(texts, convert_to_tensor=True), original.encode(texts, convert_to_tensor=True), atol=1e-2
    )


# keywords of the tokenizer, and whether the engine runs with them
TOKENIZER_KEYWORDS = [
    ({"do_lower_case": False}, True),
    ({"strip_accents": False}, True),
    ({"tokenize_chinese_chars": False}, True),
    ({"cls_token": "[MASK]"}, True),
    ({"additional_special_tokens": ["weather"]}, True),
    ({"bos_token": "[MASK]", "add_bos_token": True}, True),
    ({"model_max_length": 7}, True),
    ({"use_fast": False}, True),
    ({"split_special_tokens": True}, False),
    ({"truncation_side": "left"}, False),
    ({"padding_side": "left"}, False),
    ({"model_input_names": ["input_ids"]}, False),
]


@pytest.mark.parametrize(
    ("name", "keywords", "in_engine"),
    [
        ("tokenizer_kwargs", {"do_lower_case": False}, True),
        *(("processor_kwargs", *case) for case in TOKENIZER_KEYWORDS),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_tokenizer_keywords_equal_the_original(tiny, name, keywords, in_engine):
    drop_in, original = (cls(tiny, device="cpu", **{name: dict(keywords)}) for cls in CLASSES)
    expected = original.encode(TEXTS)
    assert_same(drop_in.encode(TEXTS), expected)
    assert (drop_in._engine_for(TEXTS, "sentence_embedding", {}) is not None) == in_engine
    assert_same(copy.deepcopy(drop_in).encode(TEXTS), expected)


def use_cased_tokenizer(model):
    model[0].processor = transformers.AutoTokenizer.from_pretrained(
        model[0].tokenizer.name_or_path, do_lower_case=False
    )


def use_chat_template(model):
    model.tokenizer.chat_template = "{{ messages }}"  # inferred on loading only


def cut_texts(model):
    preprocess = model[0].preprocess
    model[0].preprocess = lambda inputs, **options: preprocess([text[:9] for text in inputs], **options)


@pytest.mark.parametrize(
    ("change", "in_engine"),
    [
        (use_cased_tokenizer, True),
        (use_chat_template, True),
        (lambda model: model.tokenizer.add_tokens(["[SE", "café"]), True),
        (lambda model: model.tokenizer.add_special_tokens({"cls_token": "[MASK]"}), True),
        (lambda model: setattr(model.tokenizer.backend_tokenizer.model, "max_input_chars_per_word", 4), True),
        (lambda model: setattr(model.tokenizer, "model_max_length", 9), True),
        (lambda model: setattr(model, "max_seq_length", 5), True),
        (lambda model: setattr(model.tokenizer, "pad_token", "[UNK]"), True),
        (lambda model: setattr(model.tokenizer, "split_special_tokens", True), False),
        (lambda model: setattr(model.tokenizer, "model_input_names", ["input_ids"]), False),
        (lambda model: setattr(model[0], "query_length", 4), False),
        (cut_texts, False),
    ],
)
def test_a_changed_tokenizer_equals_the_original(tiny, change, in_engine):
    drop_in, original = (cls(tiny, device="cpu") for cls in CLASSES)
    drop_in.encode(TEXTS)
    texts = [text.replace("Naïve café", "Naïve") for text in TEXTS]  # "café" would have no embedding
    for model in (drop_in, original):
        change(model)
    assert_same(drop_in.encode(texts), original.encode(texts))
    assert (drop_in._engine_for(texts, "sentence_embedding", {}) is not None) == in_engine


@pytest.mark.parametrize(
    ("modules", "settings", "in_engine"),
    [
        (True, {"chat_template": CHAT}, True),
        (False, {"chat_template": CHAT}, False),
        (True, {"truncation_side": "left"}, False),
    ],
)
def test_tokenizer_settings_of_the_checkpoint_equal_the_original(tmp_path, modules, settings, in_engine):
    write_bert(tmp_path, **TINY)
    if modules:
        add_sentence_transformers_files(tmp_path, max_seq_length=16)
    change_json(tmp_path / "tokenizer_config.json", **settings)
    drop_in, original = (cls(str(tmp_path), device="cpu") for cls in CLASSES)
    assert_same(drop_in.encode(TEXTS), original.encode(TEXTS))
    assert (drop_in._engine_for(TEXTS, "sentence_embedding", {}) is not None) == in_engine


@pytest.mark.parametrize(
    "files", [{"pooling": "cls"}, {"pooling": "lasttoken", "normalize": False}, {"dense": (128, 64)}, None]
)
@pytest.mark.parametrize(
    "write", [write_bert, lambda folder: write_nomic(folder, names="transformers")], ids=["bert", "nomic"]
)
def test_other_modules_equal_the_original(tmp_path, write, files):
    folder = str(write(tmp_path))
    if files is not None:
        add_sentence_transformers_files(tmp_path, **files)
    drop_in, original = (cls(folder, device="cpu") for cls in CLASSES)
    assert [type(module).__name__ for module in drop_in] == [type(module).__name__ for module in original]
    assert_same(drop_in.encode(TEXTS), original.encode(TEXTS))


def test_a_legacy_checkpoint_needs_no_remote_code(tmp_path):
    """As on its model card, and beyond the trained length."""
    folder = add_sentence_transformers_files(write_nomic(tmp_path / "legacy", trained_length=64))
    plain = add_sentence_transformers_files(write_nomic(tmp_path / "plain", names="transformers", trained_length=64))
    drop_in = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    sentences = ["search_query: What is TSNE?", "search_query: Who is Laurens van der Maaten?", TEXTS[1]]
    original = sentence_transformers.SentenceTransformer(str(plain), device="cpu")
    original.max_seq_length = drop_in.max_seq_length
    assert drop_in.max_seq_length == 8192
    assert_same(drop_in.encode(sentences), original.encode(sentences))
    for keywords in ("model_kwargs", "config_kwargs"):
        scaled = SentenceTransformer(str(folder), device="cpu", **{keywords: {"rotary_scaling_factor": 2}})
        cosines = (scaled.encode(sentences) * drop_in.encode(sentences)).sum(1)
        assert cosines[0] > 0.999999 > 0.9999 > cosines[2]


def test_dtype_and_unsupported_arguments(folder):
    model = SentenceTransformer(folder, device="cpu", model_kwargs={"torch_dtype": torch.bfloat16})
    assert model.dtype == torch.bfloat16 and model.encode(TEXTS).dtype == np.float32
    with pytest.raises(unpadded.OptionError, match="onnx"):
        SentenceTransformer(folder, backend="onnx")
    with pytest.raises(unpadded.OptionError, match="load_in_8bit"):
        SentenceTransformer(folder, model_kwargs={"load_in_8bit": True})


def test_a_saved_model_is_loaded_by_both_classes(drop_in, tmp_path):
    drop_in.save(str(tmp_path))
    assert {module["type"].partition(".")[0] for module in json.loads((tmp_path / "modules.json").read_text())} == {
        "sentence_transformers"
    }
    expected = drop_in.encode(TEXTS)
    assert np.array_equal(SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS), expected)
    again = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert_same(again.encode(TEXTS), expected)


def test_evaluators_give_the_same_scores(drop_in, original, paragraphs):
    queries = {str(i): text[: len(text) // 2] for i, text in enumerate(paragraphs[:10])}
    corpus = {str(i): text for i, text in enumerate(paragraphs[:40])}
    relevant = {key: {key} for key in queries}
    retrieval = InformationRetrievalEvaluator(queries, corpus, relevant, write_csv=False)
    scores = [float(i % 5) / 4 for i in range(20)]
    similarity = EmbeddingSimilarityEvaluator(paragraphs[:20], paragraphs[20:40], scores, write_csv=False)
    for evaluator in (retrieval, similarity):
        found, expected = evaluator(drop_in), evaluator(original)
        assert found.keys() == expected.keys()
        assert max(abs(found[key] - expected[key]) for key in found) <= 1e-5


def test_semantic_search_finds_the_same(minilm_vectors):
    found, expected = (
        [[hit["corpus_id"] for hit in hits] for hits in semantic_search(vectors[:10], vectors, top_k=3)]
        for vectors in minilm_vectors
    )
    assert found == expected


def test_hard_negative_mining_finds_the_same(drop_in, original, paragraphs):
    pairs = datasets.Dataset.from_dict({"query": [text[:60] for text in paragraphs[:20]], "answer": paragraphs[:20]})
    found, expected = (
        mine_hard_negatives(pairs, model, corpus=paragraphs[:40], num_negatives=2, verbose=False).to_dict()
        for model in (drop_in, original)
    )
    assert found == expected and len(found["negative"]) == 40


def test_modules_with_hooks_run(drop_in):
    seen = []
    handle = drop_in[1].register_forward_hook(lambda module, given, output: seen.append(output["sentence_embedding"]))
    try:
        found = drop_in.encode(TEXTS[:1])
    finally:
        handle.remove()
    assert len(seen) == 1 and np.abs(drop_in.encode(TEXTS[:1]) - found).max() <= 1e-6


def test_unsupported_modules_run_as_the_original_loads_them(tmp_path, caplog):
    """The vectors are the same, and the log has the reason."""
    model = sentence_transformers.SentenceTransformer(str(write_bert(tmp_path / "bert")), device="cpu")
    model.append(Dropout())
    model.save(str(tmp_path / "other"))
    with caplog.at_level(logging.WARNING, "unpadded"):
        drop_in = SentenceTransformer(str(tmp_path / "other"), device="cpu")
    assert "other runs as sentence-transformers loads it" in caplog.text and "Dropout" in caplog.text
    assert_same(drop_in.encode(TEXTS), model.encode(TEXTS))


def test_a_layer_norm_after_the_pooling(tmp_path):
    model = sentence_transformers.SentenceTransformer(str(write_bert(tmp_path / "bert")), device="cpu")
    model.append(LayerNorm(128))
    torch.nn.init.normal_(model[-1].norm.weight)
    model.save(str(tmp_path / "normed"))
    expected = model.encode(TEXTS)
    for loaded in (SentenceTransformer(str(tmp_path / "normed"), device="cpu"), unpadded.load(tmp_path / "normed")):
        assert_same(loaded.encode(TEXTS), expected)


def test_training_mode_raises(drop_in):
    model = copy.deepcopy(drop_in)
    model.train()
    with pytest.raises(unpadded.OptionError, match="training mode"):
        model(model.preprocess(TEXTS))


def test_a_hub_id_is_loaded_from_the_cache(folder, tmp_path, monkeypatch):
    """Offline, with the arguments of both libraries for the cache."""
    repository, commit = tmp_path / "models--owner--tiny", "0123456789abcdef0123456789abcdef01234567"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).symlink_to(folder)
    model = SentenceTransformer("owner/tiny", cache_folder=str(tmp_path), local_files_only=True, device="cpu")
    assert model.encode(TEXTS[0]).shape == (128,)
    with pytest.raises(unpadded.CheckpointError, match="owner/none"):
        SentenceTransformer("owner/none", cache_folder=str(tmp_path), local_files_only=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", commit):
        model = SentenceTransformer("owner/tiny", cache_folder=str(tmp_path), revision=revision, device="cpu")
        assert isinstance(model[0].model, UnpaddedModel)
    alone = UnpaddedModel.from_pretrained("owner/tiny", cache_dir=str(tmp_path), local_files_only=True)
    assert alone.config.hidden_size == 128


def test_another_pooling_shares_the_encoder(tiny, cuda):
    """And thus its lock and stream, which order the passes of both runners."""
    model = SentenceTransformer(tiny, device="cpu")
    moved = copy.deepcopy(model).to(cuda)
    before = moved[0].model.engine._pipeline.runner
    for one in (model, moved):
        one[1].pooling_mode = "cls"
    assert_same(moved.encode("A text."), model.encode("A text."), atol=1e-4)
    after = moved[0].model.engine._pipeline.runner
    assert after is not before and after.encoder is before.encoder


@pytest.mark.gpu
def test_moved_to_the_gpu(drop_in, original):
    model = copy.deepcopy(drop_in).to("cuda")
    assert_same(model.encode(TEXTS), original.encode(TEXTS), atol=1e-4)
    assert model.encode(TEXTS, convert_to_tensor=True).device.type == "cuda"
    assert np.abs(model.half().encode(TEXTS) - original.encode(TEXTS)).max() <= 1e-2
    assert_same(model.float().encode(TEXTS, device="cpu"), original.encode(TEXTS), atol=1e-2)
