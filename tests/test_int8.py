"""dtype="int8" through the whole engine; test_cpu_ops tests the matmul."""

import numpy as np
import pytest
import test_family_eurobert as eurobert
import test_family_jina_v3 as jina_v3
import test_family_modernbert as modernbert
import test_family_nomic_moe as nomic_moe
import torch
from support.checkpoints import write_bert, write_checkpoint, write_nomic
from support.family_checks import assert_independent, random_ids, relative_error

import unpadded
from unpadded.errors import OptionError
from unpadded.integrations.transformers import UnpaddedModel
from unpadded.model.layer import ExpertMLP
from unpadded.model.weights import plain_weights
from unpadded_kernels import avx512
from unpadded_kernels.avx512 import PackedLinear

NEEDS_VNNI = pytest.mark.skipif(not avx512.supports(torch.int8), reason="needs AVX-512 with VNNI")


FAMILIES = {
    "bert": lambda folder: write_bert(folder, tokenizer=False, positions=1024),
    "rotary": lambda folder: write_nomic(folder, tokenizer=False),
    "experts": lambda folder: write_checkpoint(folder, nomic_moe.SMALL, nomic_moe.make_tensors()),
    "pre-norm": lambda folder: write_checkpoint(folder, modernbert.SMALL, modernbert.model_of().state_dict()),
    "RMSNorm": lambda folder: write_checkpoint(folder, eurobert.SMALL, eurobert.model_of(eurobert.SMALL).state_dict()),
}


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    return FAMILIES[request.param](tmp_path)


def encoder_of(engine):
    return engine._pipeline.runner.encoder


@NEEDS_VNNI
def test_every_kind_of_layer_stays_near_fp32(folder):
    exact, engine = (unpadded.load(folder, device="cpu", dtype=dtype) for dtype in ("float32", "int8"))
    assert engine.describe()["dtype"] == "int8" and repr(engine).endswith("cpu int8)")
    weights, exact_weights = encoder_of(engine).weights, plain_weights(encoder_of(exact).weights)
    assert torch.equal(weights.word, exact_weights.word)
    for layer, exact_layer in zip(weights.layers, exact_weights.layers, strict=True):
        assert layer.linears.keys() == exact_layer.linears.keys()
        for name, linear in layer.linears.items():
            assert isinstance(linear, PackedLinear)
            attended = name == "qkv" and avx512.has_fast_bf16()
            assert linear.dtype == (torch.bfloat16 if attended else torch.float32)
            assert linear.panels.dtype == torch.int8
            assert linear.shape == exact_layer.linears[name].weight.shape
        if isinstance(layer.mlp, ExpertMLP):
            for name in ("router", "up", "down"):
                assert torch.equal(getattr(layer.mlp, name), getattr(exact_layer.mlp, name)), name
    texts = random_ids((1, 7, 31, 32, 600))
    states = zip(engine.token_embeddings(texts), exact.token_embeddings(texts), strict=True)
    errors = [relative_error(*pair) for pair in states]
    assert min(errors) > 0.01
    assert max(errors) < (0.08 if engine.checkpoint.spec.experts else 0.05)  # a token may change its experts


@NEEDS_VNNI
def test_a_text_depends_on_itself_alone(folder):
    assert_independent(folder, "int8", lengths=(1, 1, 2, 7, 31, 32, 40, 40, 65, 255, 257, 600))


def nearest(vectors):
    """Return the ten texts nearest to each text, without itself."""
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -1)
    return np.argsort(-scores, axis=1)[:, :10]


@NEEDS_VNNI
@pytest.mark.parametrize(
    ("source", "mean", "minimum", "same"), [("README", 0.998, 0.99, 0.96), ("paragraphs", 0.9985, 0.997, 0.96)]
)
def test_real_weights_and_texts(minilm, minilm_engine, corpus, source, mean, minimum, same):
    """8 bits cost all-MiniLM-L6-v2 some accuracy: more than nothing, so that they are in use, but not too much."""
    lines = [line for line in (minilm / "README.md").read_text().splitlines() if line.strip()]
    texts = lines if source == "README" else corpus[:300]
    exact = minilm_engine.encode(texts, normalize=True)
    found = unpadded.load(minilm, device="cpu", dtype="int8").encode(texts, normalize=True)
    cosine = (exact * found).sum(1)
    kept = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(nearest(exact), nearest(found), strict=True)])
    print(f"{len(texts)} texts: cosine {cosine.mean():.4f}, minimum {cosine.min():.4f}; same ten nearest {kept:.3f}")
    assert mean <= cosine.mean() <= 0.9995
    assert cosine.min() >= minimum
    assert kept >= same


def test_unsupported_uses_are_rejected(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(avx512, "supports", lambda dtype: True)
        assert_no_modules_and_no_adapters(tmp_path)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        with pytest.raises(OptionError, match=r"int8' runs on a CPU only: the device is cuda:0; use dtype='float16'"):
            unpadded.load(tmp_path / "bert", device="cuda:0", dtype="int8")
    monkeypatch.setattr(avx512, "supports", lambda dtype: False)
    with pytest.raises(
        OptionError, match=r"int8' needs AVX-512 with VNNI and a C compiler.*: the device is cpu; use dtype='float32'"
    ):
        unpadded.load(tmp_path / "bert", device="cpu", dtype="int8")


def assert_no_modules_and_no_adapters(tmp_path):
    folder = write_bert(tmp_path / "bert", tokenizer=False)
    with pytest.raises(OptionError, match=r"dtype='int8' is not supported by a module.*use unpadded.load"):
        UnpaddedModel.from_pretrained(folder, dtype="int8")
    adapted = write_checkpoint(tmp_path / "jina", jina_v3.SMALL, {"emb_ln.weight": torch.ones(128)})
    with pytest.raises(OptionError, match=r"int8.*LoRA adapters.*retrieval.query.*use dtype='auto'"):
        unpadded.load(adapted, device="cpu", dtype="int8")
