"""NomicBERT: nomic-embed-text v1, v1.5 and v2-moe, nomic-bert-2048, CodeRankEmbed, arctic-embed-m-long.

Checkpoints use the keys and tensor names of the published code ("legacy"), those of transformers 5, or both, which must
then agree. With a legacy key, an absent key has the default of the published configuration class, else that of
transformers' NomicBertConfig.
"""

from collections.abc import Mapping
from typing import Any

from unpadded.checkpoint.families import bert
from unpadded.checkpoint.family import GATES, TRANSFORMERS, Family, by_type_or_name, choice, encoder_tensors, sizes
from unpadded.checkpoint.json_config import (
    ROPE_OBJECTS,
    allow_only,
    consistent,
    contradiction,
    flatten_rope,
    not_implemented,
    optional,
    required,
    rope_factor,
    rope_keys,
)
from unpadded.checkpoint.spec import GATED, Activation, EncoderSpec, Experts, Rotary, TensorSpec
from unpadded.errors import ConfigError

LEGACY_SIZES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
LEGACY_KEYS = (*LEGACY_SIZES, "activation_function", "rotary_emb_fraction", "qkv_proj_bias")
BIASES = {"qkv_proj_bias": ("qkv", "out"), "mlp_fc1_bias": ("up",), "mlp_fc2_bias": ("down",)}
WIDTH_MULTIPLE = 256  # the published code rounds the width of a gated MLP up to a multiple of this

ACTIVATIONS: dict[str, Activation] = {"swiglu": "swiglu", "geglu": "geglu", **bert.ACTIVATIONS}
_FALSE = """
    causal expert_choice_router moe_normalize_expert_weights norm_mlp parallel_block parallel_block_tied_norm prenorm
    rotary_emb_interleaved rotary_head_dim scale_attn_by_inverse_layer_idx use_rms_norm
"""
DEFAULTS: dict[str, Any] = {"num_shared_experts": 0, "scale_attn_weights": True, "rotary_emb_scale_base": None}
DEFAULTS |= dict.fromkeys(_FALSE.split(), False)
LAYER = "encoder.layers.{layer}"
PUBLISHED = {
    **TRANSFORMERS,
    "norm": "emb_ln",
    "qkv": f"{LAYER}.attn.Wqkv",
    "out": f"{LAYER}.attn.out_proj",
    "attention_norm": f"{LAYER}.norm1",
    "up": (f"{LAYER}.mlp.fc12", f"{LAYER}.mlp.fc11"),
    "down": f"{LAYER}.mlp.fc2",
    "mlp_norm": f"{LAYER}.norm2",
}
ROPE_KEYS = ("rope_type", "type", "rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings")


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    allow_only(config, DEFAULTS)
    legacy = any(key in config for key in LEGACY_KEYS)
    activation = _activation(config, legacy)
    renamed = {key: required(config, (old, key), int) for old, key in LEGACY_SIZES.items()}
    renamed["intermediate_size"] = _intermediate(config, legacy, renamed["hidden_size"], activation in GATED)
    shape = sizes({**config, **renamed})
    allow_only(config, dict.fromkeys(("num_heads_kv", "num_key_value_heads"), shape["heads"]))
    return EncoderSpec(
        family="nomic_bert",
        **shape,
        token_types=optional(config, "type_vocab_size", 2, minimum=0),
        rotary=_rotary(config, legacy),
        activation=activation,
        norm_eps=consistent(config, ("layer_norm_epsilon", "layer_norm_eps"), float) or (1e-5 if legacy else 1e-12),
        biases=(*(bias for key, biases in BIASES.items() if optional(config, key, legacy) for bias in biases), "norm"),
        experts=_experts(config, shape["layers"], activation),
    )


def tensors(spec: EncoderSpec) -> dict[str, TensorSpec]:
    published = PUBLISHED if spec.gated else {**PUBLISHED, "up": f"{LAYER}.mlp.fc1"}
    found = encoder_tensors(spec, published, TRANSFORMERS)
    num_experts = spec.experts.num_experts if spec.experts else 0
    rows = num_experts * spec.intermediate
    for index in spec.experts.layers if spec.experts else ():
        layer, stored = f"layers.{index}", f"encoder.layers.{index}.mlp"
        found |= {
            f"{layer}.router": TensorSpec((num_experts, spec.hidden), ((f"{stored}.router.layer.weight",),)),
            f"{layer}.up": TensorSpec((rows, spec.hidden), ((f"{stored}.experts.mlp.w1",),)),
            f"{layer}.down": TensorSpec((rows, spec.hidden), ((f"{stored}.experts.mlp.w2",),)),
            f"{layer}.down_bias": TensorSpec((spec.hidden,), ((f"{stored}.experts.bias",),)),
        }
        found.pop(f"{layer}.up_bias", None)  # the only bias is added to the sum of the experts' outputs
    return found


