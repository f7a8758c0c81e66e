"""The interface of a family module: how checkpoints of one architecture are recognized, and their files read."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, TypeAlias

from unpadded.checkpoint.json_config import allow_only, not_implemented, optional, required
from unpadded.checkpoint.modules import Dense, Pooling
from unpadded.checkpoint.spec import Activation, EncoderSpec, TensorSpec
from unpadded.errors import ConfigError

GATES: Mapping[str, Activation] = {"gelu": "geglu", "silu": "swiglu", "swish": "swiglu"}
SIZE_KEYS = {
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
    "intermediate": "intermediate_size",
    "vocabulary": "vocab_size",
}
_PREFIXES = "0. auto_model. bert. distilbert. gte. model. module. mpnet. new. nomic_bert. roberta."
PREFIXES = _PREFIXES.split()  # removed from stored names, repeatedly
_IGNORED = "*inv_freq classifier.* cls.* decoder.* embeddings.*_ids head.* lm_head.* pooler.* pre_classifier.* vocab_*"
IGNORED = _IGNORED.split()  # patterns of stored names, without prefix, that no encoder needs
# Names of a checkpoint's modules by tensor of the encoder; several are stacked along dim 0. In a layer's modules,
# {layer} is the layer's index and {next} that of the next one.
Layout: TypeAlias = Mapping[str, str | tuple[str, ...]]
OUTSIDE_LAYERS = ("word", "token_type", "position", "norm", "position_bias")
# that of newer families in transformers, whose embeddings have the names of BERT's
TRANSFORMERS: Layout = {
    "word": "embeddings.word_embeddings",
    "token_type": "embeddings.token_type_embeddings",
    "position": "embeddings.position_embeddings",
    "norm": "embeddings.LayerNorm",
    "qkv": tuple(f"layers.{{layer}}.self_attn.{part}_proj" for part in "qkv"),
    "out": "layers.{layer}.self_attn.o_proj",
    "attention_norm": "layers.{layer}.post_attention_layernorm",
    "up": ("layers.{layer}.mlp.gate_proj", "layers.{layer}.mlp.up_proj"),
    "down": "layers.{layer}.mlp.down_proj",
    "mlp_norm": "layers.{layer}.post_mlp_layernorm",
}

# Returns the pooling of a model for sequence classification and what follows it, from config.json and labels.
ScoreLayers: TypeAlias = Callable[[EncoderSpec, Mapping[str, Any], int], tuple[Pooling, tuple[Dense, ...]]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Functions and defaults for the checkpoints of one architecture."""

    matches: Callable[[Mapping[str, Any], Collection[str]], bool]  # from config.json and the stored tensors' names
    read_config: Callable[[Mapping[str, Any]], EncoderSpec]  # raises ConfigError for what is not implemented
    tensors: Callable[[EncoderSpec], dict[str, TensorSpec]]  # as `encoder_tensors`
    score: ScoreLayers | None = None
    # the layers before the word embeddings in a model for masked tokens, then their bias; from config.json
    mlm: Callable[[EncoderSpec, Mapping[str, Any]], tuple[Dense, ...]] | None = None
    max_length: int | None = None  # tokens, if no file states a length; None: as many as there are learned positions
    prompts: Mapping[str, str] = field(default_factory=dict)  # task -> prompt, if no file states any
    matryoshka: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # published model -> trained dimensions
    matryoshka_layer_norm: bool = False  # apply LayerNorm without weights before vectors are cut


def by_type_or_name(*model_types: str, suffixes: tuple[str, ...] = ()) -> Callable[..., bool]:
    """Return a `matches`: by model_type, or without one by the end of a stored tensor's name."""
    return lambda config, names: (
        any(name.endswith(suffixes) for name in names)
        if config.get("model_type") is None
        else config["model_type"] in model_types
    )


