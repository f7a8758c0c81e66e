"""nomic-embed-text-v2-moe against a reference written from its published description."""

import pytest
import torch
import torch.nn.functional as F
from support.checkpoints import RandomWeights, write_checkpoint
from support.family_checks import VOCABULARY, assert_independent, assert_parity

import unpadded
from unpadded.checkpoint.families import nomic_bert
from unpadded.checkpoint.spec import Experts, Rotary
from unpadded.errors import ConfigError, WeightsError

V2_MOE = {  # the published keys
    "model_type": "nomic_bert",
    "activation_function": "gelu",
    "add_pooling_layer": False,
    "attn_pdrop": 0.0,
    "causal": False,
    "dense_seq_output": True,
    "embd_pdrop": 0.1,
    "expert_choice_router": False,
    "ffn_div": 1,
    "fused_bias_fc": True,
    "layer_norm_epsilon": 1e-05,
    "max_trained_positions": 2048,
    "mlp_fc1_bias": True,
    "mlp_fc2_bias": True,
    "moe_every_n_layers": 2,
    "moe_impl": "megablocks",
    "moe_normalize_expert_weights": False,
    "moe_resid_pdrop": 0.0,
    "moe_top_k": 2,
    "n_embd": 768,
    "n_head": 12,
    "n_inner": 3072,
    "n_layer": 12,
    "n_positions": 2048,
    "num_experts": 8,
    "num_shared_experts": 0,
    "pad_vocab_size_multiple": 64,
    "parallel_block": False,
    "prenorm": False,
    "qkv_proj_bias": True,
    "rotary_emb_base": 10000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "router_aux_loss_coef": 0.1,
    "scale_attn_weights": True,
    "type_vocab_size": 1,
    "use_rms_norm": None,
    "vocab_size": 250048,
}
HIDDEN, HEADS, INTERMEDIATE, LAYERS, EXPERTS = 128, 2, 192, 4, 8
SMALL = V2_MOE | {
    "n_embd": HIDDEN,
    "n_head": HEADS,
    "n_inner": INTERMEDIATE,
    "n_layer": LAYERS,
    "vocab_size": VOCABULARY,
}


def make_tensors(layers=LAYERS):
    random = RandomWeights(HIDDEN, 0)
    tensors = {
        "embeddings.word_embeddings.weight": random(VOCABULARY, HIDDEN),
        "embeddings.token_type_embeddings.weight": random(1, HIDDEN),
        **random.norm("emb_ln"),
    }
    for index in range(layers):
        layer = f"encoder.layers.{index}"
        tensors |= random.linear(f"{layer}.attn.Wqkv", 3 * HIDDEN, HIDDEN)
        tensors |= random.linear(f"{layer}.attn.out_proj", HIDDEN, HIDDEN)
        tensors |= random.norm(f"{layer}.norm1") | random.norm(f"{layer}.norm2")
        if index % 2:
            tensors |= random.linear(f"{layer}.mlp.router.layer", EXPERTS, HIDDEN, bias=False)
            tensors[f"{layer}.mlp.experts.mlp.w1"] = random(EXPERTS * INTERMEDIATE, HIDDEN)
            tensors[f"{layer}.mlp.experts.mlp.w2"] = random(EXPERTS * INTERMEDIATE, HIDDEN)
            tensors[f"{layer}.mlp.experts.bias"] = random(HIDDEN)
        else:
            tensors |= random.linear(f"{layer}.mlp.fc1", INTERMEDIATE, HIDDEN)
            tensors |= random.linear(f"{layer}.mlp.fc2", HIDDEN, INTERMEDIATE)
    return tensors


