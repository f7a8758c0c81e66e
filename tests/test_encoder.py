"""Hidden states against transformers' own classes, fp32, on values."""

import numpy as np
import pytest
import torch
from checkpoints import REAL, write_bert, write_nomic
from transformers import BertModel, NomicBertModel

import unpadded

LENGTHS = (1, 2, 7, 64, 65, 513, 2048)


def random_ids(lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(5, 30000, length, dtype=np.int32) for length in lengths]


@torch.inference_mode()
def reference(model, ids):
    return model(torch.from_numpy(ids).long()[None]).last_hidden_state[0].numpy()


def relative_error(ours, theirs):
    """Frobenius, in float64."""
    theirs = theirs.astype(np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("names", ["legacy", "transformers"])
def test_nomic_bert_matches_transformers(tmp_path, names):
    engine = unpadded.load(write_nomic(tmp_path / "ours", names=names), device="cpu")
    model = NomicBertModel.from_pretrained(write_nomic(tmp_path / "theirs", names="transformers")).eval()
    texts = random_ids(LENGTHS)
    together = engine.token_embeddings(texts)
    for ids, hidden in zip(texts, together, strict=True):
        expected = reference(model, ids)
        assert relative_error(hidden, expected) <= 1e-5, len(ids)
        assert relative_error(engine.token_embeddings([ids])[0], expected) <= 1e-5, len(ids)


def test_dynamic_ntk_follows_each_text_alone(tmp_path):
    """A fresh reference for every text; ours in one batch, where a longer text comes first, and again one by one."""
    folder = write_nomic(tmp_path, names="transformers", trained_length=64, scaling_factor=2.0)
    engine = unpadded.load(folder, device="cpu", max_length=8192)
    texts = random_ids((900, 65, 7, 64, 200, 128))
    together = engine.token_embeddings(texts)
    for ids, hidden in zip(texts, together, strict=True):
        expected = reference(NomicBertModel.from_pretrained(folder).eval(), ids)
        assert relative_error(hidden, expected) <= 1e-5, len(ids)
        assert relative_error(engine.token_embeddings([ids])[0], expected) <= 1e-5, len(ids)
    unscaled = unpadded.load(folder, device="cpu", max_length=8192, rotary_scaling_factor=None)
    plain = unscaled.token_embeddings(texts)
    for ids, scaled_hidden, plain_hidden in zip(texts, together, plain, strict=True):
        assert np.array_equal(scaled_hidden, plain_hidden) == (len(ids) <= 64)


def test_bert_matches_transformers(tmp_path):
    folder = write_bert(tmp_path)
    engine = unpadded.load(folder, device="cpu")
    model = BertModel.from_pretrained(folder).eval()
    texts = random_ids((1, 2, 7, 64, 65, 512))
    for ids, hidden in zip(texts, engine.token_embeddings(texts), strict=True):
        assert relative_error(hidden, reference(model, ids)) <= 1e-5, len(ids)


@pytest.mark.slow
def test_real_dimensions_match_transformers(tmp_path):
    """12 layers x 768 at 512 and 8192 tokens, plain and, past the trained 2048, dynamically scaled."""
    folder = write_nomic(tmp_path, names="transformers", **REAL)
    engine = unpadded.load(folder, device="cpu", max_length=8192)
    model = NomicBertModel.from_pretrained(folder).eval()
    for ids in random_ids((512, 8192)):
        assert relative_error(engine.token_embeddings([ids])[0], reference(model, ids)) <= 1e-5, len(ids)
    model.config.rope_parameters |= {"rope_type": "dynamic", "factor": 2.0}
    scaled = NomicBertModel(model.config).eval()
    scaled.load_state_dict(model.state_dict())
    engine = unpadded.load(folder, device="cpu", max_length=8192, rotary_scaling_factor=2)
    ids = random_ids((3000,))[0]
    assert relative_error(engine.token_embeddings([ids])[0], reference(scaled, ids)) <= 1e-5
