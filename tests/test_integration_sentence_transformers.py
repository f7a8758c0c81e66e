"""Our SentenceTransformer beside theirs, on all-MiniLM-L6-v2's real weights and on seeded models: values and types."""

import copy
import json
import logging
import pydoc_data.topics

import datasets
import huggingface_hub
import numpy as np
import pytest
import sentence_transformers
import torch
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.sentence_transformer.modules import LayerNorm
from sentence_transformers.util import mine_hard_negatives, semantic_search
from support.checkpoints import MINILM, add_sentence_transformers_files, write_bert, write_nomic
from tokenizers.normalizers import NFKC
from tokenizers.processors import ByteLevel

import unpadded
from unpadded.integrations.sentence_transformers import SentenceTransformer
from unpadded.integrations.transformers import UnpaddedModel

TEXTS = [
    "The weather is lovely today.",
    "He drove to the stadium, " * 60,
    "",
    "It's so sunny outside!",
    "Naïve café, ÅNGSTRÖM 東京",
    "[SEP] [CLS] [MASK] \x00 \u200b",
]


@pytest.fixture(scope="module")
def ours():
    return SentenceTransformer(str(MINILM), device="cpu")


@pytest.fixture(scope="module")
def theirs():
    return sentence_transformers.SentenceTransformer(str(MINILM), device="cpu")


@pytest.fixture(scope="module")
def paragraphs():
    blocks = (" ".join(block.split()) for topic in pydoc_data.topics.topics.values() for block in topic.split("\n\n"))
    return [block for block in blocks if len(block) >= 40][:80]


def assert_same(actual, expected, atol=1e-5):
    """The same types and shapes all the way down, and values within atol."""
    assert type(actual) is type(expected)
    if isinstance(expected, list):
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other, atol)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, other in expected.items():
            if key == "token_embeddings":  # ours are zero at padding
                kept = expected["attention_mask"].bool()
                assert_same(actual[key][kept], other[kept], atol)
            else:
                assert_same(actual[key], other, atol)
    elif isinstance(expected, np.ndarray | np.generic | torch.Tensor):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        actual, expected = (torch.as_tensor(value).double() for value in (actual, expected))
        assert not actual.numel() or (actual - expected).abs().max() <= atol
    else:
        assert actual == expected


@pytest.mark.parametrize("inputs", [TEXTS, TEXTS[0], tuple(TEXTS[:2]), np.array(TEXTS[:3]), [], [TEXTS[0]]], ids=repr)
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
def test_encode_gives_what_theirs_gives(ours, theirs, inputs, options):
    assert_same(ours.encode(inputs, **options), theirs.encode(inputs, **options))


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_integer_precisions_are_theirs_but_for_rounding(ours, theirs, paragraphs, precision):
    """A value at the border of two buckets may fall to either side."""
    ours, theirs = (model.encode(paragraphs, precision=precision) for model in (ours, theirs))
    assert ours.dtype == theirs.dtype
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_paragraphs_have_the_same_vectors(ours, theirs, paragraphs):
    cosines = (ours.encode(paragraphs) * theirs.encode(paragraphs)).sum(1)
    assert cosines.min() >= 0.99999


def test_the_engine_does_the_work(ours, monkeypatch):
    """Sentence embeddings of texts do not pass through the modules, nor do those of tokens."""
    monkeypatch.setattr(type(ours[0]), "forward", None)
    assert ours.encode(TEXTS).shape == (len(TEXTS), 384)
    assert ours.encode_query(TEXTS[0]).shape == (384,)
    assert ours.encode(TEXTS[0], output_value="token_embeddings").shape == (8, 384)


