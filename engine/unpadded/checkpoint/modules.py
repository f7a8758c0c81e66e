"""Modules after the encoder, read from sentence-transformers' files: a pooling, then Dense modules, then Normalize."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from unpadded.checkpoint.json_config import flag, integer, not_implemented, read_json, read_object
from unpadded.errors import ConfigError, WeightsError

Pooling = Literal["mean", "cls", "last"]

POOLING_MODES: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
POOLING_FLAGS = {  # one flag per mode, as written before sentence-transformers 5
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
DENSE_ACTIVATIONS: dict[str, Literal["identity", "tanh"]] = {"Identity": "identity", "Tanh": "tanh"}
TASK_TRANSFORMER = "custom_st.Transformer"  # of jina-embeddings-v3: a Transformer with an argument `task`
ORDER = ("Transformer", "Pooling", "Dense", "Normalize")


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A linear layer on the pooled vector."""

    weight_file: Path  # safetensors with linear.weight [out_features, in_features], and linear.bias
    in_features: int
    out_features: int
    bias: bool
    activation: Literal["identity", "tanh"]


@dataclass(frozen=True, kw_only=True)
class Modules:
    """The modules of a checkpoint, always in this order: Transformer, Pooling, Dense ..., Normalize."""

    transformer: Path  # folder of the encoder and its tokenizer
    pooling: Pooling
    dense: tuple[Dense, ...]
    normalize: bool
    defaults: tuple[str, ...]  # one phrase per setting that no file states
    takes_task: bool = False  # the first module is a TASK_TRANSFORMER


def read_modules(folder: Path) -> Modules:
    """Read modules.json and the files it names.

    Without it, the defaults are those of sentence-transformers: mean pooling, not normalized.
    """
    path = folder / "modules.json"
    if not path.exists():
        pooling, defaults = _read_pooling(folder / "1_Pooling")
        not_normalized = "normalize=False: there is no modules.json"
        return Modules(
            transformer=folder, pooling=pooling, dense=(), normalize=False, defaults=(*defaults, not_normalized)
        )

    listed, takes_task = _list_modules(path)
    kinds = [kind for kind, _ in listed]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds != sorted(kinds, key=ORDER.index) or kinds.count("Pooling") > 1:
        raise not_implemented(str(path), ", ".join(kinds), "Transformer, Pooling, Dense (any number), Normalize")
    pooling, defaults = _read_pooling(listed[1][1])
    for kind, module in listed:
        if kind in ("Dense", "Normalize"):
            _check_input_and_output(module / "config.json")
    return Modules(
        transformer=listed[0][1],
        pooling=pooling,
        dense=tuple(_read_dense(module) for kind, module in listed if kind == "Dense"),
        normalize="Normalize" in kinds,
        defaults=defaults,
        takes_task=takes_task,
    )


def output_width(modules: Modules, hidden: int) -> int:
    """Return the width of the vectors after the last module; ConfigError if two modules do not fit together."""
    width = hidden
    for dense in modules.dense:
        if dense.in_features != width:
            raise ConfigError(
                f"in_features = {dense.in_features} in {dense.weight_file.parent}/config.json does not fit "
                f"its input of {width} dimensions; correct it"
            )
        width = dense.out_features
    return width


def _list_modules(path: Path) -> tuple[list[tuple[str, Path]], bool]:
    """Return kind and folder of each module, and whether the first one takes a task."""
    modules = []
    entries = read_json(path)
    try:
        types_and_paths = [(str(entry["type"]), str(entry["path"])) for entry in entries]
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{path} lists no modules with type and path: {entries!r:.200}; correct it") from error
    takes_task = bool(types_and_paths) and types_and_paths[0][0] == TASK_TRANSFORMER
    for class_name, subfolder in types_and_paths:
        kind = class_name.rpartition(".")[2]
        if not class_name.startswith(("sentence_transformers.", TASK_TRANSFORMER)) or kind not in ORDER:
            raise not_implemented(f"the module type in {path}", class_name, ", ".join(ORDER))
        if PurePosixPath(subfolder).is_absolute() or ".." in PurePosixPath(subfolder).parts:
            raise ConfigError(f"{path} names {subfolder!r}, outside the checkpoint; correct it")
        modules.append((kind, path.parent / subfolder))
    return modules, takes_task


def _read_pooling(folder: Path) -> tuple[Pooling, tuple[str, ...]]:
    path = folder / "config.json"
    if not path.exists():
        return "mean", (f"pooling='mean': there is no {folder.name}/config.json",)
    config = read_object(path)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in POOLING_FLAGS.items() if config.get(key)] or ["mean"]
    if isinstance(modes, str):
        modes = [modes]
    if len(modes) != 1 or modes[0] not in POOLING_MODES:
        raise not_implemented(f"pooling_mode in {path}", modes, ", ".join(POOLING_MODES))
    if config.get("include_prompt") is False:
        raise not_implemented(f"include_prompt in {path}", False, True)
    return POOLING_MODES[modes[0]], ()


def _read_dense(folder: Path) -> Dense:
    path = folder / "config.json"
    config = read_object(path)
    for key in ("in_features", "out_features"):
        if key not in config:
            raise ConfigError(f"{path} lacks {key} (found: {', '.join(sorted(config))}); add it")
    if config.get("use_residual"):
        raise not_implemented(f"use_residual in {path}", config["use_residual"], False)
    class_name = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    activation = str(class_name).rpartition(".")[2]
    if not str(class_name).startswith("torch.") or activation not in DENSE_ACTIVATIONS:
        raise not_implemented(f"activation_function in {path}", class_name, ", ".join(DENSE_ACTIVATIONS))
    weight_file = folder / "model.safetensors"
    if not weight_file.exists():
        present = ", ".join(sorted(entry.name for entry in folder.iterdir()))
        raise WeightsError(
            f"{weight_file} is absent (found: {present}); pickled weights are never loaded; convert them to safetensors"
        )
    return Dense(
        weight_file=weight_file,
        in_features=integer(config, "in_features"),
        out_features=integer(config, "out_features"),
        bias="bias" not in config or flag(config, "bias"),
        activation=DENSE_ACTIVATIONS[activation],
    )


def _check_input_and_output(path: Path) -> None:
    """Raise ConfigError for a module that reads or writes anything but the pooled vector."""
    config: dict[str, Any] = read_object(path) if path.exists() else {}
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise not_implemented(f"{key} in {path}", config[key], "sentence_embedding")
