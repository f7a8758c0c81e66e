"""jina-embeddings-v3: XLM-RoBERTa with rotary positions, and one LoRA adapter for each of five tasks.

Two layouts exist. In the published one, the adapters are stored with the encoder's tensors. In that of transformers 5
(jinaai/jina-embeddings-v3-hf), tensors have other names and each adapter is a PEFT folder inside the encoder's folder.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from unpadded.checkpoint.families import bert, nomic_bert
from unpadded.checkpoint.families.bert import ACTIVATIONS
from unpadded.checkpoint.families.nomic_bert import LAYER
from unpadded.checkpoint.family import TRANSFORMERS, Family, choice, encoder_tensors, sizes
from unpadded.checkpoint.json_config import allow_only, not_implemented, optional, required, section, unscaled_rotary
from unpadded.checkpoint.spec import EncoderSpec, LoraSpec, TensorSpec
from unpadded.errors import ConfigError

TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
TARGET_MODULES = ("word_embeddings", "token_type_embeddings", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
PUBLISHED_TYPE, TRANSFORMERS_TYPE = "xlm-roberta", "jina_embeddings_v3"
TABLES = ("word", "token_type")
PUBLISHED = {  # both published codes descend from that of flash-attn
    **nomic_bert.PUBLISHED,
    "qkv": f"{LAYER}.mixer.Wqkv",
    "out": f"{LAYER}.mixer.out_proj",
    "up": f"{LAYER}.mlp.fc1",
}
NOT_GATED = {**TRANSFORMERS, "up": "layers.{layer}.mlp.fc1", "down": "layers.{layer}.mlp.fc2"}


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Match by model_type, which the published layout shares with XLM-RoBERTa."""
    model_type, positions = config.get("model_type"), config.get("position_embedding_type")
    return model_type == TRANSFORMERS_TYPE or (model_type == PUBLISHED_TYPE and positions == "rotary")


def read_config(config: Mapping[str, Any]) -> EncoderSpec:
    allow_only(config, {"position_embedding_type": "rotary", "emb_pooler": None, "truncate_dim": None})
    return EncoderSpec(
        family="jina_v3",
        **sizes(config),
        token_types=required(config, ("type_vocab_size",), int),
        rotary=unscaled_rotary(config, "rotary_emb_base", "rope_theta"),
        activation=choice(config, "hidden_act", ACTIVATIONS, default="gelu"),
        norm_eps=optional(config, "layer_norm_eps", 1e-5),
        lora=_lora(config),
    )


def tensors(spec: EncoderSpec) -> dict[str, TensorSpec]:
    """Return the encoder's tensors, and the factors `lora.X.B` and `lora.X.A` of each matrix X that adapters change.

    An adapter adds scale * B @ A. The factors are those of one task if each task has a file, else of all tasks.
    """
    found = encoder_tensors(spec, PUBLISHED, NOT_GATED)
    if spec.lora is None or not spec.lora.rank:
        return found
    factors = _peft_factors if spec.lora.folders else _parametrized
    for name in [name for name, tensor in found.items() if len(tensor.shape) == 2]:
        found |= factors(name, found[name], spec.lora)
    return found


def _parametrized(name: str, tensor: TensorSpec, lora: LoraSpec) -> dict[str, TensorSpec]:
    """Return a weight and the factors of all tasks as torch's parametrization stores them, in the published layout."""
    (rows, columns), tasks = tensor.shape, len(lora.tasks)
    stored = tensor.alternatives[0][0].replace(".weight", ".parametrizations.weight")
    # the published code exchanges the names of a table's factors
    b, a = ("lora_A", "lora_B") if name in TABLES else ("lora_B", "lora_A")
    return {
        name: TensorSpec(tensor.shape, ((f"{stored}.original",),)),
        f"lora.{name}.B": TensorSpec((tasks, rows, lora.rank), ((f"{stored}.0.{b}",),)),
        f"lora.{name}.A": TensorSpec((tasks, lora.rank, columns), ((f"{stored}.0.{a}",),)),
    }


def _peft_factors(name: str, tensor: TensorSpec, lora: LoraSpec) -> dict[str, TensorSpec]:
    """Return the factors in the PEFT file of one task: separate ones for q, k and v, the transposes for a table."""
    (rows, columns), rank = tensor.shape, lora.rank
    alternatives = [[weight.removesuffix(".weight") for weight in names] for names in tensor.alternatives]
    stacked = len(alternatives[-1])
    if stacked > 1:  # in the published layout, too, q, k and v have the names of transformers
        alternatives[0] = [f"encoder.{module}" for module in alternatives[-1]]

    def factor(shape: tuple[int, int], parameter: str) -> TensorSpec:
        names = tuple(tuple(f"{module}.{parameter}" for module in modules) for modules in alternatives)
        return TensorSpec(shape, names, transposed=name in TABLES)

    if name in TABLES:
        b, a = factor((rank, rows), "lora_embedding_A"), factor((columns, rank), "lora_embedding_B")
    else:
        b, a = factor((rows, rank), "lora_B.weight"), factor((stacked * rank, columns), "lora_A.weight")
    return {f"lora.{name}.B": b, f"lora.{name}.A": a}


def _lora(config: Mapping[str, Any]) -> LoraSpec | None:
    """Read `lora_adaptations`, by default none in the published layout and TASKS in that of transformers."""
    in_folders = config.get("model_type") == TRANSFORMERS_TYPE
    tasks, instructions = config.get("lora_adaptations"), section(config, "task_instructions")
    if tasks is None and in_folders:
        tasks = list(TASKS)
    if tasks is None:
        return None
    if not isinstance(tasks, list) or not tasks or len({one for one in tasks if isinstance(one, str)}) != len(tasks):
        raise ConfigError(f"lora_adaptations = {tasks!r} is not a list of different task names; correct config.json")
    if not optional(config, "load_trained_adapters", True):
        raise not_implemented("load_trained_adapters", False, True)
    lora = LoraSpec(tasks=tuple(map(str, tasks)), prompts=tuple(str(instructions.get(task, "")) for task in tasks))
    if in_folders:
        folders = tuple(re.sub(r"\W", "_", task) for task in lora.tasks)
        return replace(lora, folders=folders, target_modules=TARGET_MODULES)
    rank = required(config, ("lora_rank",), int)
    return replace(lora, rank=rank, scale=required(config, ("lora_alpha",), float) / rank)


FAMILY = Family(
    matches=matches, read_config=read_config, tensors=tensors, score=bert.ROBERTA_FAMILY.score, max_length=8192
)
