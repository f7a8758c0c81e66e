"""Jina's ALiBi BERTs against a reference written from their published description."""

import pytest
import torch
import torch.nn.functional as F
from support.checkpoints import RandomWeights, change_json, write_checkpoint
from support.family_checks import LENGTHS, VOCABULARY, assert_cuda_agrees, assert_independent, assert_parity

import unpadded
from unpadded.checkpoint.families import jina_bert
from unpadded.checkpoint.reader import open_checkpoint
from unpadded.errors import ConfigError
from unpadded.integrations.transformers import UnpaddedModel

JINA_BASE = {  # the published keys of jina-embeddings-v2-base-en
    "model_type": "bert",
    "auto_map": {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"},
    "attention_probs_dropout_prob": 0.0,
    "emb_pooler": "mean",
    "feed_forward_type": "geglu",
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 8192,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "position_embedding_type": "alibi",
    "type_vocab_size": 2,
    "vocab_size": 30528,
}
CODE_MAP = {"AutoModel": "jinaai/jina-bert-v2-qk-post-norm--modeling_bert.JinaBertModel"}
HIDDEN, HEADS, INTERMEDIATE, LAYERS = 192, 6, 256, 2
SMALL = JINA_BASE | {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,  # not a power of two, for which the slopes have a case of their own
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
}
SLOPES_OF_6 = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]


def make_tensors():
    random = RandomWeights(HIDDEN, 0)
    tensors = {
        "embeddings.word_embeddings.weight": random(VOCABULARY, HIDDEN),
        "embeddings.token_type_embeddings.weight": random(2, HIDDEN),
        **random.norm("embeddings.LayerNorm"),
        **random.linear("pooler.dense", HIDDEN, HIDDEN),
    }
    for index in range(LAYERS):
        layer = f"encoder.layer.{index}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            tensors |= random.linear(f"{layer}.attention.{name}", HIDDEN, HIDDEN)
        tensors |= random.norm(f"{layer}.attention.output.LayerNorm")
        tensors |= random.linear(f"{layer}.mlp.gated_layers", 2 * INTERMEDIATE, HIDDEN, bias=False)
        tensors |= random.linear(f"{layer}.mlp.wo", HIDDEN, INTERMEDIATE)
        tensors |= random.norm(f"{layer}.mlp.layernorm")
    return tensors


def make_reference(tensors):
    """Return a function that computes the hidden states of one text in float64."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, (HIDDEN,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-12)

    def heads(x):
        return x.view(len(x), HEADS, HIDDEN // HEADS).transpose(0, 1)

    def attention(x, name):
        q, k, v = (linear(x, f"{name}.self.{part}") for part in ("query", "key", "value"))
        position = torch.arange(len(x))
        bias = -torch.tensor(SLOPES_OF_6)[:, None, None] * (position[:, None] - position).abs()
        scores = heads(q) @ heads(k).transpose(1, 2) / (HIDDEN // HEADS) ** 0.5 + bias
        mixed = (scores.softmax(-1) @ heads(v)).transpose(0, 1).flatten(1)
        return norm(linear(mixed, f"{name}.output.dense") + x, f"{name}.output.LayerNorm")

    def run(ids):
        x = tensors["embeddings.word_embeddings.weight"][torch.from_numpy(ids).long()]
        x = norm(x + tensors["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for index in range(LAYERS):
            name = f"encoder.layer.{index}"
            attended = attention(x, f"{name}.attention")
            gate, up = linear(attended, f"{name}.mlp.gated_layers").chunk(2, dim=-1)
            x = norm(attended + linear(F.gelu(gate) * up, f"{name}.mlp.wo"), f"{name}.mlp.layernorm")
        return x.numpy()

    return run


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path, SMALL, make_tensors())


def test_the_published_configuration():
    spec = jina_bert.read_config(JINA_BASE)
    assert (spec.layers, spec.hidden, spec.heads, spec.head_dim, spec.intermediate) == (12, 768, 12, 64, 3072)
    assert (spec.vocabulary, spec.token_types, spec.position_rows, spec.rotary) == (30528, 2, 0, None)
    assert (spec.activation, spec.biases) == ("geglu", ("qkv", "out", "down", "norm"))
    assert spec.alibi


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (8, [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8]),
        (6, SLOPES_OF_6),
        # eight heads, then every other of sixteen
        (12, [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
        (1, [2**-8]),
    ],
)
def test_alibi_slopes(heads, slopes):
    spec = jina_bert.read_config(JINA_BASE | {"num_attention_heads": heads, "hidden_size": 64 * heads})
    assert spec.alibi_slopes == pytest.approx(slopes, rel=1e-12)


def test_matches_the_reference(folder):
    assert_parity(unpadded.load(folder, device="cpu"), make_reference(make_tensors()), LENGTHS)


def test_cuda_agrees(folder, cuda):
    assert_cuda_agrees(folder, cuda)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_is_independent_of_its_batch(folder, dtype):
    assert_independent(folder, dtype)


def test_position_ids_raise(folder):
    with pytest.raises(unpadded.InputError, match=r"position_ids .* jina_.* ALiBi.*omit"):
        UnpaddedModel.from_pretrained(folder)(torch.full((1, 5), 7), position_ids=torch.arange(5)[None])


@pytest.mark.parametrize("absent", ["auto_map", "model_type", "position_embedding_type"])
def test_tensor_names_decide(folder, absent):
    stated = open_checkpoint(folder).spec
    change_json(folder / "config.json", **{absent: ...})
    assert open_checkpoint(folder).spec == stated
    assert stated.family == "jina_bert"


@pytest.mark.parametrize("named_by", ["auto_map", "tensors"])
def test_the_model_for_code_raises(folder, named_by):
    """It has LayerNorm on q and k, and one more after attention."""
    if named_by == "auto_map":
        change_json(folder / "config.json", auto_map=CODE_MAP)
    else:
        tensors = make_tensors() | RandomWeights(HIDDEN, 0).norm("encoder.layer.0.attention.self.layer_norm_q")
        write_checkpoint(folder, SMALL, tensors)
    with pytest.raises(ConfigError, match=r"jina-embeddings-v2-base-code, is not supported; use .*CodeRankEmbed$"):
        open_checkpoint(folder)


def test_max_length_is_not_limited_by_learned_positions(folder):
    assert open_checkpoint(folder).max_length == 8192


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("feed_forward_type", "reglu"),
        ("feed_forward_type", "original"),
        ("position_embedding_type", "absolute"),
        ("hidden_act", "relu"),
    ],
)
def test_unsupported_settings_raise(key, value):
    with pytest.raises(ConfigError, match=f"{key} = .* is not implemented"):
        jina_bert.read_config(JINA_BASE | {key: value})