def _activation(config: Mapping[str, Any], legacy: bool) -> Activation:
    """Read `activation_function`, which names the whole MLP, and `hidden_act`, which names its gate's activation."""
    gate, stated = config.get("hidden_act"), config.get("activation_function")
    if stated is None and (gate is not None or not legacy):  # the MLP of transformers is always gated
        return choice(config, "hidden_act", GATES, default="silu")
    activation = choice(config, "activation_function", ACTIVATIONS, default="gelu_new")
    if gate is not None and (GATES if activation in GATED else ACTIVATIONS).get(str(gate)) != activation:
        raise contradiction({key: config[key] for key in ("activation_function", "hidden_act")})
    return activation


def _intermediate(config: Mapping[str, Any], legacy: bool, hidden: int, gated: bool) -> int:
    exact = consistent(config, ("intermediate_size",), int)
    stated = consistent(config, ("n_inner",), int)
    if stated is None and (exact is not None or not legacy):
        return required(config, ("intermediate_size", "n_inner"), int)
    width = stated or (8 * hidden // 3 if gated else 4 * hidden)
    width = -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE if gated else width
    if exact not in (None, width):
        raise contradiction({"n_inner": stated, "the width computed from it": width, "intermediate_size": exact})
    return width


def _experts(config: Mapping[str, Any], layers: int, activation: Activation) -> Experts | None:
    """Return the experts of every n-th layer, starting with the second one."""
    num_experts = optional(config, "num_experts", 0, minimum=0)
    if not num_experts or config.get("moe_every_n_layers") == 0:
        return None
    if activation in GATED:
        raise not_implemented("num_experts", num_experts, f"0 with the activation {activation}")
    every, top_k = (required(config, (key,), int) for key in ("moe_every_n_layers", "moe_top_k"))
    if top_k > num_experts:
        raise ConfigError(f"moe_top_k = {top_k} exceeds num_experts = {num_experts}; correct config.json")
    expert_layers = tuple(index for index in range(layers) if index % every == 1)
    return Experts(layers=expert_layers, num_experts=num_experts, top_k=top_k)


def _rotary(config: Mapping[str, Any], legacy: bool) -> Rotary:
    flat = flatten_rope(config, ROPE_KEYS)
    legacy_defaults = legacy and not any(config.get(source) for source in ROPE_OBJECTS)
    fraction_keys = ("rotary_emb_fraction", "partial_rotary_factor", *rope_keys("partial_rotary_factor"))
    # the published class has no rotary embedding by default
    absent = legacy_defaults and all(flat.get(key) is None for key in fraction_keys)
    allow_only({"rotary_emb_fraction": 0.0} if absent else flat, dict.fromkeys(fraction_keys, 1.0))
    base = consistent(flat, ("rotary_emb_base", "rope_theta", *rope_keys("rope_theta")), float)
    trained = consistent(flat, ("max_trained_positions", *rope_keys("original_max_position_embeddings")), int)
    # nomic-embed-text-v1, in the legacy layout, was trained with 2048 tokens and has max_position_embeddings = 8192
    if trained is None and not legacy:
        trained = consistent(flat, ("max_position_embeddings",), int)
    return Rotary(
        base=base or (10000.0 if legacy_defaults else 1000.0),
        trained_length=trained or 2048,
        scaling_factor=rope_factor(flat, "dynamic", "rotary_scaling_factor"),
    )


FAMILY = Family(
    # the first name is ModernBERT's, too
    matches=by_type_or_name("nomic_bert", suffixes=("layers.0.attn.Wqkv.weight", "emb_ln.weight")),
    read_config=read_config,
    tensors=tensors,
    score=bert.FAMILY.score,
    max_length=8192,
    prompts={task: f"{task}: " for task in ("search_query", "search_document", "clustering", "classification")},
    matryoshka={"nomic-embed-text-v1.5": (768, 512, 256, 128, 64), "nomic-embed-text-v2-moe": (768, 256)},
    matryoshka_layer_norm=True,
)
