"""NomicBERT: nomic-embed-text v1, v1.5 and v2-moe, nomic-bert-2048, CodeRankEmbed, arctic-embed-m-long.

Two vocabularies of keys and tensor names are in use, the published code's ("legacy") and that of transformers 5, often
side by side. Where both speak they must agree. A legacy configuration that leaves a key out means the default of the
published configuration class; without any legacy key the default is that of transformers' NomicBertConfig.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import product
from typing import Any

from unpadded.checkpoint.family import PREFIXES, Family
from unpadded.checkpoint.json_config import (
    consistent,
    contradiction,
    flag,
    integer,
    not_implemented,
    one_of,
    positive,
    require_defaults,
    required,
    text,
)
from unpadded.checkpoint.spec import GATED, Activation, EncoderSpec, Experts, Rotary, TensorSpec
from unpadded.errors import ConfigError

LEGACY_KEYS = ("n_embd", "n_layer", "n_head", "activation_function", "rotary_emb_fraction", "qkv_proj_bias")
TRAINED_LENGTH = 2048
MULTIPLE = 256  # the published gated MLP rounds its width up to this; the plain one does not

ACTIVATIONS: dict[str, Activation] = {
    "swiglu": "swiglu",
    "geglu": "geglu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# transformers' NomicBertMLP is always gated, and names the activation of the gate
GATES: dict[str, Activation] = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
OFFERED: dict[str, Any] = {
    "prenorm": False,
    "parallel_block": False,
    "parallel_block_tied_norm": False,
    "causal": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "use_rms_norm": False,
    "norm_mlp": False,
    "num_shared_experts": 0,
    "expert_choice_router": False,
    "moe_normalize_expert_weights": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_head_dim": False,
}
ROPE_KEYS = frozenset(
    {"rope_type", "type", "rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings"}
)


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """By model_type, or without one by the names that only NomicBERT gives its tensors."""
    model_type = config.get("model_type")
    return model_type == "nomic_bert" or (
        model_type is None and any(name.endswith(("layers.0.attn.Wqkv.weight", "emb_ln.weight")) for name in names)
    )


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    """ConfigError for contradictory keys, and for what is not implemented."""
    require_defaults(config, OFFERED)
    legacy = any(key in config for key in LEGACY_KEYS)
    hidden = required(config, ("n_embd", "hidden_size"), integer)
    heads = required(config, ("n_head", "num_attention_heads"), integer)
    head_dim = hidden // heads
    if hidden % heads or head_dim % 2:
        raise ConfigError(
            f"{hidden} hidden dimensions do not make {heads} heads of an even width; "
            "correct n_embd and n_head (hidden_size and num_attention_heads)"
        )
    require_defaults(config, {"head_dim": head_dim, "num_heads_kv": heads, "num_key_value_heads": heads})
    activation = _activation(config, legacy)
    attention_bias = _bias(config, "qkv_proj_bias", legacy)
    layers = required(config, ("n_layer", "num_hidden_layers"), integer)
    return EncoderSpec(
        family="nomic_bert",
        layers=layers,
        hidden=hidden,
        heads=heads,
        intermediate=_intermediate(config, legacy, hidden, activation in GATED),
        vocabulary=_vocabulary(config),
        token_types=2 if config.get("type_vocab_size") is None else integer(config, "type_vocab_size", least=0),
        position_rows=0,
        rotary=_rotary(config, legacy),
        activation=activation,
        norm_eps=consistent(config, ("layer_norm_epsilon", "layer_norm_eps"), positive) or (1e-5 if legacy else 1e-12),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        up_bias=_bias(config, "mlp_fc1_bias", legacy),
        down_bias=_bias(config, "mlp_fc2_bias", legacy),
        experts=_experts(config, layers, activation),
    )


def tensors(spec: EncoderSpec) -> dict[str, TensorSpec]:
    """Return the shape and stored names of each tensor of the encoder."""
    found = {"word": TensorSpec((spec.vocabulary, spec.hidden), (("embeddings.word_embeddings.weight",),))}
    if spec.token_types:
        found["token_type"] = TensorSpec(
            (spec.token_types, spec.hidden), (("embeddings.token_type_embeddings.weight",),)
        )
    found |= _norm_slots("norm", spec.hidden, "emb_ln", "embeddings.LayerNorm")
    dense, of_experts = _layer_slots(spec), _expert_slots(spec)
    for index in range(spec.layers):
        prefixes = (f"encoder.layers.{index}.", f"layers.{index}.")
        for field, slot in (of_experts if spec.experts and index in spec.experts.layers else dense).items():
            names = tuple(tuple(prefix + name for name in names) for names in slot.alternatives for prefix in prefixes)
            found[f"layers.{index}.{field}"] = TensorSpec(slot.shape, names)
    return found


def _layer_slots(spec: EncoderSpec) -> dict[str, TensorSpec]:
    hidden = spec.hidden
    gate_and_up = tuple(product(("mlp.fc12", "mlp.gate_proj"), ("mlp.fc11", "mlp.up_proj")))
    matrices: dict[str, tuple[int, int, bool, tuple[tuple[str, ...], ...]]] = {
        "qkv": (
            3 * hidden,
            hidden,
            spec.qkv_bias,
            (("attn.Wqkv",), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ),
        "out": (hidden, hidden, spec.out_bias, (("attn.out_proj",), ("self_attn.o_proj",))),
        "up": (spec.up_rows, hidden, spec.up_bias, gate_and_up if spec.gated else (("mlp.fc1",),)),
        "down": (hidden, spec.intermediate, spec.down_bias, (("mlp.fc2",), ("mlp.down_proj",))),
    }
    found = {}
    for field, (rows, columns, has_bias, modules) in matrices.items():
        found[field] = TensorSpec((rows, columns), _of_modules(modules, "weight"))
        if has_bias:
            found[f"{field}_bias"] = TensorSpec((rows,), _of_modules(modules, "bias"))
    found |= _norm_slots("attention_norm", hidden, "norm1", "post_attention_layernorm")
    found |= _norm_slots("mlp_norm", hidden, "norm2", "post_mlp_layernorm")
    return found


def _expert_slots(spec: EncoderSpec) -> dict[str, TensorSpec]:
    """A layer of experts: neither product has a bias of its own, one is added to their sum."""
    if spec.experts is None:
        return {}
    hidden, rows = spec.hidden, spec.experts.num_experts * spec.intermediate
    found = {field: slot for field, slot in _layer_slots(spec).items() if field not in ("up_bias", "down_bias")}
    return found | {
        "router": TensorSpec((spec.experts.num_experts, hidden), (("mlp.router.layer.weight",),)),
        "up": TensorSpec((rows, hidden), (("mlp.experts.mlp.w1",),)),
        "down": TensorSpec((rows, hidden), (("mlp.experts.mlp.w2",),)),
        "down_bias": TensorSpec((hidden,), (("mlp.experts.bias",),)),
    }


def _norm_slots(slot: str, hidden: int, *modules: str) -> dict[str, TensorSpec]:
    spellings = tuple((module,) for module in modules)
    return {
        slot: TensorSpec((hidden,), _of_modules(spellings, "weight")),
        f"{slot}_bias": TensorSpec((hidden,), _of_modules(spellings, "bias")),
    }


def _of_modules(spellings: tuple[tuple[str, ...], ...], part: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(f"{module}.{part}" for module in modules) for modules in spellings)


def _activation(config: Mapping[str, Any], legacy: bool) -> Activation:
    """`activation_function` names the whole MLP, `hidden_act` the activation of its gate."""
    if config.get("activation_function") is None:
        if config.get("hidden_act") is not None or not legacy:
            return GATES[one_of({"hidden_act": "silu", **config}, "hidden_act", GATES)]
        return "gelu_tanh"
    activation = ACTIVATIONS[one_of(config, "activation_function", ACTIVATIONS)]
    if config.get("hidden_act") is not None:
        stated = text(config, "hidden_act")
        meant = GATES.get(stated) if activation in GATED else ACTIVATIONS.get(stated)
        if meant != activation:
            raise contradiction({key: config[key] for key in ("activation_function", "hidden_act")})
    return activation


def _bias(config: Mapping[str, Any], key: str, legacy: bool) -> bool:
    return legacy if config.get(key) is None else flag(config, key)


def _intermediate(config: Mapping[str, Any], legacy: bool, hidden: int, gated: bool) -> int:
    exact = consistent(config, ("intermediate_size",), integer)
    stated = consistent(config, ("n_inner",), integer)
    if stated is None and exact is not None:
        return exact
    if stated is None and not legacy:
        raise ConfigError("config.json lacks intermediate_size (n_inner); add it")
    width = stated or (8 * hidden // 3 if gated else 4 * hidden)
    width = -(-width // MULTIPLE) * MULTIPLE if gated else width
    if exact not in (None, width):
        rounding = f", which the published code rounds to {width}," if width != stated else ""
        raise ConfigError(
            f"config.json contradicts itself: n_inner = {stated!r}{rounding} but intermediate_size = {exact!r}; "
            "keep the one the tensors have"
        )
    return width


def _experts(config: Mapping[str, Any], layers: int, activation: Activation) -> Experts | None:
    """On every n-th layer, the second of each n."""
    every = None if config.get("moe_every_n_layers") is None else integer(config, "moe_every_n_layers", least=0)
    count = None if config.get("num_experts") is None else integer(config, "num_experts", least=0)
    if not count or every == 0:
        return None
    if activation in GATED:
        raise not_implemented("num_experts", count, f"0 where the activation is {activation}")
    if every is None:
        raise ConfigError(f"num_experts = {count} without moe_every_n_layers; add it")
    top = required(config, ("moe_top_k",), integer)
    if top > count:
        raise ConfigError(f"moe_top_k = {top} of num_experts = {count}; correct config.json")
    return Experts(layers=tuple(index for index in range(layers) if index % every == 1), num_experts=count, top_k=top)


def _vocabulary(config: Mapping[str, Any]) -> int:
    stated = required(config, ("vocab_size",), integer)
    multiple = consistent(config, ("pad_vocab_size_multiple",), integer) or 1
    return -(-stated // multiple) * multiple


def _rotary(config: Mapping[str, Any], legacy: bool) -> Rotary:
    rope: dict[str, Any] = {}
    for source in ("rope_parameters", "rope_scaling"):
        inside = config.get(source) or {}
        if not isinstance(inside, dict) or inside.keys() - ROPE_KEYS:
            raise not_implemented(source, inside, sorted(ROPE_KEYS))
        rope |= {f"{source}.{key}": value for key, value in inside.items()}
    stated = {**config, **rope}

    def spelled(key: str) -> tuple[str, ...]:
        return (f"rope_parameters.{key}", f"rope_scaling.{key}")

    fractions = ("rotary_emb_fraction", "partial_rotary_factor", *spelled("partial_rotary_factor"))
    fraction = consistent(stated, fractions, _number)
    if fraction is None:
        # the published class's default is no rotary at all
        fraction = 0.0 if legacy and not rope else 1.0
    if fraction != 1:
        raise not_implemented("rotary_emb_fraction", fraction, 1.0)
    base = consistent(stated, ("rotary_emb_base", "rope_theta", *spelled("rope_theta")), positive)
    return Rotary(
        base=base or (10000.0 if legacy and not rope else 1000.0),
        trained_length=_trained_length(stated, legacy, spelled("original_max_position_embeddings")),
        scaling_factor=_scaling_factor(stated, spelled("rope_type") + spelled("type"), spelled("factor")),
    )


def _number(config: Mapping[str, Any], key: str) -> float:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key} = {value!r} is not a number; correct config.json")
    return float(value)


def _trained_length(stated: Mapping[str, Any], legacy: bool, original: tuple[str, ...]) -> int:
    """Not max_position_embeddings where a key is legacy: nomic-embed-text-v1 was trained to 2048 and states 8192."""
    trained = consistent(stated, ("max_trained_positions", *original), integer)
    if trained is None and not legacy:
        trained = consistent(stated, ("max_position_embeddings",), integer)
    return trained or TRAINED_LENGTH


def _scaling_factor(stated: Mapping[str, Any], types: tuple[str, ...], factors: tuple[str, ...]) -> float | None:
    """`rotary_scaling_factor`: null leaves it to the rope parameters, where `dynamic` is the same formula."""
    rope_type = consistent(stated, types, text)
    if rope_type not in (None, "default", "dynamic"):
        raise not_implemented("rope_type", rope_type, "default, dynamic")
    factor = consistent(stated, ("rotary_scaling_factor", *factors), positive)
    if rope_type == "dynamic" and factor is None:
        raise ConfigError("rope_type = 'dynamic' without a factor; add rope_parameters.factor")
    if rope_type == "default" and factor is not None:
        keys = [key for key in (*types, "rotary_scaling_factor", *factors) if stated.get(key) is not None]
        raise contradiction({key: stated[key] for key in keys})
    return factor


FAMILY = Family(
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    prefixes=(*PREFIXES, "bert.", "nomic_bert."),
    ignored=(
        "cls.*",
        "pooler.*",
        "classifier.*",
        "embeddings.position_ids",
        "embeddings.token_type_ids",
        "*inv_freq",
    ),
    max_length=8192,
    prompts={task: f"{task}: " for task in ("search_query", "search_document", "clustering", "classification")},
    matryoshka={
        "nomic-embed-text-v1.5": (768, 512, 256, 128, 64),
        "nomic-embed-text-v2-moe": (768, 256),
    },
    matryoshka_layer_norm=True,
)
