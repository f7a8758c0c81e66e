"""LoRA adapters in PEFT's files, adapter_config.json and adapter_model.safetensors: one folder per task, or one.

An adapter changes a weight to W + lora_alpha / r * B @ A, with one r and lora_alpha for all modules, and sqrt(r) for r
with use_rslora. Any other feature of PEFT raises ConfigError, as does any key that is neither known here nor empty.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from unpadded.checkpoint.json_config import not_implemented, optional, read_object, read_value
from unpadded.checkpoint.spec import LoraSpec
from unpadded.errors import ConfigError, WeightsError

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
    return _read(folder) if os.path.lexists(folder / CONFIG) else None


def find_lora_files(lora: LoraSpec, folder: Path) -> tuple[LoraSpec, tuple[Path, ...]]:
    """Return the adapters with their rank and scale, and the weight file of each; (lora, ()) if there is no file.

    folder: the encoder's. CheckpointError if only some of the files exist, ConfigError for what is contradictory or not
    implemented, WeightsError for missing safetensors.
    """
    if not any(os.path.exists(folder / name / CONFIG) for name in lora.folders):
        return lora, ()
    adapters = [_read(folder / name, lora.target_modules) for name in lora.folders]
    found = {adapter.file.parent.name: (adapter.rank, adapter.scale) for adapter in adapters}
    if len(set(found.values())) > 1:
        raise ConfigError(f"the adapters of {folder} differ in (rank, scale): {found}; only equal ones are implemented")
    rank, scale = found[lora.folders[0]]
    return replace(lora, rank=rank, scale=scale), tuple(adapter.file for adapter in adapters)


def _read(folder: Path, target_modules: tuple[str, ...] = ()) -> Adapter:
    """Read an adapter that changes all of these modules; (): those of its tensors."""
    path, file = folder / CONFIG, folder / WEIGHTS
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
    if not file.exists():
        raise WeightsError(f"{file} is absent, and pickled adapters are never loaded; add it as safetensors")
    rank = read_value(config, "r", int)
    alpha = read_value(config, "lora_alpha", float) * (math.sqrt(rank) if config.get("use_rslora") else 1)
    base_model = optional(config, "base_model_name_or_path", "")
    return Adapter(file=file, rank=rank, scale=alpha / rank, base_model=base_model)
