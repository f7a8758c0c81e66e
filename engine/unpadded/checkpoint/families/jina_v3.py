"""jina-embeddings-v3: XLM-RoBERTa with rotary positions, and a low-rank adapter for each of five tasks.

Its tensors have the published code's names, with the adapters among them, or those of transformers 5, whose checkpoints
(jinaai/jina-embeddings-v3-hf) keep each adapter in a folder of PEFT's beside the encoder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from unpadded.checkpoint.families.bert import ACTIVATIONS, named
from unpadded.checkpoint.family import PREFIXES, Family
from unpadded.checkpoint.json_config import (
    consistent,
    flag,
    integer,
    not_implemented,
    one_of,
    positive,
    require_defaults,
    required,
    rope_theta,
)
from unpadded.checkpoint.spec import EncoderSpec, LoraSpec, Rotary, TensorSpec
from unpadded.errors import ConfigError

TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
# what an adapter of PEFT's changes of the encoder: q, k and v have factors of their own there
TARGETS = ("word_embeddings", "token_type_embeddings", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
FOLDER = str.maketrans(".-", "__")  # of a task, from its name
PUBLISHED, MODERN = "xlm-roberta", "jina_embeddings_v3"
OFFERED: dict[str, Any] = {
    "position_embedding_type": "rotary",
    "emb_pooler": None,
    "truncate_dim": None,
    "is_decoder": False,
    "add_cross_attention": False,
}
PARAMETRIZED = ".parametrizations.weight"  # of torch, where the adapters lie beside what they change


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """By model_type, which the published one shares with XLM-RoBERTa."""
    model_type = config.get("model_type")
    return model_type == MODERN or (model_type == PUBLISHED and config.get("position_embedding_type") == "rotary")


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    """ConfigError for what is contradictory or not implemented."""
    require_defaults(config, OFFERED)
    hidden, heads = required(config, ("hidden_size",), integer), required(config, ("num_attention_heads",), integer)
    if hidden % heads or hidden // heads % 2:
        raise ConfigError(
            f"hidden_size = {hidden} does not make num_attention_heads = {heads} of an even width; correct config.json"
        )
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
        lora=_adapters(config),
    )


def tensors(spec: EncoderSpec) -> dict[str, TensorSpec]:
    """Return the shape and stored names of each tensor of the encoder: the published names, then transformers'.

    `lora.X.B` and `lora.X.A` hold the factors of X's change, of every task, or of one where each has a file. For a
    table of embeddings the published names A and B are exchanged, and PEFT stores the transposed factors.
    """
    hidden, intermediate = spec.hidden, spec.intermediate
    found: dict[str, TensorSpec] = {}

    def matrix(slot: str, rows: int, columns: int, published: str, *modern: str, table: bool = False) -> None:
        adapters = spec.lora
        if adapters is None or not adapters.rank or adapters.folders:
            found[slot] = TensorSpec(
                (rows, columns), ((f"{published}.weight",), tuple(f"{name}.weight" for name in modern))
            )
            if adapters is not None and adapters.rank:
                # published files have the encoder's names, but for q, k and v
                old = (published,) if len(modern) == 1 else tuple(f"encoder.{name}" for name in modern)
                found.update(_factors(slot, rows, columns, adapters.rank, (modern, old), table))
            return
        tasks, rank = len(adapters.tasks), adapters.rank
        of_rows, of_columns = ("A", "B") if table else ("B", "A")
        start = f"{published}{PARAMETRIZED}"
        found[slot] = named((rows, columns), f"{start}.original")
        found[f"lora.{slot}.B"] = named((tasks, rows, rank), f"{start}.0.lora_{of_rows}")
        found[f"lora.{slot}.A"] = named((tasks, rank, columns), f"{start}.0.lora_{of_columns}")

    def vectors(slot: str, size: int, part: str, published: str, *modern: str) -> None:
        alternatives = (published,), modern
        found[slot] = TensorSpec((size,), tuple(tuple(f"{name}.{part}" for name in names) for names in alternatives))

    for slot, rows in (("word", spec.vocabulary), ("token_type", spec.token_types)):
        name = f"embeddings.{slot}_embeddings"
        matrix(slot, rows, hidden, name, name, table=True)
    vectors("norm", hidden, "weight", "emb_ln", "embeddings.LayerNorm")
    vectors("norm_bias", hidden, "bias", "emb_ln", "embeddings.LayerNorm")
    for index in range(spec.layers):
        slot, published, modern = f"layers.{index}", f"encoder.layers.{index}", f"layers.{index}"
        qkv = [f"{modern}.self_attn.{part}_proj" for part in "qkv"]
        for field, rows, columns, old, new in (
            ("qkv", 3 * hidden, hidden, "mixer.Wqkv", qkv),
            ("out", hidden, hidden, "mixer.out_proj", [f"{modern}.self_attn.o_proj"]),
            ("up", intermediate, hidden, "mlp.fc1", [f"{modern}.mlp.fc1"]),
            ("down", hidden, intermediate, "mlp.fc2", [f"{modern}.mlp.fc2"]),
        ):
            matrix(f"{slot}.{field}", rows, columns, f"{published}.{old}", *new)
            vectors(f"{slot}.{field}_bias", rows, "bias", f"{published}.{old}", *new)
        for field, old, name in (
            ("attention_norm", "norm1", "post_attention_layernorm"),
            ("mlp_norm", "norm2", "post_mlp_layernorm"),
        ):
            vectors(f"{slot}.{field}", hidden, "weight", f"{published}.{old}", f"{modern}.{name}")
            vectors(f"{slot}.{field}_bias", hidden, "bias", f"{published}.{old}", f"{modern}.{name}")
    return found


def _factors(
    slot: str, rows: int, columns: int, rank: int, modules: tuple[tuple[str, ...], ...], table: bool
) -> dict[str, TensorSpec]:
    """Of one adapter in PEFT's file. modules: the names of those that lie stacked in the slot, in either spelling."""

    def factor(shape: tuple[int, int], part: str) -> TensorSpec:
        alternatives = tuple(tuple(f"{name}.{part}" for name in names) for names in modules)
        return TensorSpec(shape, alternatives, transposed=table)

    of_rows, of_columns = (
        (factor((rank, rows), "lora_embedding_A"), factor((columns, rank), "lora_embedding_B"))
        if table
        else (factor((rows, rank), "lora_B.weight"), factor((len(modules[0]) * rank, columns), "lora_A.weight"))
    )
    return {f"lora.{slot}.B": of_rows, f"lora.{slot}.A": of_columns}