def make_reference(tensors):
    """Return a function that computes the hidden states of one text in float64, with all experts on all tokens."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    head_dim = HIDDEN // HEADS

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, (HIDDEN,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-5)

    def rotate(x):
        angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
        first, second = x.chunk(2, dim=-1)
        rotated = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
        return torch.cat(rotated, dim=-1)

    def attention(x, name):
        q, k, v = linear(x, f"{name}.Wqkv").view(len(x), 3, HEADS, head_dim).permute(1, 2, 0, 3)
        weights = (rotate(q) @ rotate(k).transpose(1, 2) / head_dim**0.5).softmax(-1)
        return linear((weights @ v).transpose(0, 1).flatten(1), f"{name}.out_proj")

    def experts(x, name):
        weights = linear(x, f"{name}.router.layer").softmax(-1)
        kept = torch.where(weights >= weights.topk(2).values[:, 1:], weights, 0)
        y = tensors[f"{name}.experts.bias"].expand_as(x)
        up = tensors[f"{name}.experts.mlp.w1"].view(EXPERTS, INTERMEDIATE, HIDDEN)
        down = tensors[f"{name}.experts.mlp.w2"].view(EXPERTS, INTERMEDIATE, HIDDEN)
        for expert in range(EXPERTS):
            y = y + kept[:, expert, None] * (F.gelu(x @ up[expert].T) @ down[expert])
        return y

    def run(ids):
        x = tensors["embeddings.word_embeddings.weight"][torch.from_numpy(ids).long()]
        x = norm(x + tensors["embeddings.token_type_embeddings.weight"][0], "emb_ln")
        for index in range(LAYERS):
            name = f"encoder.layers.{index}"
            x = norm(x + attention(x, f"{name}.attn"), f"{name}.norm1")
            if index % 2:
                mlp = experts(x, f"{name}.mlp")
            else:
                mlp = linear(F.gelu(linear(x, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
            x = norm(x + mlp, f"{name}.norm2")
        return x.numpy()

    return run


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path, SMALL, make_tensors())


def test_the_published_configuration():
    spec = nomic_bert.read_config(V2_MOE)
    assert (spec.layers, spec.hidden, spec.heads, spec.intermediate, spec.activation) == (12, 768, 12, 3072, "gelu")
    assert (spec.vocabulary, spec.token_types, spec.norm_eps) == (250048, 1, 1e-5)
    assert spec.biases == ("qkv", "out", "up", "down", "norm")
    assert spec.rotary == Rotary(base=10000.0, trained_length=2048)
    assert spec.experts == Experts(layers=(1, 3, 5, 7, 9, 11), num_experts=8, top_k=2)


def test_matches_the_reference(folder):
    assert_parity(unpadded.load(folder, device="cpu"), make_reference(make_tensors()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_is_independent_of_its_batch(folder, dtype):
    assert_independent(folder, dtype)


def test_the_error_names_a_missing_router(tmp_path):
    tensors = make_tensors()
    del tensors["encoder.layers.3.mlp.router.layer.weight"]
    with pytest.raises(WeightsError, match=r"missing: encoder.layers.3.mlp.router.layer.weight \(8, 128\)"):
        unpadded.load(write_checkpoint(tmp_path, SMALL, tensors), device="cpu")


def test_a_model_without_experts_is_dense():
    assert nomic_bert.read_config(V2_MOE | {"num_experts": 0}).experts is None
    assert nomic_bert.read_config(V2_MOE | {"moe_every_n_layers": 0}).experts is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("expert_choice_router", True), ("moe_normalize_expert_weights", True), ("num_shared_experts", 1)],
)
def test_unsupported_settings_raise(key, value):
    with pytest.raises(ConfigError, match=f"{key} = .* is not implemented"):
        nomic_bert.read_config(V2_MOE | {key: value})


def test_gated_experts_raise():
    with pytest.raises(ConfigError, match=r"num_experts = 8 is not implemented, only '0 with .* swiglu'"):
        nomic_bert.read_config(V2_MOE | {"activation_function": "swiglu"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_every_n_layers": None}, "lacks moe_every_n_layers"),
        ({"moe_top_k": None}, "lacks moe_top_k"),
        ({"moe_top_k": 9}, "moe_top_k = 9 exceeds num_experts = 8"),
    ],
)
def test_incomplete_expert_settings_raise(changes, message):
    with pytest.raises(ConfigError, match=message):
        nomic_bert.read_config(V2_MOE | changes)
