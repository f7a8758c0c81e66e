"""Read and validate a model's files, except for the values of its weights."""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from unpadded.checkpoint.families import find_family
from unpadded.checkpoint.family import Family
from unpadded.checkpoint.hub import fetch
from unpadded.checkpoint.json_config import allow_only, consistent, not_implemented, read_object, read_value
from unpadded.checkpoint.modules import MODEL_CONFIG, TASK_TRANSFORMER, Dense, Pooling, output_width, read_modules
from unpadded.checkpoint.safetensors_header import StoredTensor, read_headers
from unpadded.checkpoint.score_head import ScoreHead, read_score_head
from unpadded.checkpoint.sparse_head import SparseHead, read_sparse_head
from unpadded.checkpoint.spec import EncoderSpec
from unpadded.checkpoint.token_head import TokenHead, read_token_head
from unpadded.errors import CheckpointError, ConfigError, OptionError, WeightsError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
WORD_EMBEDDINGS = ("embeddings.word_embeddings.weight", "embeddings.tok_embeddings.weight", "embed_tokens.weight")
# names of folders that do not tell which model they contain, in lower case
NO_NAME = re.compile(
    r"[-_/\d]*(v|models?|checkpoints?|best|final|outputs?|weights|(transformer|encoder)s?|snapshots?|data|mnt|srv|tmp|opt|"
    r"home|app|workspace)?[-_\d]*"
)
NO_LIMIT = 1_000_000  # tokenizers without a limit state 1e30


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Configuration of a model, complete and validated, and the places of its weights."""

    name: str  # hub id, or a name from the path or config.json
    folder: Path  # holds config.json, the weights and the tokenizer
    config: dict[str, Any]
    spec: EncoderSpec
    weight_files: tuple[Path, ...]
    pooling: Pooling
    normalize: bool
    dense: tuple[Dense, ...]
    score: ScoreHead | None  # of a reranker or classifier
    sparse: SparseHead | None  # of a masked-LM model, or weights of tokens
    tokens: TokenHead | None  # of a late-interaction model
    prompts: dict[str, str]  # prompt name or task -> text before the input
    default_prompt: str | None  # key of prompts
    lower_case: bool
    max_length: int  # tokens, including special tokens
    matryoshka: tuple[int, ...]  # dimensions with which the model was trained; () without matryoshka training
    matryoshka_layer_norm: bool  # apply LayerNorm without weights before vectors are cut
    defaults: tuple[str, ...]  # one phrase per setting that no file states

    @property
    def has_all(self) -> bool:
        """Whether one linear layer gives the vector, the sparse weights and the token vectors, as in bge-m3."""
        linear = self.sparse is not None and not self.sparse.log1p and self.tokens is not None
        return bool(linear and self.tokens and len(self.tokens.dense) == 1 and self.pooling == "cls" and not self.dense)

    def describe(self) -> dict[str, Any]:
        """Return the main fields as plain values, for `unpadded info` and JSON."""
        return {
            "model": self.name,
            "encoder": asdict(self.spec),
            "pooling": self.pooling,
            "normalize": self.normalize,
            "scores": list(self.score.labels) if self.score else None,
            "sparse": self.sparse and ("masked-LM logits" if self.sparse.log1p else "token weights"),
            "tokens": self.tokens and {"dimensions": self.tokens.dimensions, "max_lengths": self.tokens.max_lengths},
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
    if os.path.lexists(path := folder / "adapter_config.json"):
        raise ConfigError(f"PEFT adapters are not supported: {path}; call PEFT's merge_and_unload and save the model")
    config = read_object(folder / "config.json")
    allow_only(config, {"quantization_config": None})
    weight_files = _weight_files(folder)
    stored = read_headers(weight_files)
    names = [tensor.name for tensor in stored]
    family = find_family(config, names)
    spec = _with_stored_vocabulary(family.read_config(config), stored)
    spec = _with_scaling(spec, rotary_scaling_factor)
    if modules.takes_task and not spec.lora:
        raise not_implemented(
            f"the first module of {root / 'modules.json'}", TASK_TRANSFORMER, "sentence_transformers' Transformer"
        )
    width = output_width(modules.dense, spec.hidden)
    score = read_score_head(modules, config, family, spec, weight_files)

    prompts, default_prompt, prompt_defaults = _prompts(modules.model_config, family)
    if spec.lora:
        prompts = dict(zip(spec.lora.tasks, spec.lora.prompts, strict=True)) | prompts
    length, length_defaults = _max_length(max_length, modules.transformer_config, folder, family, spec)
    tokens = read_token_head(modules, config, spec, weight_files, length, max_length)
    for kind, marker in tokens.markers.items() if tokens else ():
        prompts[kind] = marker + prompts.get(kind, "").removeprefix(marker)
    merged = {**config, **modules.model_config}
    matryoshka = _matryoshka(merged, family, name, width)
    return Checkpoint(
        name=name or Path(str(config.get("_name_or_path") or root.resolve())).name,
        folder=folder,
        config=config,
        spec=spec,
        weight_files=weight_files,
        pooling=modules.pooling,
        normalize=modules.normalize,
        dense=modules.dense,
        score=score,
        sparse=read_sparse_head(modules, config, family, spec, weight_files, names),
        tokens=tokens,
        prompts=prompts,
        default_prompt=default_prompt,
        lower_case=bool(modules.transformer_config.get("do_lower_case", False)),
        max_length=length,
        matryoshka=matryoshka,
        matryoshka_layer_norm=bool(matryoshka and merged.get("matryoshka_layer_norm", family.matryoshka_layer_norm)),
        defaults=(*modules.defaults, *prompt_defaults, *length_defaults),
    )


def _locate(model: str | os.PathLike[str], revision: str | None) -> tuple[Path, str]:
    """Return the model's folder, which is downloaded for a hub id, and its name."""
    path, name = Path(os.path.expanduser(model)), os.fspath(model)
    if os.path.isdir(path) and name:  # Path.is_dir raises for names that are too long
        if revision is not None:
            raise OptionError(f"revision = {revision!r} does not apply to a folder, {path}; omit it")
        return path, _telling_name(path.resolve())
    if os.path.exists(path) and name:
        raise CheckpointError(f"{path} is a file; pass the folder that contains config.json, or a hub id")
    if not isinstance(model, str) or name.startswith((".", "~", os.sep)) or name.count("/") > 1 or not name:
        raise CheckpointError(f"there is no folder {name!r}; pass an existing folder, or a hub id (owner/name)")
    return fetch(name, revision), name


