"""Lists of devices in sentence-transformers' process pools: the SentenceTransformer drop-in against the original.

The drop-in uses these pools because their processes share the model's current memory, with casts and modified modules.
"""

import copy
import itertools
import json

import numpy as np
import pytest
import sentence_transformers
import torch
from support.checkpoints import MINILM, add_sentence_transformers_files, write_bert, write_checkpoint, write_json
from support.drop_in import TEXTS, assert_same
from test_family_jina_v3 import SMALL, model_of, published_names, with_adapters
from test_family_xlm_roberta import write_tokenizer

from unpadded.integrations.sentence_transformers import SentenceTransformer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:multiprocessing")]

CONVERSIONS = (
    {},
    {"convert_to_tensor": True},
    {"convert_to_numpy": False},
    {"convert_to_numpy": False, "convert_to_tensor": True},
)
CUT = {"normalize_embeddings": True, "truncate_dim": 64, "prompt": "query: "}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The drop-in and the original."""
    folder = write_bert(tmp_path_factory.mktemp("bert"))
    add_sentence_transformers_files(folder, max_seq_length=256)
    return [cls(str(folder), device="cpu") for cls in (SentenceTransformer, sentence_transformers.SentenceTransformer)]


@pytest.fixture(scope="module")
def pools(models):
    pools = [
        model.start_multi_process_pool(["cpu"] * processes) for model, processes in zip(models, (2, 1), strict=True)
    ]
    yield pools
    for model, pool in zip(models, pools, strict=True):
        model.stop_multi_process_pool(pool)


def assert_equal_in_pools(models, pools, inputs, atol=1e-5, **options):
    pairs = zip(models, pools, strict=True)
    assert_same(*(model.encode(inputs, pool=pool, chunk_size=2, **options) for model, pool in pairs), atol=atol)


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_sentence_embeddings_equal_the_original(models, pools, precision):
    integers = precision in ("int8", "uint8")  # need several texts; a value may be at the border of two buckets
    for inputs, options in itertools.product([TEXTS, [], *([] if integers else [TEXTS[0]])], [*CONVERSIONS, CUT]):
        assert_equal_in_pools(models, pools, inputs, atol=1 if integers else 1e-5, precision=precision, **options)


@pytest.mark.parametrize("output_value", ["token_embeddings", None])
def test_other_outputs_equal_the_original(models, pools, output_value):
    for inputs, options in itertools.product([TEXTS, [], TEXTS[0]], CONVERSIONS):
        assert_equal_in_pools(models, pools, inputs, output_value=output_value, **options)


@pytest.mark.parametrize("options", [{"output_value": None, "precision": "int8"}, {"chunk_size": 0}], ids=str)
def test_both_reject_the_same_options(models, pools, options):
    errors = []
    for model, pool in zip(models, pools, strict=True):
        with pytest.raises(Exception) as error:
            model.encode(TEXTS, pool=pool, **options)
        errors.append(error.type)
    assert errors[0] is errors[1]


def test_order_and_bits_equal_those_of_one_process(models, pools):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["tide", "bread", "moon", "stadium"], size)) for size in rng.integers(1, 250, 31)]
    drop_in = models[0]
    expected = drop_in.encode(texts)
    for size in (None, 1, 7):
        assert np.array_equal(drop_in.encode(texts, pool=pools[0], chunk_size=size), expected)
    with pytest.warns(DeprecationWarning):
        assert np.array_equal(drop_in.encode_multi_process(texts, pools[0]), expected)
    assert np.array_equal(drop_in.encode(texts, device=["cpu", "cpu"]), expected)
    assert np.array_equal(drop_in.encode_query(texts, device=["cpu"]), drop_in.encode_query(texts))


def test_processes_run_the_modified_model(models):
    modified = [copy.deepcopy(model) for model in models]
    for model in modified:
        model.to(torch.bfloat16)
        model[1].pooling_mode = "cls"
        model.max_seq_length = 16
    found, expected = (
        model.encode(TEXTS, device=["cpu"], convert_to_tensor=True, chunk_size=len(TEXTS)) for model in modified
    )
    assert_same(found, expected, atol=1e-2)
    assert torch.equal(found, modified[0].encode(TEXTS, convert_to_tensor=True))


def test_a_task_selects_the_adapter_in_a_pool(tmp_path):
    folder = write_checkpoint(tmp_path, SMALL, with_adapters(published_names(model_of().state_dict())))
    write_tokenizer(folder, (MINILM / "README.md").read_text().splitlines())
    add_sentence_transformers_files(folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0] |= {"type": "custom_st.Transformer", "kwargs": ["task"]}
    write_json(folder / "modules.json", modules)
    model = SentenceTransformer(str(folder), device="cpu")
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        for task in ("separation", None, "text-matching"):
            assert np.array_equal(model.encode(TEXTS, pool=pool, task=task), model.encode(TEXTS, task=task))
    finally:
        model.stop_multi_process_pool(pool)