def _adapters(config: Mapping[str, Any]) -> LoraSpec | None:
    """The published code makes adapters of `lora_adaptations`, and finds them in the file where told that they are."""
    apart = config.get("model_type") == MODERN
    tasks, instructions = config.get("lora_adaptations"), config.get("task_instructions") or {}
    if tasks is None and apart:
        tasks = list(TASKS)
    if tasks is None:
        return None
    if not isinstance(tasks, list) or not tasks or len({str(task) for task in tasks}) != len(tasks):
        raise ConfigError(f"lora_adaptations = {tasks!r} are not names of tasks; correct config.json")
    if not isinstance(instructions, dict) or not instructions.keys() <= set(tasks):
        raise ConfigError(f"task_instructions = {instructions!r} are not of the tasks {tasks!r}; correct config.json")
    if "load_trained_adapters" in config and not flag(config, "load_trained_adapters"):
        raise not_implemented("load_trained_adapters", False, True)
    adapters = LoraSpec(
        tasks=tuple(map(str, tasks)),
        prompts=tuple(str(instructions.get(task, "")) for task in tasks),
        rank=0,
        scale=0.0,
    )
    if apart:
        folders = tuple(task.translate(FOLDER) for task in adapters.tasks)
        if outside := [folder for folder in folders if not folder.isidentifier()]:
            raise ConfigError(f"lora_adaptations = {tasks!r} name no folders beside it: {outside}; correct config.json")
        return replace(adapters, folders=folders, target_modules=TARGETS)
    rank = required(config, ("lora_rank",), integer)
    return replace(adapters, rank=rank, scale=required(config, ("lora_alpha",), positive) / rank)


FAMILY = Family(
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    prefixes=(*PREFIXES, "base_model.model.", "roberta."),
    ignored=("lm_head.*", "pooler.*", "classifier.*", "*inv_freq"),
    max_length=8192,
)
