"""jina-embeddings-v3: XLM-RoBERTa with rotary positions, and one LoRA adapter for each of five tasks."""

from collections.abc import Collection, Mapping
from typing import Any

from unpadded.checkpoint.families import bert, nomic_bert
from unpadded.checkpoint.families.bert import ACTIVATIONS
from unpadded.checkpoint.families.nomic_bert import LAYER
from unpadded.checkpoint.family import Family, choice, encoder_tensors, sizes
from unpadded.checkpoint.json_config import allow_only, optional, required, section, unscaled_rotary
from unpadded.checkpoint.spec import EncoderSpec, LoraSpec, TensorSpec
from unpadded.errors import ConfigError

TABLES = ("word", "token_type")
LAYOUT = {  # both published codes descend from that of flash-attn
    **nomic_bert.PUBLISHED,
    "qkv": f"{LAYER}.mixer.Wqkv",
    "out": f"{LAYER}.mixer.out_proj",
    "up": f"{LAYER}.mlp.fc1",
}


def matches(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Match by model_type, which is that of XLM-RoBERTa, and the positions."""
    return config.get("model_type") == "xlm-roberta" and config.get("position_embedding_type") == "rotary"


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

    An adapter adds scale * B @ A. The factors are those of all tasks.
    """
    found = encoder_tensors(spec, LAYOUT)
    if spec.lora:
        for name in [name for name, tensor in found.items() if len(tensor.shape) == 2]:
            found |= _parametrized(name, found[name], spec.lora)
    return found


def _parametrized(name: str, tensor: TensorSpec, lora: LoraSpec) -> dict[str, TensorSpec]:
    """Return a weight and the factors of all tasks as torch's parametrization stores them."""
    (rows, columns), tasks = tensor.shape, len(lora.tasks)
    stored = tensor.alternatives[0][0].replace(".weight", ".parametrizations.weight")
    # the published code exchanges the names of a table's factors
    b, a = ("lora_A", "lora_B") if name in TABLES else ("lora_B", "lora_A")
    return {
        name: TensorSpec(tensor.shape, ((f"{stored}.original",),)),
        f"lora.{name}.B": TensorSpec((tasks, rows, lora.rank), ((f"{stored}.0.{b}",),)),
        f"lora.{name}.A": TensorSpec((tasks, lora.rank, columns), ((f"{stored}.0.{a}",),)),
    }


def _lora(config: Mapping[str, Any]) -> LoraSpec | None:
    """Read `lora_adaptations`, by default none."""
    tasks, instructions = config.get("lora_adaptations"), section(config, "task_instructions")
    if tasks is None:
        return None
    if not isinstance(tasks, list) or not tasks or len({one for one in tasks if isinstance(one, str)}) != len(tasks):
        raise ConfigError(f"lora_adaptations = {tasks!r} is not a list of different task names; correct config.json")
    allow_only(config, {"load_trained_adapters": True})
    rank = required(config, ("lora_rank",), int)
    return LoraSpec(
        tasks=tuple(tasks),
        prompts=tuple(str(instructions.get(task, "")) for task in tasks),
        rank=rank,
        scale=required(config, ("lora_alpha",), float) / rank,
    )


FAMILY = Family(
    matches=matches, read_config=read_config, tensors=tensors, score=bert.ROBERTA_FAMILY.score, max_length=8192
)
