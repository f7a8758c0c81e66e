"""jina-embeddings-v3: XLM-RoBERTa with rotary positions, and one LoRA adapter for each of five tasks.

Two layouts exist. In the published one, the adapters are stored with the encoder's tensors. In that of transformers 5
(jinaai/jina-embeddings-v3-hf), tensors have other names and each adapter is a PEFT folder inside the encoder's folder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from unpadded.checkpoint.families.bert import ACTIVATIONS
from unpadded.checkpoint.family import PREFIXES, Family
from unpadded.checkpoint.json_config import (
    consistent,
    flag,
    hidden_and_heads,
    integer,
    not_implemented,
    one_of,
    positive,
    require_defaults,
    required,
    rope_theta,
)
from unpadded.checkpoint.spec import EncoderSpec, LoraSpec, Rotary, TensorSpec, weight_and_bias
from unpadded.errors import ConfigError

TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
TARGET_MODULES = ("word_embeddings", "token_type_embeddings", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
PUBLISHED_TYPE, TRANSFORMERS_TYPE = "xlm-roberta", "jina_embeddings_v3"
DEFAULTS: dict[str, Any] = {
    "position_embedding_type": "rotary",
    "emb_pooler": None,
    "truncate_dim": None,
    "is_decoder": False,
    "add_cross_attention": False,
}


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Match by model_type, which the published layout shares with XLM-RoBERTa."""
    model_type, positions = config.get("model_type"), config.get("position_embedding_type")
    return model_type == TRANSFORMERS_TYPE or (model_type == PUBLISHED_TYPE and positions == "rotary")


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    require_defaults(config, DEFAULTS)
    hidden, heads = hidden_and_heads(config)
    return EncoderSpec(
        family="jina_v3",
        layers=required(config, ("num_hidden_layers",), integer),
        hidden=hidden,
        heads=heads,
        intermediate=required(config, ("intermediate_size",), integer),
        vocabulary=required(config, ("vocab_size",), integer),
        token_types=required(config, ("type_vocab_size",), integer),
        position_rows=0,
        rotary=Rotary(
            base=rope_theta(config, "rotary_emb_base", "rope_theta"),
            trained_length=consistent(config, ("max_position_embeddings",), integer) or 8192,
        ),
        activation=ACTIVATIONS[one_of({"hidden_act": "gelu", **config}, "hidden_act", ACTIVATIONS)],
        norm_eps=consistent(config, ("layer_norm_eps",), positive) or 1e-5,
        qkv_bias=True,
        out_bias=True,
        up_bias=True,
        down_bias=True,
        lora=_lora(config),
    )


class _Module(NamedTuple):
    """A module of the encoder: the shape of its weight and its names in both layouts."""

    shape: tuple[int, ...]
    published: str
    transformers: tuple[str, ...]  # several are stacked: q, k and v

    @property
    def is_table(self) -> bool:
        return self.published.startswith("embeddings.")


def tensors(spec: EncoderSpec) -> dict[str, TensorSpec]:
    """Return the encoder's tensors, and the factors `lora.X.B` and `lora.X.A` of each matrix X that adapters change.

    An adapter adds scale * B @ A. The factors are those of one task if each task has a file, else of all tasks.
    """
    lora = spec.lora if spec.lora is not None and spec.lora.rank else None
    found: dict[str, TensorSpec] = {}
    for name, module in _modules(spec).items():
        stored = weight_and_bias(name, module.shape, module.published, module.transformers, bias=not module.is_table)
        if lora is None or len(module.shape) == 1:
            found |= stored
        elif lora.folders:
            found |= stored | _peft_factors(name, module, lora.rank)
        else:
            found |= stored | _parametrized(name, module, lora)
    return found


def _modules(spec: EncoderSpec) -> dict[str, _Module]:
    hidden, intermediate = spec.hidden, spec.intermediate
    word, token_type = "embeddings.word_embeddings", "embeddings.token_type_embeddings"
    modules = {
        "word": _Module((spec.vocabulary, hidden), word, (word,)),
        "token_type": _Module((spec.token_types, hidden), token_type, (token_type,)),
        "norm": _Module((hidden,), "emb_ln", ("embeddings.LayerNorm",)),
    }
    for index in range(spec.layers):
        layer, old = f"layers.{index}", f"encoder.layers.{index}"
        qkv = tuple(f"{layer}.self_attn.{part}_proj" for part in "qkv")
        modules |= {
            f"{layer}.qkv": _Module((3 * hidden, hidden), f"{old}.mixer.Wqkv", qkv),
            f"{layer}.out": _Module((hidden, hidden), f"{old}.mixer.out_proj", (f"{layer}.self_attn.o_proj",)),
            f"{layer}.attention_norm": _Module((hidden,), f"{old}.norm1", (f"{layer}.post_attention_layernorm",)),
            f"{layer}.up": _Module((intermediate, hidden), f"{old}.mlp.fc1", (f"{layer}.mlp.fc1",)),
            f"{layer}.down": _Module((hidden, intermediate), f"{old}.mlp.fc2", (f"{layer}.mlp.fc2",)),
            f"{layer}.mlp_norm": _Module((hidden,), f"{old}.norm2", (f"{layer}.post_mlp_layernorm",)),
        }
    return modules


