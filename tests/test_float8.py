"""dtype="float8" through the whole engine, on a CPU with the ops' references; test_kernel_fp8 tests the kernels."""

import numpy as np
import pytest
import test_family_eurobert as eurobert
import test_family_jina_bert as jina
import test_family_jina_v3 as jina_v3
import test_family_modernbert as modernbert
import test_family_nomic_moe as nomic_moe
import torch
from support.checkpoints import REAL, write_bert, write_checkpoint, write_nomic
from support.family_checks import assert_independent, random_ids, relative_error

import unpadded
from unpadded.errors import OptionError
from unpadded.integrations.transformers import UnpaddedModel
from unpadded.model.linear import Float8Linear, Linear
from unpadded.model.weights import plain_weights

FAMILIES = {
    "bert": lambda folder: write_bert(folder, tokenizer=False, positions=1024),
    "rotary": lambda folder: write_nomic(folder, tokenizer=False),
    "experts": lambda folder: write_checkpoint(folder, nomic_moe.SMALL, nomic_moe.make_tensors()),
    "pre-norm": lambda folder: write_checkpoint(folder, modernbert.SMALL, modernbert.model_of().state_dict()),
    "RMSNorm": lambda folder: write_checkpoint(folder, eurobert.SMALL, eurobert.model_of(eurobert.SMALL).state_dict()),
    "norm of q and k": lambda folder: write_checkpoint(
        folder, jina.SMALL | {"auto_map": jina.CODE_MAP}, jina.make_tensors(code=True)
    ),
}


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    return FAMILIES[request.param](tmp_path)


def test_every_kind_of_layer_stays_near_fp32(folder):
    exact = unpadded.load(folder, device="cpu")
    engine = unpadded.load(folder, device="cpu", dtype="float8")
    assert engine.describe()["dtype"] == "float8"
    for layer, exact_layer in zip(
        engine._pipeline.runner.encoder.weights.layers,
        plain_weights(exact._pipeline.runner.encoder.weights).layers,
        strict=True,
    ):
        assert layer.linears.keys() == exact_layer.linears.keys()
        for name, linear in layer.linears.items():
            assert isinstance(linear, Float8Linear) == (name in ("qkv", "up")), name
            if isinstance(linear, Linear):
                assert torch.equal(linear.weight, exact_layer.linears[name].weight)
    texts = random_ids((1, 7, 600))
    states = zip(engine.token_embeddings(texts), exact.token_embeddings(texts), strict=True)
    errors = [relative_error(*pair) for pair in states]
    assert min(errors) > 0.003
    assert max(errors) < 0.15


def test_a_text_depends_on_itself_alone(folder):
    assert_independent(folder, "float8", lengths=(1, 1, 2, 7, 40, 65, 600))


def test_real_weights_and_texts(minilm):
    """8 bits cost all-MiniLM-L6-v2 some accuracy: more than nothing, so that they are in use, but not too much."""
    texts = [line for line in (minilm / "README.md").read_text().splitlines() if line.strip()]
    exact, found = (
        unpadded.load(minilm, device="cpu", dtype=dtype).encode(texts, normalize=True)
        for dtype in ("float32", "float8")
    )
    cosine = (exact * found).sum(1)
    print(f"cosine to fp32 of {len(texts)} texts: mean {cosine.mean():.4f}, minimum {cosine.min():.4f}")
    assert 0.9975 <= cosine.mean() <= 0.999
    assert cosine.min() >= 0.988


@pytest.mark.gpu
def test_on_a_gpu_the_error_is_that_of_the_cpu_and_texts_are_independent(tmp_path):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    folder = write_nomic(tmp_path, tokenizer=False, **REAL | {"layers": 4})
    texts = random_ids((1, 2, 7, 64, 65, 130, 513))
    exact, on_cpu = (unpadded.load(folder, device="cpu", dtype=dtype).encode(texts) for dtype in ("float32", "float8"))
    engine = unpadded.load(folder, device="cuda", dtype="float8", batch_invariant=True)
    found = engine.encode(texts)
    assert relative_error(found, exact) <= 1.5 * relative_error(on_cpu, exact)
    assert np.array_equal(found, np.concatenate([engine.encode([ids]) for ids in texts]))


def assert_no_modules_and_no_adapters(dtype, tmp_path):
    """Check what every dtype of quantized linears rejects."""
    folder = write_bert(tmp_path / "bert", tokenizer=False)
    with pytest.raises(OptionError, match=f"dtype='{dtype}' is not supported by a module.*use unpadded.load"):
        UnpaddedModel.from_pretrained(folder, dtype=dtype)
    adapted = write_checkpoint(tmp_path / "jina", jina_v3.SMALL, {"emb_ln.weight": torch.ones(128)})
    with pytest.raises(OptionError, match=f"{dtype}.*LoRA adapters.*retrieval.query.*use dtype='auto'"):
        unpadded.load(adapted, device="cpu", dtype=dtype)


def test_unsupported_uses_are_rejected(tmp_path, monkeypatch):
    assert_no_modules_and_no_adapters("float8", tmp_path)
    with pytest.raises(OptionError, match=r"dtype is unknown: 'float4'; use auto, .*, float8, int8"):
        unpadded.load(tmp_path / "bert", device="cpu", dtype="float4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(OptionError, match=r"compute capability 8.9: cuda:0 has 8.0; use dtype='float16'"):
        unpadded.load(tmp_path / "bert", device="cuda:0", dtype="float8")
