"""Low-rank adapters as PEFT keeps them: a folder for each, with adapter_config.json and adapter_model.safetensors.

What PEFT would honor beside W + lora_alpha / r * B A, the same on every module, is refused, and so is any key that is
not known here and not empty.
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
NEEDED = ("peft_type", "r", "lora_alpha", "target_modules")
OFFERED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # others change the weights that they start from
}
# Of no consequence once trained; those of a kind of adapter that is refused among them.
HARMLESS = {
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


def find_lora_files(adapters: LoraSpec, folder: Path, config: Mapping[str, Any]) -> tuple[LoraSpec, tuple[Path, ...]]:
    """The adapters with their rank and scale, and the file of each; as they are and () where there is none.

    folder: of the encoder. config: its config.json, which may state rank and alpha too. CheckpointError where only some
    are there, ConfigError for what is contradictory or not implemented, WeightsError for one without safetensors.
    """
    absent = [name for name in adapters.folders if not (folder / name / CONFIG).exists()]
    if len(absent) == len(adapters.folders):
        return adapters, ()
    if absent:
        raise CheckpointError(f"{folder} lacks some of its adapters: {', '.join(absent)}; download them, or remove all")
    found = {f"{name}/{CONFIG}": _read(folder / name / CONFIG, adapters.target_modules) for name in adapters.folders}
    rank, alpha = next(iter(found.values()))
    stated = consistent(config, ("lora_rank",), integer) or rank, consistent(config, ("lora_alpha",), positive) or alpha
    if len({*found.values(), stated}) > 1:
        values = ", ".join(f"{file} {value}" for file, value in {**found, "config.json": stated}.items())
        raise ConfigError(
            f"the adapters of {folder} differ in (rank, alpha): {values}; only equal ones are implemented"
        )
    files = tuple(folder / name / WEIGHTS for name in adapters.folders)
    for file in files:
        if not file.exists():
            raise WeightsError(f"{file} is absent, and pickled adapters are never loaded; add it, as safetensors")
    return replace(adapters, rank=rank, scale=alpha / rank), files


def _read(path: Path, targets: tuple[str, ...]) -> tuple[int, float]:
    """(rank, alpha) of an adapter that changes the modules `targets`, each as a whole."""
    config = read_object(path)
    if lacking := [key for key in NEEDED if config.get(key) is None]:
        raise ConfigError(f"{path} lacks {', '.join(lacking)}; add what the adapter was trained with")
    for key, value in config.items():
        offered = OFFERED.get(key, (None, False, {}, []))
        if key not in HARMLESS and value not in offered and (key not in NEEDED or key in OFFERED):
            raise not_implemented(f"{key} in {path}", value, offered[0])
    modules = config["target_modules"]
    if not isinstance(modules, list) or not set(targets) <= set(map(str, modules)):
        raise not_implemented(f"target_modules in {path}", modules, list(targets))
    return integer(config, "r"), positive(config, "lora_alpha")