def _parametrized(name: str, module: _Module, lora: LoraSpec) -> dict[str, TensorSpec]:
    """Return a weight and the factors of all tasks as torch's parametrization stores them, in the published layout."""
    (rows, columns), tasks = module.shape, len(lora.tasks)
    stored = f"{module.published}.parametrizations.weight"
    # the published code exchanges the names of a table's factors
    b, a = ("lora_A", "lora_B") if module.is_table else ("lora_B", "lora_A")
    return {
        name: TensorSpec(module.shape, ((f"{stored}.original",),)),
        f"lora.{name}.B": TensorSpec((tasks, rows, lora.rank), ((f"{stored}.0.{b}",),)),
        f"lora.{name}.A": TensorSpec((tasks, lora.rank, columns), ((f"{stored}.0.{a}",),)),
    }


def _peft_factors(name: str, module: _Module, rank: int) -> dict[str, TensorSpec]:
    """Return the factors in the PEFT file of one task: separate ones for q, k and v, the transposes for a table."""
    rows, columns = module.shape
    stacked = len(module.transformers)
    # in the published layout, too, q, k and v have the names of transformers
    published = (module.published,) if stacked == 1 else tuple(f"encoder.{part}" for part in module.transformers)

    def factor(shape: tuple[int, int], parameter: str) -> TensorSpec:
        names = tuple(tuple(f"{part}.{parameter}" for part in parts) for parts in (module.transformers, published))
        return TensorSpec(shape, names, transposed=module.is_table)

    if module.is_table:
        b, a = factor((rank, rows), "lora_embedding_A"), factor((columns, rank), "lora_embedding_B")
    else:
        b, a = factor((rows, rank), "lora_B.weight"), factor((stacked * rank, columns), "lora_A.weight")
    return {f"lora.{name}.B": b, f"lora.{name}.A": a}


def _lora(config: Mapping[str, Any]) -> LoraSpec | None:
    """Read `lora_adaptations`, by default none in the published layout and TASKS in that of transformers."""
    in_folders = config.get("model_type") == TRANSFORMERS_TYPE
    tasks, instructions = config.get("lora_adaptations"), config.get("task_instructions") or {}
    if tasks is None and in_folders:
        tasks = list(TASKS)
    if tasks is None:
        return None
    if not isinstance(tasks, list) or not tasks or len({str(task) for task in tasks}) != len(tasks):
        raise ConfigError(f"lora_adaptations = {tasks!r} is not a list of different task names; correct config.json")
    if not isinstance(instructions, dict) or not instructions.keys() <= set(tasks):
        raise ConfigError(
            f"task_instructions = {instructions!r} does not map tasks of {tasks!r} to prompts; correct config.json"
        )
    if "load_trained_adapters" in config and not flag(config, "load_trained_adapters"):
        raise not_implemented("load_trained_adapters", False, True)
    lora = LoraSpec(
        tasks=tuple(map(str, tasks)),
        prompts=tuple(str(instructions.get(task, "")) for task in tasks),
        rank=0,
        scale=0.0,
    )
    if in_folders:
        folders = tuple(task.replace(".", "_").replace("-", "_") for task in lora.tasks)
        if wrong := [folder for folder in folders if not folder.isidentifier()]:
            raise ConfigError(f"lora_adaptations = {tasks!r} cannot be folder names: {wrong}; correct config.json")
        return replace(lora, folders=folders, target_modules=TARGET_MODULES)
    rank = required(config, ("lora_rank",), integer)
    return replace(lora, rank=rank, scale=required(config, ("lora_alpha",), positive) / rank)


FAMILY = Family(
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    prefixes=(*PREFIXES, "base_model.model.", "roberta."),
    ignored=("lm_head.*", "pooler.*", "classifier.*", "*inv_freq"),
    max_length=8192,
)
