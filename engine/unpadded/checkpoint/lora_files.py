"""LoRA adapters in PEFT's files: one folder per task, with adapter_config.json and adapter_model.safetensors.

An adapter changes a weight to W + lora_alpha / r * B @ A, with one r and lora_alpha for all modules. Any other feature
of PEFT raises ConfigError, as does any key that is neither known here nor empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from unpadded.checkpoint.json_config import consistent, integer, not_implemented, positive, read_object
from unpadded.checkpoint.spec import LoraSpec
from unpadded.errors import CheckpointError, ConfigError, WeightsError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
SUPPORTED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # others also change the weights that training starts from
}
# Keys without effect on trained adapters, some of them settings of features that are not implemented.
IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}


def find_lora_files(lora: LoraSpec, folder: Path, config: Mapping[str, Any]) -> tuple[LoraSpec, tuple[Path, ...]]:
    """Return the adapters with their rank and scale, and the weight file of each; (lora, ()) if there is no file.

    folder: the encoder's. config: its config.json, which may state rank and alpha too. CheckpointError if only some of
    the files exist, ConfigError for what is contradictory or not implemented, WeightsError for missing safetensors.
    """
    absent = [name for name in lora.folders if not (folder / name / CONFIG).exists()]
    if len(absent) == len(lora.folders):
        return lora, ()
    if absent:
        raise CheckpointError(
            f"{folder} lacks some of its adapters: {', '.join(absent)}; download them, or remove all adapters"
        )
    found = {f"{name}/{CONFIG}": _rank_and_alpha(folder / name / CONFIG, lora.target_modules) for name in lora.folders}
    rank, alpha = next(iter(found.values()))
    found["config.json"] = (
        consistent(config, ("lora_rank",), integer) or rank,
        consistent(config, ("lora_alpha",), positive) or alpha,
    )
    if len(set(found.values())) > 1:
        values = ", ".join(f"{file} {value}" for file, value in found.items())
        raise ConfigError(
            f"the adapters of {folder} differ in (rank, alpha): {values}; only equal ones are implemented"
        )
    files = tuple(folder / name / WEIGHTS for name in lora.folders)
    for file in files:
        if not file.exists():
            raise WeightsError(f"{file} is absent, and pickled adapters are never loaded; add it as safetensors")
    return replace(lora, rank=rank, scale=alpha / rank), files


def _rank_and_alpha(path: Path, target_modules: tuple[str, ...]) -> tuple[int, float]:
    """Read the (rank, alpha) of an adapter that changes these modules entirely."""
    config = read_object(path)
    if missing := [key for key in REQUIRED if config.get(key) is None]:
        raise ConfigError(f"{path} lacks {', '.join(missing)}; add what the adapter was trained with")
    for key, value in config.items():
        if key in IGNORED or (key in REQUIRED and key not in SUPPORTED):
            continue
        supported = SUPPORTED.get(key, (None, False, {}, []))
        if value not in supported:
            raise not_implemented(f"{key} in {path}", value, supported[0])
    modules = config["target_modules"]
    if not isinstance(modules, list) or not set(target_modules) <= set(map(str, modules)):
        raise not_implemented(f"target_modules in {path}", modules, list(target_modules))
    return integer(config, "r"), positive(config, "lora_alpha")