def sizes(config: Mapping[str, Any], *, rotary: bool = True) -> dict[str, Any]:
    """Read the sizes of an encoder, by field of EncoderSpec, from the keys that most families share; no decoder.

    Heads are of equal width, an even one if rotary.
    """
    allow_only(config, {"is_decoder": False, "add_cross_attention": False})
    found = {name: required(config, (key,), int) for name, key in SIZE_KEYS.items()}
    hidden, heads = found["hidden"], found["heads"]
    if hidden % heads or (rotary and hidden // heads % 2):
        width = "an even" if rotary else "equal"
        raise ConfigError(
            f"hidden_size = {hidden} does not divide into num_attention_heads = {heads} heads of {width} width; "
            "correct config.json"
        )
    allow_only(config, {"head_dim": hidden // heads})
    return found


def choice(config: Mapping[str, Any], key: str, choices: Mapping[str, Activation], *, default: str) -> Activation:
    """Return what `choices` has for the value of a key, or for the default if the key is absent or null."""
    value = optional(config, key, default)
    if value not in choices:
        raise not_implemented(key, value, ", ".join(choices))
    return choices[value]


def encoder_tensors(
    spec: EncoderSpec, *layouts: Layout, last_mlp_norm: str = "", up_before_gate: tuple[str, ...] = ()
) -> dict[str, TensorSpec]:
    """Return the encoder's tensors that have rows, by field of the weights, such as layers.0.qkv_bias.

    layouts: the same tensors' names in each kind of checkpoint. last_mlp_norm: the name of the last layer's, if it
    differs from the layout's. up_before_gate: as in `TensorSpec`.
    """
    hidden, kv_rows = spec.hidden, 2 * (spec.kv_heads or 0) * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "word": (spec.vocabulary, hidden),
        "token_type": (spec.token_types, hidden),
        "position": (spec.position_rows, hidden),
        "position_bias": (32, spec.heads),  # by `EncoderSpec.distance_buckets`
        "qkv": (0 if kv_rows else 3 * hidden, hidden),
        "q": (hidden if kv_rows else 0, hidden),
        "kv": (kv_rows, hidden),
        "out": (hidden, hidden),
        "up": (spec.up_rows, hidden),
        "down": (hidden, spec.intermediate),
    }
    found: dict[str, TensorSpec] = {}
    for layer, name in product(range(spec.layers), layouts[0]):
        field = name if name in OUTSIDE_LAYERS else f"layers.{layer}.{name}"
        shape = shapes.get(name, (hidden,))
        if field in found or not shape[0]:
            continue
        renamed = name == "mlp_norm" and last_mlp_norm and layer == spec.layers - 1
        spellings = [last_mlp_norm] if renamed else [layout[name] for layout in layouts]
        stacked = [(names,) if isinstance(names, str) else names for names in dict.fromkeys(spellings)]
        modules = [tuple(part.format(layer=layer, next=layer + 1) for part in parts) for parts in stacked]
        # checkpoints converted from TensorFlow, such as bert-base-uncased, keep gamma and beta of its norms
        weight, bias = (("weight", "gamma"), ("bias", "beta")) if name.endswith("norm") else (("weight",), ("bias",))
        found[field] = TensorSpec(shape, _parameters(modules, weight), up_before_gate if name == "up" else ())
        if name in spec.biases or (name.endswith("norm") and "norm" in spec.biases):
            found[f"{field}_bias"] = TensorSpec(shape[:1], _parameters(modules, bias))
    return found


def cls_head(dense: str, classifier: str, activation: str = "tanh") -> ScoreLayers:
    """Return the layers after the first token: one with an activation and the classifier, by their stored names."""

    def score(spec: EncoderSpec, config: Mapping[str, Any], labels: int) -> tuple[Pooling, tuple[Dense, ...]]:
        first = Dense(name=dense, shape=(spec.hidden, spec.hidden), activation=activation)
        return "cls", (first, Dense(name=classifier, shape=(labels, spec.hidden)))

    return score


def remove_prefixes(name: str) -> str:
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def _parameters(modules: Iterable[tuple[str, ...]], names: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(f"{part}.{name}" for part in parts) for parts in modules for name in names)