def test_dense_modules_run_in_the_engine(tmp_path, monkeypatch):
    """With the weights that they have at this moment, in their dtype, for a text the same in any batch."""
    folder = str(add_sentence_transformers_files(write_bert(tmp_path), dense=(128, 64)))
    ours, theirs = (
        kind(folder, device="cpu") for kind in (SentenceTransformer, sentence_transformers.SentenceTransformer)
    )
    for change in (
        lambda model: None,
        lambda model: model[2].linear.weight.data.mul_(-0.5),
        lambda model: setattr(model[2], "activation_function", torch.nn.Identity()),
        lambda model: setattr(model[2], "linear", torch.nn.Linear(128, 32, bias=False, dtype=model.dtype)),
        lambda model: model.to(torch.bfloat16),
    ):
        for model in (ours, theirs):
            torch.manual_seed(1)
            change(model)
        with monkeypatch.context() as patch:
            patch.setattr(type(ours[0]), "forward", None)
            found = ours.encode(TEXTS)
            assert np.array_equal(found[:1], ours.encode(TEXTS[:1]))
        assert_same(found, theirs.encode(TEXTS), atol=1e-5 if ours.dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("model", ["ours", "theirs"])
@pytest.mark.parametrize(
    "options",
    [{"precision": "int4"}, {"batch_size": 0}, {"prompt_name": "none"}, {"unknown": 1}],
    ids=str,
)
def test_the_same_is_refused(model, options, request):
    with pytest.raises(ValueError):
        request.getfixturevalue(model).encode(TEXTS, **options)


def test_queries_documents_and_prompts():
    """The prompts of the checkpoint, of the constructor and of the call, a default one, and none."""
    prompts = {"query": "search_query: ", "document": "search_document: ", "topic": "clustering: "}
    models = [
        kind(str(MINILM), device="cpu", prompts=prompts, default_prompt_name="topic")
        for kind in (SentenceTransformer, sentence_transformers.SentenceTransformer)
    ]
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
def test_pairs_of_texts(ours, theirs, options):
    """The second of a pair has another token type: as tuples, as lists, as an array and mixed with texts alone."""
    pairs = list(zip(TEXTS[:3], TEXTS[3:], strict=True))
    for inputs in (pairs, [list(pair) for pair in pairs], np.array(pairs), [*pairs, *TEXTS[:2]]):
        assert_same(ours.encode(inputs, **options), theirs.encode(inputs, **options))
    swapped = ours.encode([pair[::-1] for pair in pairs])
    assert np.abs(swapped - ours.encode(pairs)).max(1).min() > 1e-2


def test_similarity(ours, theirs):
    embeddings = ours.encode(TEXTS)
    assert_same(ours.similarity(embeddings, embeddings), theirs.similarity(embeddings, embeddings))
    assert_same(ours.similarity_pairwise(embeddings, embeddings), theirs.similarity_pairwise(embeddings, embeddings))
    assert ours.similarity_fn_name == theirs.similarity_fn_name == "cosine"


def test_lengths_and_dimensions(theirs):
    ours, theirs = SentenceTransformer(str(MINILM), device="cpu", truncate_dim=32), copy.deepcopy(theirs)
    assert ours.max_seq_length == theirs.max_seq_length == 256
    assert ours.get_embedding_dimension() == 32
    with pytest.warns(FutureWarning):
        assert ours.get_sentence_embedding_dimension() == 32
    with ours.truncate_embeddings(None):
        for length in (256, 16, 300):
            ours.max_seq_length = theirs.max_seq_length = length
            assert_same(ours.encode(TEXTS), theirs.encode(TEXTS))
    assert ours.encode(TEXTS).shape == (len(TEXTS), 32)
    with pytest.raises(unpadded.InputError, match="512 learned positions"):
        ours.max_seq_length = 1024
        ours.encode([TEXTS[1] * 2])


def test_tokenize(ours, theirs):
    assert_same(dict(ours.tokenize(TEXTS)), dict(theirs.tokenize(TEXTS)))
    assert ours.tokenizer.vocab_size == theirs.tokenizer.vocab_size


def test_forward_of_the_modules(ours, theirs):
    features = [model.forward(model.preprocess(TEXTS))["sentence_embedding"] for model in (ours, theirs)]
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
        "one module more",
        "one module less",
        "cut on the left",
        "pad on the left",
        "case kept",
        "no special tokens",
        "cut",
        "fp16",
        "bf16",
    ],
)
def test_a_changed_model_gives_what_theirs_gives(ours, theirs, change):
    ours, theirs = copy.deepcopy(ours), copy.deepcopy(theirs)
    change(ours)
    change(theirs)
    # BERT padded on the left has other positions, in theirs too
    texts = [text for text in TEXTS if text] if ours.tokenizer.padding_side == "right" else [TEXTS[0]]
    reduced = ours.dtype != torch.float32
    assert_same(ours.encode(texts), theirs.encode(texts), atol=1e-2 if reduced else 1e-5)
    assert ours.dtype == theirs.dtype
    assert_same(ours.encode(texts, convert_to_tensor=True), theirs.encode(texts, convert_to_tensor=True), atol=1e-2)


