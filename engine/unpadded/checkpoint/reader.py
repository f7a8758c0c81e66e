"""Read and validate a model's files, except for the values of its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from unpadded.checkpoint.families import FAMILIES
from unpadded.checkpoint.family import Family
from unpadded.checkpoint.hub import fetch
from unpadded.checkpoint.json_config import consistent, integer, not_implemented, positive, read_object
from unpadded.checkpoint.lora_files import find_lora_files
from unpadded.checkpoint.modules import TASK_TRANSFORMER, Dense, Pooling, output_width, read_modules
from unpadded.checkpoint.safetensors_header import StoredTensor, read_headers
from unpadded.checkpoint.spec import EncoderSpec
from unpadded.errors import CheckpointError, ConfigError, OptionError, WeightsError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
MODEL_CONFIG = "config_sentence_transformers.json"
WORD_EMBEDDINGS = ("embeddings.word_embeddings.weight", "embeddings.tok_embeddings.weight", "embed_tokens.weight")
NO_LIMIT = 1_000_000  # tokenizers without a limit state 1e30
# loading arguments of sentence-transformers that do not change the vectors
IGNORED_ARGUMENTS = {"trust_remote_code", "dtype", "torch_dtype", "attn_implementation", "add_pooling_layer"}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Configuration of a model, complete and validated, and the places of its weights."""

    name: str  # hub id or name of the folder
    folder: Path  # holds the encoder's config.json, weights and tokenizer
    config: dict[str, Any]
    spec: EncoderSpec
    weight_files: tuple[Path, ...]
    lora_files: tuple[Path, ...]  # one per task, if not stored with the encoder
    pooling: Pooling
    normalize: bool
    dense: tuple[Dense, ...]
    prompts: dict[str, str]  # prompt name or task -> text before the input
    default_prompt: str | None  # key of prompts
    lower_case: bool
    max_length: int  # tokens, including special tokens
    matryoshka: tuple[int, ...]  # dimensions with which the model was trained; () without matryoshka training
    matryoshka_layer_norm: bool  # apply LayerNorm without weights before vectors are cut
    defaults: tuple[str, ...]  # one phrase per setting that no file states

    def describe(self) -> dict[str, Any]:
        """Return the main fields as plain values, for `unpadded info` and JSON."""
        return {
            "model": self.name,
            "encoder": asdict(self.spec),
            "pooling": self.pooling,
            "normalize": self.normalize,
            "prompts": self.prompts,
            "default_prompt": self.default_prompt,
            "max_length": self.max_length,
            "matryoshka": list(self.matryoshka),
            "defaults": list(self.defaults),
        }


def open_checkpoint(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    max_length: int | None = None,
    rotary_scaling_factor: float | Literal["config"] | None = "config",
) -> Checkpoint:
    """Read the configuration of a folder, or of a hub id, which is downloaded first.

    CheckpointError for files that are absent or broken, ConfigError for what is contradictory or not implemented,
    OptionError for an argument that does not fit the model.
    """
    root, name = _locate(model, revision)
    modules = read_modules(root)
    folder = modules.transformer
    config = read_object(folder / "config.json")
    weight_files = _weight_files(folder)
    stored = read_headers(weight_files)
    family = _family(config, stored, folder)
    spec = _with_stored_vocabulary(family.read_config(config), stored)
    spec = _with_scaling(spec, rotary_scaling_factor)
    lora_files: tuple[Path, ...] = ()
    if spec.lora:
        lora, lora_files = find_lora_files(spec.lora, folder, config)
        spec = replace(spec, lora=lora)
    if modules.takes_task and spec.lora is None:
        raise not_implemented(
            f"the first module of {root / 'modules.json'}", TASK_TRANSFORMER, "sentence_transformers' Transformer"
        )
    width = output_width(modules, spec.hidden)

    transformer_config = _read_transformer_config(folder)
    model_config = _read_if_present(root / MODEL_CONFIG)
    prompts, default_prompt, prompt_defaults = _prompts(model_config, family)
    if spec.lora:
        prompts = dict(zip(spec.lora.tasks, spec.lora.prompts, strict=True)) | prompts
    length, length_defaults = _max_length(max_length, transformer_config, folder, family, spec)
    merged = {**config, **model_config}
    matryoshka = _matryoshka(merged, family, name, root, width)
    return Checkpoint(
        name=name,
        folder=folder,
        config=config,
        spec=spec,
        weight_files=weight_files,
        lora_files=lora_files,
        pooling=modules.pooling,
        normalize=modules.normalize,
        dense=modules.dense,
        prompts=prompts,
        default_prompt=default_prompt,
        lower_case=bool(transformer_config.get("do_lower_case", False)),
        max_length=length,
        matryoshka=matryoshka,
        matryoshka_layer_norm=bool(matryoshka and merged.get("matryoshka_layer_norm", family.matryoshka_layer_norm)),
        defaults=(*modules.defaults, *prompt_defaults, *length_defaults),
    )


