"""LoRA adapters in PEFT's files, adapter_config.json and adapter_model.safetensors: one folder per task, or one.

An adapter changes a weight to W + lora_alpha / r * B @ A, with one r and lora_alpha for all modules, and sqrt(r) for r
with use_rslora. Any other feature of PEFT raises ConfigError, as does any key that is neither known here nor empty.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unpadded.checkpoint.json_config import consistent, not_implemented, read_object, read_value
from unpadded.checkpoint.spec import LoraSpec
from unpadded.errors import CheckpointError, ConfigError, WeightsError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
SUPPORTED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False, True),
    "init_lora_weights": (True, False, "gaussian"),  # others also change the weights that training starts from
}
# Keys with rules of their own, then keys without effect on trained adapters, some of features that are not implemented.
OTHER_KEYS = (
    "r lora_alpha target_modules base_model_name_or_path auto_mapping inference_mode lora_dropout megatron_core "
    "peft_version qalora_group_size revision runtime_config task_type"
)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter in the encoder's folder, which is merged into the weights when they are loaded."""

    file: Path
    rank: int
    scale: float
    base_model: str  # hub id or folder of configuration and weights, unless they are in the adapter's folder


def read_adapter(folder: Path) -> Adapter | None:
    """Return the adapter in the encoder's folder, if any; errors as in `find_lora_files`."""
    path = folder / CONFIG
    if not os.path.lexists(path):
        return None
    rank, alpha = _rank_and_alpha(path)
    base_model = consistent(read_object(path), ("base_model_name_or_path",), str) or ""
    return Adapter(file=_weight_file(folder), rank=rank, scale=alpha / rank, base_model=base_model)


def find_lora_files(lora: LoraSpec, folder: Path, config: Mapping[str, Any]) -> tuple[LoraSpec, tuple[Path, ...]]:
    """Return the adapters with their rank and scale, and the weight file of each; (lora, ()) if there is no file.

    folder: the encoder's. config: its config.json, which may state rank and alpha too. CheckpointError if only some of
    the files exist, ConfigError for what is contradictory or not implemented, WeightsError for missing safetensors.
    """
    absent = [name for name in lora.folders if not os.path.exists(folder / name / CONFIG)]
    if len(absent) == len(lora.folders):
        return lora, ()
    if absent:
        raise CheckpointError(
            f"{folder} lacks some of its adapters: {', '.join(absent)}; download them, or remove all adapters"
        )
    found = {f"{name}/{CONFIG}": _rank_and_alpha(folder / name / CONFIG, lora.target_modules) for name in lora.folders}
    rank, alpha = next(iter(found.values()))
    found["config.json"] = (
        consistent(config, ("lora_rank",), int) or rank,
        consistent(config, ("lora_alpha",), float) or alpha,
    )
    if len(set(found.values())) > 1:
        values = ", ".join(f"{file} {value}" for file, value in found.items())
        raise ConfigError(
            f"the adapters of {folder} differ in (rank, alpha): {values}; only equal ones are implemented"
        )
    return replace(lora, rank=rank, scale=alpha / rank), tuple(_weight_file(folder / name) for name in lora.folders)


def _weight_file(folder: Path) -> Path:
    file = folder / WEIGHTS
    if not file.exists():
        raise WeightsError(f"{file} is absent, and pickled adapters are never loaded; add it as safetensors")
    return file


def _rank_and_alpha(path: Path, target_modules: tuple[str, ...] = ()) -> tuple[int, float]:
    """Read rank and effective alpha of an adapter that changes these modules entirely; (): those of its tensors."""
    config = read_object(path)
    if missing := [key for key in REQUIRED if config.get(key) is None]:
        raise ConfigError(f"{path} lacks {', '.join(missing)}; add what the adapter was trained with")
    for key, value in config.items():
        supported = SUPPORTED.get(key, (None, False, {}, []))
        if value not in supported and key not in OTHER_KEYS.split():
            raise not_implemented(f"{key} in {path}", value, supported[0])
    modules = config["target_modules"]
    if target_modules and not (isinstance(modules, list) and set(target_modules) <= set(map(str, modules))):
        raise not_implemented(f"target_modules in {path}", modules, list(target_modules))
    rank = read_value(config, "r", int)
    return rank, read_value(config, "lora_alpha", float) * (math.sqrt(rank) if config.get("use_rslora") else 1)