@pytest.mark.parametrize(
    "files", [{"pooling": "cls"}, {"pooling": "lasttoken", "normalize": False}, {"dense": (128, 64)}, None]
)
@pytest.mark.parametrize(
    "write", [write_bert, lambda folder: write_nomic(folder, names="transformers")], ids=["bert", "nomic"]
)
def test_other_pipelines(tmp_path, write, files):
    folder = str(write(tmp_path))
    if files is not None:
        add_sentence_transformers_files(tmp_path, **files)
    ours, theirs = (
        kind(folder, device="cpu") for kind in (SentenceTransformer, sentence_transformers.SentenceTransformer)
    )
    assert [type(module).__name__ for module in ours] == [type(module).__name__ for module in theirs]
    assert_same(ours.encode(TEXTS), theirs.encode(TEXTS))


def test_a_legacy_checkpoint_needs_no_remote_code(tmp_path, caplog):
    """As the model card has it, past the trained length too."""
    folder = add_sentence_transformers_files(write_nomic(tmp_path / "legacy", trained_length=64))
    plain = add_sentence_transformers_files(write_nomic(tmp_path / "plain", names="transformers", trained_length=64))
    with caplog.at_level(logging.INFO, "unpadded"):
        ours = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    assert "no code of a checkpoint is ever run" in caplog.text
    sentences = ["search_query: What is TSNE?", "search_query: Who is Laurens van der Maaten?", TEXTS[1]]
    theirs = sentence_transformers.SentenceTransformer(str(plain), device="cpu")
    theirs.max_seq_length = ours.max_seq_length
    assert ours.max_seq_length == 8192
    assert_same(ours.encode(sentences), theirs.encode(sentences))
    for keywords in ("model_kwargs", "config_kwargs"):
        scaled = SentenceTransformer(str(folder), device="cpu", **{keywords: {"rotary_scaling_factor": 2}})
        cosines = (scaled.encode(sentences) * ours.encode(sentences)).sum(1)
        assert cosines[0] > 0.999999 > 0.9999 > cosines[2]


def test_dtype_and_refusals():
    model = SentenceTransformer(str(MINILM), device="cpu", model_kwargs={"torch_dtype": torch.bfloat16})
    assert model.dtype == torch.bfloat16 and model.encode(TEXTS).dtype == np.float32
    with pytest.raises(unpadded.OptionError, match="onnx"):
        SentenceTransformer(str(MINILM), backend="onnx")
    with pytest.raises(unpadded.OptionError, match="load_in_8bit"):
        SentenceTransformer(str(MINILM), model_kwargs={"load_in_8bit": True})


def test_saved_and_loaded_by_both(ours, tmp_path):
    ours.save(str(tmp_path))
    assert {module["type"].partition(".")[0] for module in json.loads((tmp_path / "modules.json").read_text())} == {
        "sentence_transformers"
    }
    expected = ours.encode(TEXTS)
    assert np.array_equal(SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS), expected)
    again = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert_same(again.encode(TEXTS), expected)