def _locate(model: str | os.PathLike[str], revision: str | None) -> tuple[Path, str]:
    """Return the model's folder, which is downloaded for a hub id, and its name."""
    path, name = Path(model).expanduser(), os.fspath(model)
    if path.is_dir() and name:
        if revision is not None:
            raise OptionError(f"revision = {revision!r} does not apply to a folder, {path}; omit it")
        return path, path.resolve().name
    if path.is_file():
        raise CheckpointError(f"{path} is a file; pass the folder that contains config.json, or a hub id")
    if not isinstance(model, str) or name.startswith((".", "~", os.sep)) or name.count("/") > 1 or not name:
        raise CheckpointError(f"there is no folder {name!r}; pass an existing folder, or a hub id (owner/name)")
    return fetch(name, revision), name


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """Return model.safetensors, or the shards that its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return (single,)
    if index.exists():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise WeightsError(f"{index} has no weight_map: {weight_map!r}; download it again")
        shards = sorted({str(name) for name in weight_map.values()})
        outside = [name for name in shards if Path(name).name != name]
        if outside:
            raise WeightsError(f"{index} names {outside}, outside the checkpoint; correct it")
        absent = [name for name in shards if not (folder / name).exists()]
        if absent:
            raise WeightsError(f"{index} names {', '.join(absent)}, absent from {folder}; download them")
        return tuple(folder / name for name in shards)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise WeightsError(
            f"{folder} contains only pickled weights ({', '.join(pickles)}), which are never loaded; "
            "convert them to safetensors, or use a revision with model.safetensors"
        )
    raise WeightsError(f"{folder} contains neither {single.name} nor {index.name}; add the weights")


def _family(config: Mapping[str, Any], stored: list[StoredTensor], folder: Path) -> Family:
    names = [tensor.name for tensor in stored]
    for family in FAMILIES.values():
        if family.matches(config, names):
            return family
    raise not_implemented(f"model_type in {folder / 'config.json'}", config.get("model_type"), ", ".join(FAMILIES))


def _with_stored_vocabulary(spec: EncoderSpec, stored: list[StoredTensor]) -> EncoderSpec:
    """Count the rows of the stored word embeddings: those beyond the stated vocabulary are padding."""
    tables = [tensor for tensor in stored if tensor.name.endswith(WORD_EMBEDDINGS)]
    rows = tables[0].shape[0] if len(tables) == 1 and tables[0].shape else spec.vocabulary
    return replace(spec, vocabulary=max(rows, spec.vocabulary))


def _with_scaling(spec: EncoderSpec, factor: float | Literal["config"] | None) -> EncoderSpec:
    if factor == "config":
        return spec
    if factor is not None and (isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 1e6):
        raise OptionError(f"rotary_scaling_factor = {factor!r} is not supported; use 'config', None or a number")
    if spec.rotary is None:
        if factor is None:
            return spec
        raise OptionError(
            f"rotary_scaling_factor = {factor!r} does not apply: {spec.family} has no rotary embedding; omit it"
        )
    return replace(spec, rotary=replace(spec.rotary, scaling_factor=None if factor is None else float(factor)))


def _read_if_present(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def _read_transformer_config(folder: Path) -> dict[str, Any]:
    """Read sentence_bert_config.json, or the file with another model type in its name."""
    paths = sorted(folder.glob("sentence_*_config.json"))
    config = read_object(paths[0]) if paths else {}
    for key in ("config_args", "config_kwargs", "model_args", "model_kwargs", "tokenizer_args", "processor_kwargs"):
        if unknown := sorted(set(config.get(key) or {}) - IGNORED_ARGUMENTS):
            raise not_implemented(f"{key} in {paths[0]}", unknown, sorted(IGNORED_ARGUMENTS))
    if config.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise not_implemented(f"transformer_task in {paths[0]}", config["transformer_task"], "feature-extraction")
    return config


def _prompts(model_config: Mapping[str, Any], family: Family) -> tuple[dict[str, str], str | None, tuple[str, ...]]:
    prompts = model_config.get("prompts") or {}
    default = model_config.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise ConfigError(f"prompts = {prompts!r:.200} is not an object of strings; correct {MODEL_CONFIG}")
    if default is not None and default not in prompts:
        raise ConfigError(
            f"default_prompt_name = {default!r} is not among the prompts {sorted(prompts)}; correct {MODEL_CONFIG}"
        )
    # sentence-transformers writes empty query and document prompts into every model it saves
    if any(prompts.values()) or default is not None or not family.prompts:
        return dict(prompts), default, ()
    return dict(family.prompts), None, (f"prompts={', '.join(family.prompts)}: no file states any",)


def _max_length(
    requested: int | None, transformer_config: Mapping[str, Any], folder: Path, family: Family, spec: EncoderSpec
) -> tuple[int, tuple[str, ...]]:
    """Return the requested length, else that of sentence-transformers' file, the tokenizer's, or the family's."""
    if requested is not None:
        if isinstance(requested, bool) or not isinstance(requested, int) or requested < 1:
            raise OptionError(f"max_length = {requested!r} is not a whole number of tokens; use at least 1")
        if spec.position_limit and requested > spec.position_limit:
            raise OptionError(
                f"max_length = {requested} exceeds the {spec.position_limit} learned positions of the model; "
                f"use at most {spec.position_limit}"
            )
        return requested, ()
    tokenizer_config = _read_if_present(folder / "tokenizer_config.json")
    if transformer_config.get("max_seq_length") is not None:
        length = integer(transformer_config, "max_seq_length")
    elif (consistent(tokenizer_config, ("model_max_length",), positive) or NO_LIMIT) < NO_LIMIT:
        length = integer(tokenizer_config, "model_max_length")
    else:
        length = family.max_length or spec.position_limit
        return length, (f"max_length={length}: no file states it",)
    return min(length, spec.position_limit or length), ()


def _matryoshka(config: Mapping[str, Any], family: Family, name: str, root: Path, width: int) -> tuple[int, ...]:
    """Return `matryoshka_dimensions`, else those of the published model of this name, in descending order.

    The name is that of the hub id, of the folder, or of the hub's cache around it. `_name_or_path` is ignored: a model
    fine-tuned without matryoshka keeps that of its parent.
    """
    dimensions = config.get("matryoshka_dimensions")
    if dimensions is None:
        cached = [part.rpartition("--")[2] for part in root.resolve().parts if part.startswith("models--")]
        known = (family.matryoshka.get(candidate) for candidate in (name.rpartition("/")[2], *cached))
        dimensions = next((published for published in known if published and published[0] == width), ())
    if not isinstance(dimensions, list | tuple) or any(size not in range(1, width + 1) for size in dimensions):
        raise ConfigError(f"matryoshka_dimensions = {dimensions!r} are not whole numbers up to {width}; correct them")
    return tuple(sorted({int(size) for size in dimensions}, reverse=True))
