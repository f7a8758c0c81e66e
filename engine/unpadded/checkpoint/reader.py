"""A model's files, read and judged before any weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from unpadded.checkpoint.families import FAMILIES
from unpadded.checkpoint.family import Family
from unpadded.checkpoint.hub import fetch
from unpadded.checkpoint.json_config import integer, not_implemented, positive, read_object
from unpadded.checkpoint.lora_files import find_lora_files
from unpadded.checkpoint.modules import TASK_TRANSFORMER, Dense, Pooling, check_widths, read_modules
from unpadded.checkpoint.safetensors_header import StoredTensor, read_headers
from unpadded.checkpoint.spec import EncoderSpec
from unpadded.errors import CheckpointError, ConfigError, OptionError, WeightsError

__all__ = ["Checkpoint", "Dense", "open_checkpoint"]

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
MODEL_FILE = "config_sentence_transformers.json"
WORD_TABLES = ("embeddings.word_embeddings.weight", "embeddings.tok_embeddings.weight", "embed_tokens.weight")
LONGEST = 1_000_000  # tokenizers without a limit state 1e30
# of sentence-transformers' loading arguments, those that do not change a vector
HARMLESS_ARGUMENTS = {"trust_remote_code", "dtype", "torch_dtype", "attn_implementation", "add_pooling_layer"}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a model's files say."""

    name: str  # the hub id, or the folder's name
    folder: Path  # of the encoder's config.json, its weights and its tokenizer
    config: dict[str, Any]
    spec: EncoderSpec
    weight_files: tuple[Path, ...]
    lora_files: tuple[Path, ...]  # of each task, where they lie apart
    pooling: Pooling
    normalize: bool
    dense: tuple[Dense, ...]
    prompts: dict[str, str]  # prompt name or task -> prefix
    default_prompt: str | None  # a key of prompts
    lower_case: bool
    max_length: int  # tokens, special ones included
    matryoshka: tuple[int, ...]  # dimensions the model was trained to be cut to; () when it was not
    matryoshka_layer_norm: bool  # a layer norm without affine comes before the cut
    defaults: tuple[str, ...]  # a sentence for each choice that no file made

    def describe(self) -> dict[str, Any]:
        """In plain values, for people and for JSON."""
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
    """Read the configuration of a folder, or of a hub id, which is fetched first.

    CheckpointError when files are absent or broken, ConfigError for what is contradictory or not implemented,
    OptionError for an argument that does not fit the model.
    """
    root, name = _locate(model, revision)
    pipeline = read_modules(root)
    folder = pipeline.transformer
    config = read_object(folder / "config.json")
    weight_files = _weight_files(folder)
    stored = read_headers(weight_files)
    family = _family(config, stored, folder)
    spec = _with_stored_vocabulary(family.read_config(config), stored)
    spec = _with_scaling(spec, rotary_scaling_factor)
    lora_files: tuple[Path, ...] = ()
    if spec.lora:
        adapters, lora_files = find_lora_files(spec.lora, folder, config)
        spec = replace(spec, lora=adapters)
    if pipeline.takes_task and spec.lora is None:
        raise not_implemented(f"the first module of {root / 'modules.json'}", TASK_TRANSFORMER, "one without own code")
    width = check_widths(pipeline, spec.hidden)

    encoder_file = _read_encoder_file(folder)
    model_file = _read_if_present(root / MODEL_FILE)
    prompts, default_prompt, prompt_defaults = _prompts(model_file, family)
    if spec.lora:
        prompts = dict(zip(spec.lora.tasks, spec.lora.prompts, strict=True)) | prompts
    length, length_defaults = _max_length(max_length, encoder_file, folder, family, spec)
    stated = {**config, **model_file}
    matryoshka = _matryoshka(stated, family, name, root, width)
    return Checkpoint(
        name=name,
        folder=folder,
        config=config,
        spec=spec,
        weight_files=weight_files,
        lora_files=lora_files,
        pooling=pipeline.pooling,
        normalize=pipeline.normalize,
        dense=pipeline.dense,
        prompts=prompts,
        default_prompt=default_prompt,
        lower_case=bool(encoder_file.get("do_lower_case", False)),
        max_length=length,
        matryoshka=matryoshka,
        matryoshka_layer_norm=bool(matryoshka and stated.get("matryoshka_layer_norm", family.matryoshka_layer_norm)),
        defaults=(*pipeline.defaults, *prompt_defaults, *length_defaults),
    )


def _locate(model: str | os.PathLike[str], revision: str | None) -> tuple[Path, str]:
    path, spelled = Path(model).expanduser(), os.fspath(model)
    if path.is_dir() and spelled:
        if revision is not None:
            raise OptionError(f"revision = {revision!r} was given with a folder, {path}; leave it out")
        return path, path.resolve().name
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the folder that holds config.json, or a hub id")
    if not isinstance(model, str) or spelled.startswith((".", "~", os.sep)) or spelled.count("/") > 1 or not spelled:
        raise CheckpointError(f"there is no folder {spelled!r}; give an existing folder, or a hub id (owner/name)")
    return fetch(spelled, revision), spelled


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """model.safetensors, or the shards that its index names."""
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
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise WeightsError(
            f"{folder} holds only pickled weights ({', '.join(pickles)}), which are never loaded; "
            "convert them to safetensors, or take a revision that has model.safetensors"
        )
    raise WeightsError(f"{folder} holds no {single.name} and no {index.name}; add the weights")