def test_their_evaluators(ours, theirs, paragraphs):
    queries = {str(i): text[: len(text) // 2] for i, text in enumerate(paragraphs[:10])}
    corpus = {str(i): text for i, text in enumerate(paragraphs[:40])}
    relevant = {key: {key} for key in queries}
    retrieval = InformationRetrievalEvaluator(queries, corpus, relevant, write_csv=False)
    scores = [float(i % 5) / 4 for i in range(20)]
    similarity = EmbeddingSimilarityEvaluator(paragraphs[:20], paragraphs[20:40], scores, write_csv=False)
    for evaluator in (retrieval, similarity):
        found, expected = evaluator(ours), evaluator(theirs)
        assert found.keys() == expected.keys()
        assert max(abs(found[key] - expected[key]) for key in found) <= 1e-5


def test_their_search(ours, theirs, paragraphs):
    found, expected = (
        semantic_search(
            model.encode(paragraphs[:10], convert_to_tensor=True),
            model.encode(paragraphs, convert_to_tensor=True),
            top_k=3,
        )
        for model in (ours, theirs)
    )
    assert [[hit["corpus_id"] for hit in hits] for hits in found] == [
        [hit["corpus_id"] for hit in hits] for hits in expected
    ]


def test_their_mining_of_hard_negatives(ours, theirs, paragraphs):
    pairs = datasets.Dataset.from_dict({"query": [text[:60] for text in paragraphs[:20]], "answer": paragraphs[:20]})
    found, expected = (
        mine_hard_negatives(pairs, model, corpus=paragraphs[:40], num_negatives=2, verbose=False).to_dict()
        for model in (ours, theirs)
    )
    assert found == expected and len(found["negative"]) == 40


def test_hooks_see_the_modules_run(ours):
    seen = []
    handle = ours[1].register_forward_hook(lambda module, given, output: seen.append(output["sentence_embedding"]))
    try:
        found = ours.encode(TEXTS[:1])
    finally:
        handle.remove()
    assert len(seen) == 1 and np.abs(ours.encode(TEXTS[:1]) - found).max() <= 1e-6


def test_what_the_engine_has_no_modules_for_runs_as_theirs(tmp_path, caplog):
    """Another kind of module, another architecture: the same vectors, and a warning that says why."""
    model = sentence_transformers.SentenceTransformer(str(write_bert(tmp_path / "bert")), device="cpu")
    model.append(LayerNorm(128))
    model.save(str(tmp_path / "normed"))
    with caplog.at_level(logging.WARNING, "unpadded"):
        ours = SentenceTransformer(str(tmp_path / "normed"), device="cpu")
    assert "normed runs as sentence-transformers loads it" in caplog.text and "LayerNorm" in caplog.text
    assert_same(ours.encode(TEXTS), model.encode(TEXTS))


def test_training_is_refused(ours):
    model = copy.deepcopy(ours)
    model.train()
    with pytest.raises(unpadded.OptionError, match="training mode"):
        model(model.preprocess(TEXTS))


def test_a_hub_id_is_found_in_the_cache(tmp_path, monkeypatch):
    """With the words of both libraries for where it is; offline."""
    repository, commit = tmp_path / "models--owner--tiny", "0123456789abcdef0123456789abcdef01234567"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).symlink_to(MINILM)
    model = SentenceTransformer("owner/tiny", cache_folder=str(tmp_path), local_files_only=True, device="cpu")
    assert model.encode(TEXTS[0]).shape == (384,)
    with pytest.raises(unpadded.CheckpointError, match="owner/none"):
        SentenceTransformer("owner/none", cache_folder=str(tmp_path), local_files_only=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", commit):
        model = SentenceTransformer("owner/tiny", cache_folder=str(tmp_path), revision=revision, device="cpu")
        assert isinstance(model[0].model, UnpaddedModel)
    alone = UnpaddedModel.from_pretrained("owner/tiny", cache_dir=str(tmp_path), local_files_only=True)
    assert alone.config.hidden_size == 384


@pytest.mark.gpu
def test_moved_to_the_gpu(ours, theirs):
    model = copy.deepcopy(ours).to("cuda")
    assert_same(model.encode(TEXTS), theirs.encode(TEXTS), atol=1e-4)
    assert model.encode(TEXTS, convert_to_tensor=True).device.type == "cuda"
    assert np.abs(model.half().encode(TEXTS) - theirs.encode(TEXTS)).max() <= 1e-2
    assert_same(model.float().encode(TEXTS, device="cpu"), theirs.encode(TEXTS), atol=1e-2)