def _telling_name(folder: Path) -> str:
    """Return the id of a folder in the hub's cache, or the name of the folder or its parent that tells the model."""
    cached = [part.split("--", 2)[1:] for part in folder.parts if part.startswith("models--")]
    names = (name for name in folder.parts[:-3:-1] if not NO_NAME.fullmatch(name.lower()))
    return "/".join(cached[-1]) if cached else next(names, "")


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
        if outside := [name for name in shards if Path(name).name != name]:
            raise WeightsError(f"{index} names {outside}, outside the checkpoint; correct it")
        if absent := [name for name in shards if not os.path.exists(folder / name)]:
            raise WeightsError(f"{index} names {', '.join(absent)}, absent from {folder}; download them")
        return tuple(folder / name for name in shards)
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES):
        raise WeightsError(
            f"{folder} contains only pickled weights ({', '.join(pickles)}), which are never loaded; "
            "convert them to safetensors, or use a revision with model.safetensors"
        )
    raise WeightsError(f"{folder} contains neither {single.name} nor {index.name}; add the weights")


def _with_stored_vocabulary(spec: EncoderSpec, stored: list[StoredTensor]) -> EncoderSpec:
    """Count the rows of the stored word embeddings: those beyond the stated vocabulary are padding."""
    tables = [tensor for tensor in stored if tensor.name.endswith(WORD_EMBEDDINGS)]
    rows = tables[0].shape[0] if len(tables) == 1 and tables[0].shape else spec.vocabulary
    return replace(spec, vocabulary=max(rows, spec.vocabulary))


def _with_scaling(spec: EncoderSpec, factor: float | Literal["config"] | None) -> EncoderSpec:
    if factor == "config" or (factor is None and spec.rotary is None):
        return spec
    if factor is not None and (isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < 1e6):
        raise OptionError(f"rotary_scaling_factor = {factor!r} is not supported; use 'config', None or a number")
    if spec.rotary is None:
        raise OptionError(
            f"rotary_scaling_factor = {factor!r} does not apply: {spec.family} has no rotary embedding; omit it"
        )
    return replace(spec, rotary=replace(spec.rotary, scaling_factor=None if factor is None else float(factor)))


def _prompts(model_config: Mapping[str, Any], family: Family) -> tuple[dict[str, str], str | None, tuple[str, ...]]:
    prompts = model_config.get("prompts") or {}
    default = model_config.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise ConfigError(f"prompts = {prompts!r:.200} is not an object of strings; correct {MODEL_CONFIG}")
    if default is not None and default not in [*prompts]:
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
    tokenizer_config = read_object(folder / "tokenizer_config.json", optional=True)
    key = "model_max_length" if "model_max_length" in tokenizer_config else "max_len"
    length = consistent(transformer_config, ("max_seq_length",), int)
    if length is None and (consistent(tokenizer_config, (key,), float) or NO_LIMIT) < NO_LIMIT:
        length = read_value(tokenizer_config, key, int)
    if length is None:
        length = family.max_length or spec.position_limit
        return length, (f"max_length={length}: no file states it",)
    return min(length, spec.position_limit or length), ()


def _matryoshka(config: Mapping[str, Any], family: Family, name: str, width: int) -> tuple[int, ...]:
    """Return `matryoshka_dimensions`, else those of the published model of this name, in descending order.

    name: of the folder or the hub id, not `_name_or_path`: a model fine-tuned without matryoshka keeps its parent's.
    """
    dimensions = config.get("matryoshka_dimensions")
    if dimensions is None:
        published = family.matryoshka.get(name.rpartition("/")[2], ())
        dimensions = published if published and published[0] == width else ()
    sizes = dimensions if isinstance(dimensions, list | tuple) else [dimensions]
    if not all(isinstance(size, int) and 0 < size <= width for size in sizes):
        raise ConfigError(f"matryoshka_dimensions = {dimensions!r} are not whole numbers up to {width}; correct them")
    return tuple(sorted({*sizes}, reverse=True))