def _family(config: Mapping[str, Any], stored: list[StoredTensor], folder: Path) -> Family:
    names = [tensor.name for tensor in stored]
    for family in FAMILIES.values():
        if family.matches(config, names):
            return family
    raise not_implemented(f"model_type in {folder / 'config.json'}", config.get("model_type"), ", ".join(FAMILIES))


def _with_stored_vocabulary(spec: EncoderSpec, stored: list[StoredTensor]) -> EncoderSpec:
    """Rows beyond the stated vocabulary are padding, and the tensor knows how many."""
    tables = [tensor for tensor in stored if tensor.name.endswith(WORD_TABLES)]
    rows = tables[0].shape[0] if len(tables) == 1 and tables[0].shape else spec.vocabulary
    return replace(spec, vocabulary=max(rows, spec.vocabulary))


def _with_scaling(spec: EncoderSpec, factor: float | Literal["config"] | None) -> EncoderSpec:
    if factor == "config":
        return spec
    if factor is not None and (isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 1e6):
        raise OptionError(f"rotary_scaling_factor = {factor!r} is not offered; give 'config', None or a number")
    if spec.rotary is None:
        if factor is None:
            return spec
        raise OptionError(
            f"rotary_scaling_factor = {factor!r} does not fit a {spec.family} model: no rotary; leave it out"
        )
    return replace(spec, rotary=replace(spec.rotary, scaling_factor=None if factor is None else float(factor)))


def _read_if_present(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def _read_encoder_file(folder: Path) -> dict[str, Any]:
    """sentence_bert_config.json, or the same under its other names (sentence_roberta_config.json ...)."""
    paths = sorted(folder.glob("sentence_*_config.json"))
    config = read_object(paths[0]) if paths else {}
    for key in ("config_args", "config_kwargs", "model_args", "model_kwargs", "tokenizer_args", "processor_kwargs"):
        if unknown := sorted(set(config.get(key) or {}) - HARMLESS_ARGUMENTS):
            raise not_implemented(f"{key} in {paths[0]}", unknown, sorted(HARMLESS_ARGUMENTS))
    if config.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise not_implemented(f"transformer_task in {paths[0]}", config["transformer_task"], "feature-extraction")
    return config


def _prompts(model_file: Mapping[str, Any], family: Family) -> tuple[dict[str, str], str | None, tuple[str, ...]]:
    prompts = model_file.get("prompts") or {}
    default = model_file.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise ConfigError(f"prompts = {prompts!r:.200} is not an object of strings; correct {MODEL_FILE}")
    if default is not None and default not in prompts:
        raise ConfigError(
            f"default_prompt_name = {default!r} is none of the prompts {sorted(prompts)}; correct {MODEL_FILE}"
        )
    # sentence-transformers writes empty query and document prompts into every model it saves
    if any(prompts.values()) or default is not None or not family.prompts:
        return dict(prompts), default, ()
    return dict(family.prompts), None, (f"prompts={', '.join(family.prompts)}: no file states any",)


def _max_length(
    asked: int | None, encoder_file: Mapping[str, Any], folder: Path, family: Family, spec: EncoderSpec
) -> tuple[int, tuple[str, ...]]:
    """The argument, else sentence-transformers' file, else the tokenizer's, else the family's."""
    if asked is not None:
        if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
            raise OptionError(f"max_length = {asked!r} is not a whole number of tokens; give one of at least 1")
        if spec.position_limit and asked > spec.position_limit:
            raise OptionError(
                f"max_length = {asked} is beyond the {spec.position_limit} learned positions of the model; "
                f"give at most {spec.position_limit}"
            )
        return asked, ()
    tokenizer_file = _read_if_present(folder / "tokenizer_config.json")
    if encoder_file.get("max_seq_length") is not None:
        length = integer(encoder_file, "max_seq_length")
    elif tokenizer_file.get("model_max_length") is not None and positive(tokenizer_file, "model_max_length") < LONGEST:
        length = integer(tokenizer_file, "model_max_length")
    else:
        length = family.max_length or spec.position_limit
        return length, (f"max_length={length}: no file states it",)
    return min(length, spec.position_limit or length), ()


def _matryoshka(stated: Mapping[str, Any], family: Family, name: str, root: Path, width: int) -> tuple[int, ...]:
    """What a file says as `matryoshka_dimensions`, else what is known of the published model of that name.

    The name is the hub id's, the folder's, or that of the hub's cache around it. `_name_or_path` is not believed:
    a model fine-tuned without matryoshka keeps its parent's.
    """
    dimensions = stated.get("matryoshka_dimensions")
    if dimensions is None:
        cached = [part.rpartition("--")[2] for part in root.resolve().parts if part.startswith("models--")]
        known = (family.matryoshka.get(candidate) for candidate in (name.rpartition("/")[2], *cached))
        dimensions = next((published for published in known if published and published[0] == width), ())
    if not isinstance(dimensions, list | tuple) or any(size not in range(1, width + 1) for size in dimensions):
        raise ConfigError(f"matryoshka_dimensions = {dimensions!r} are not whole numbers up to {width}; correct them")
    return tuple(sorted({int(size) for size in dimensions}, reverse=True))
