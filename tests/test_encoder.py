"""Hidden states compared with transformers' models in fp32."""

import numpy as np
import pytest
from support.checkpoints import REAL, VOCABULARY, write_bert, write_nomic
from support.family_checks import assert_parity, last_hidden_state, random_ids
from transformers import BertModel, NomicBertModel

import unpadded


@pytest.mark.parametrize("names", ["legacy", "transformers"])
def test_nomic_bert_matches_transformers(tmp_path, names):
    engine = unpadded.load(write_nomic(tmp_path / "unpadded", names=names), device="cpu")
    model = NomicBertModel.from_pretrained(write_nomic(tmp_path / "transformers", names="transformers")).eval()
    assert_parity(engine, last_hidden_state(model))


def test_dynamic_ntk_follows_each_text_alone(tmp_path):
    """Compare one batch, with a longer text first, and single texts with a fresh reference model per text."""
    folder = write_nomic(tmp_path, names="transformers", trained_length=64, scaling_factor=2.0)
    engine = unpadded.load(folder, device="cpu", max_length=8192)
    lengths = (900, 65, 7, 64, 200, 128)

    def fresh(ids):
        return last_hidden_state(NomicBertModel.from_pretrained(folder).eval())(ids)

    fresh.reference = NomicBertModel.__name__
    assert_parity(engine, fresh, lengths)
    unscaled = unpadded.load(folder, device="cpu", max_length=8192, rotary_scaling_factor=None)
    texts = random_ids(lengths, vocabulary=VOCABULARY)
    scaled, plain = engine.token_embeddings(texts), unscaled.token_embeddings(texts)
    for ids, scaled_hidden, plain_hidden in zip(texts, scaled, plain, strict=True):
        assert np.array_equal(scaled_hidden, plain_hidden) == (len(ids) <= 64)


@pytest.mark.parametrize("weights", ["seeded", "real"])
def test_bert_matches_transformers(tmp_path, minilm, weights):
    folder = minilm if weights == "real" else write_bert(tmp_path)
    engine = unpadded.load(folder, device="cpu", max_length=512)
    model = BertModel.from_pretrained(folder).eval()
    assert_parity(engine, last_hidden_state(model), (1, 2, 7, 64, 65, 512))


@pytest.mark.slow
def test_real_dimensions_match_transformers(tmp_path):
    """12 layers x 768 at 512 tokens, 2 at 8192, and dynamically scaled beyond the trained 2048."""
    for layers, length in ((12, 512), (2, 8192)):
        folder = write_nomic(tmp_path / str(layers), names="transformers", **REAL | {"layers": layers})
        engine = unpadded.load(folder, device="cpu", max_length=8192)
        model = NomicBertModel.from_pretrained(folder).eval()
        assert_parity(engine, last_hidden_state(model), (length,))
    model.config.rope_parameters |= {"rope_type": "dynamic", "factor": 2.0}
    scaled = NomicBertModel(model.config).eval()
    scaled.load_state_dict(model.state_dict())
    engine = unpadded.load(folder, device="cpu", max_length=8192, rotary_scaling_factor=2)
    assert_parity(engine, last_hidden_state(scaled), (3000,))
