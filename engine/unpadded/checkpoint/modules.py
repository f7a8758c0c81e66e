"""Modules after the encoder, from sentence-transformers' files: a pooling, then Dense and LayerNorm, then Normalize."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from unpadded.checkpoint.json_config import (
    allow_only,
    not_implemented,
    read_json,
    read_object,
    read_value,
    required,
    section,
)
from unpadded.checkpoint.safetensors_header import read_headers
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
DENSE_ACTIVATIONS = {"Identity": "identity", "Tanh": "tanh", "GELU": "gelu", "ReLU": "relu"}
TASK_TRANSFORMER = "custom_st.Transformer"  # of jina-embeddings-v3: a Transformer with an argument `task`
# Keys of sentence_bert_config.json that are read, that have one supported value, and loading arguments among them.
TRANSFORMER_KEYS = {"do_lower_case", "max_seq_length", "unpad_inputs"}  # the last one changes no vector
TOKEN_KEYS = ("query_length", "document_length", "query_expansion")  # read for vectors per token
TRANSFORMER_DEFAULTS: dict[str, Any] = {"processing_kwargs": {}, "tokenizer_name_or_path": None}
# task, which selects a model class of transformers -> what that returns, and its name for the next module
TASK_OUTPUTS = {
    "feature-extraction": ("last_hidden_state", "token_embeddings"),
    "sequence-classification": ("logits", "scores"),
    "fill-mask": ("logits", "token_embeddings"),
}
LOADING_ARGUMENTS = ("config_args", "config_kwargs", "model_args", "model_kwargs", "tokenizer_args", "processor_kwargs")
# those that do not change the vectors
IGNORED_ARGUMENTS = {"trust_remote_code", "dtype", "torch_dtype", "attn_implementation", "add_pooling_layer"}
MODEL_CONFIG = "config_sentence_transformers.json"
SENTENCE = "sentence_embedding"  # what the modules after the Transformer read and write
TOKENS = "token_embeddings"  # the same in a late-interaction model
AFTER_TOKENS = ("MultiVectorMask", "HierarchicalTokenPooling")
KINDS = ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "MLMTransformer", "SpladePooling", *AFTER_TOKENS)
MULTI_VECTOR, COLBERT = "MultiVectorEncoder", "ColBERT"  # model types of sentence-transformers and of PyLate
PYLATE_DENSE = "pylate.models.Dense.Dense"
PYLATE_KEYS = {*TOKEN_KEYS, "attend_to_expansion_tokens", "attend_to_mask_tokens", "do_query_expansion"}
PYLATE_KEYS |= {"document_prefix", "query_prefix", "skiplist_words"}  # of MODEL_CONFIG
TOKEN_MODULES = "(, MultiVectorMask(, Normalize)?|, Normalize(, MultiVectorMask)?)?(, HierarchicalTokenPooling)?"
SPLADE_ACTIVATIONS = {"relu": 1, "log1p_relu": 2}  # how often log1p follows the relu


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A linear layer with an activation, or a LayerNorm, on the pooled vector."""

    name: str  # of the stored tensors, without .weight and .bias; may be empty, or the name of a single one
    shape: tuple[int, ...]  # of the weight: [out_features, in_features], or [features] of a LayerNorm
    bias: bool = True
    activation: str = "identity"  # a value of DENSE_ACTIVATIONS
    eps: float = 1e-5  # of a LayerNorm
    weight_files: tuple[Path, ...] = ()  # safetensors


@dataclass(frozen=True, kw_only=True)
class Modules:
    """The modules of a checkpoint, always in this order: Transformer, Pooling, Dense or LayerNorm ..., Normalize."""

    transformer: Path  # folder of the encoder and its tokenizer
    pooling: Pooling
    dense: tuple[Dense, ...]
    score_dense: tuple[Dense, ...] = ()  # of a reranker, whose last module computes the scores
    token_dense: tuple[Dense, ...] | None = None  # of a late-interaction model
    token_configs: dict[str, dict[str, Any]] = field(default_factory=dict)  # its modules after those, by class
    classifies: bool | None = None  # the encoder has a head for sequence classification; None: config.json decides
    splade: int = 0  # how often SpladePooling applies log1p; 0 without that module
    normalize: bool
    defaults: tuple[str, ...]  # one phrase per setting that no file states
    takes_task: bool = False  # the first module is a TASK_TRANSFORMER
    transformer_config: dict[str, Any] = field(default_factory=dict)  # sentence_bert_config.json
    model_config: dict[str, Any] = field(default_factory=dict)  # config_sentence_transformers.json


def read_modules(folder: Path) -> Modules:
    """Read modules.json and the files it names, which must exist, except for those of Normalize.

    Without it, the defaults are those of sentence-transformers, whatever else there is: mean pooling, not normalized.
    """
    modules = folder / "modules.json"
    if not os.path.lexists(modules):
        defaults = tuple(f"{default}: there is no {modules.name}" for default in ("pooling='mean'", "normalize=False"))
        return Modules(transformer=folder, pooling="mean", dense=(), normalize=False, defaults=defaults)

    listed = _list_modules(modules)
    kinds = ", ".join(class_name.rpartition(".")[2] for class_name, _ in listed)
    model_config = read_object(folder / MODEL_CONFIG, optional=True)
    if model_type := _late_interaction(folder, model_config):
        return _read_token_modules(listed, kinds, {**model_config, "model_type": model_type})
    supported = "Transformer, Pooling, Dense or LayerNorm, Normalize; Transformer, SpladePooling"
    unsupported = not_implemented(str(modules), kinds, supported)
    if not re.fullmatch(
        "Transformer(, Pooling(, Dense|, LayerNorm)*(, Normalize)?)?|(MLM)?Transformer, SpladePooling", kinds
    ):
        raise unsupported
    classifies, sparse = kinds == "Transformer", kinds.endswith("SpladePooling")
    task = "sequence-classification" if classifies else "fill-mask" if sparse else "feature-extraction"
    transformer_config = _read_transformer_config(listed[0][1], task)
    if kinds in ("Transformer", "Transformer, SpladePooling") and "transformer_task" not in transformer_config:
        raise unsupported
    last = listed[-1][1]
    modular = len(listed) > 2 and read_object(last / "config.json", optional=True).get("module_output_name") == "scores"
    for _, module in listed[2:]:
        path, output = module / "config.json", "scores" if modular and module == last else SENTENCE
        names = {"module_input_name": SENTENCE, "module_output_name": output}
        allow_only(read_object(path, optional=True), names, path)
    model_type = "CrossEncoder" if classifies or modular else "SparseEncoder" if sparse else "SentenceTransformer"
    allow_only(model_config, {"truncate_dim": None, "model_type": model_type}, MODEL_CONFIG)
    dense = tuple(_read_dense(module) for class_name, module in listed[2:] if not class_name.endswith(".Normalize"))
    return Modules(
        transformer=listed[0][1],
        pooling="mean" if classifies or sparse else _read_pooling(listed[1][1] / "config.json"),
        dense=() if modular else dense,
        score_dense=dense if modular else (),
        classifies=classifies,
        splade=_read_splade(listed[1][1] / "config.json") if sparse else 0,
        normalize="Normalize" in kinds,
        defaults=(),
        takes_task=listed[0][0] == TASK_TRANSFORMER,
        transformer_config=transformer_config,
        model_config=model_config,
    )


def _late_interaction(folder: Path, model_config: Mapping[str, Any]) -> str | None:
    """Return the model type of a late-interaction model as sentence-transformers finds it; None for other models."""
    stanford = "HF_ColBERT" in str(read_object(folder / "config.json", optional=True).get("architectures"))
    model_type = model_config.get("model_type") or (MULTI_VECTOR if stanford else "SentenceTransformer")
    pylate = model_type == "SentenceTransformer" and not PYLATE_KEYS.isdisjoint(model_config)
    return model_type if pylate or model_type in (MULTI_VECTOR, COLBERT) else None


def _read_token_modules(listed: list[tuple[str, Path]], kinds: str, model_config: dict[str, Any]) -> Modules:
    """Read the modules of a late-interaction model: the Transformer, linear layers, and what TOKEN_MODULES matches."""
    if not re.fullmatch(f"Transformer(, Dense)*{TOKEN_MODULES}", kinds):
        raise not_implemented("modules.json", kinds, "Transformer, Dense, MultiVectorMask, Normalize and token pooling")
    configs = {path: read_object(path / "config.json", optional=True) for _, path in listed[1:]}
    for kind, path in listed[1:]:
        default = {"module_input_name": SENTENCE} if kind.endswith(".Normalize") else {}
        names = dict.fromkeys(("module_input_name", "module_output_name"), TOKENS)
        allow_only(default | configs[path], names, path / "config.json")
    return Modules(
        transformer=listed[0][1],
        pooling="mean",
        dense=(),
        token_dense=tuple(_read_dense(path) for kind, path in listed if kind.endswith(".Dense")),
        token_configs={kind.rpartition(".")[2]: configs[path] for kind, path in listed[1:]},
        normalize=False,
        defaults=("pooling='mean': the model is one for late interaction",),
        transformer_config=_read_transformer_config(listed[0][1], "feature-extraction", tokens=True),
        model_config=model_config,
    )


def output_width(dense: Iterable[Dense], hidden: int) -> int:
    """Return the width of the vectors after the last module; ConfigError if two modules do not fit together."""
    width = hidden
    for module in dense:
        if module.shape[-1] != width:
            raise ConfigError(
                f"in_features = {module.shape[-1]} in {module.weight_files[0].parent}/config.json does not fit "
                f"its input of {width} dimensions; correct it"
            )
        width = module.shape[0]
    return width


def _list_modules(path: Path) -> list[tuple[str, Path]]:
    """Return the class name and the folder of each module."""
    entries = read_json(path)
    try:
        types_and_paths = [(read_value(entry, "type", str), read_value(entry, "path", str)) for entry in entries]
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{path} lists no modules with type and path: {entries!r:.200}; correct it") from error
    for class_name, subfolder in types_and_paths:
        known = class_name.startswith(("sentence_transformers.", TASK_TRANSFORMER)) or class_name == PYLATE_DENSE
        if not known or class_name.rpartition(".")[2] not in KINDS:
            split = "; of a Router, pass a folder with the modules for documents"
            raise not_implemented(f"the module type in {path}", class_name, ", ".join(KINDS) + split)
        if PurePosixPath(subfolder).is_absolute() or ".." in PurePosixPath(subfolder).parts:
            raise ConfigError(f"{path} names {subfolder!r}, outside the checkpoint; correct it")
    return [(class_name, path.parent / subfolder) for class_name, subfolder in types_and_paths]


def _read_transformer_config(folder: Path, task: str, *, tokens: bool = False) -> dict[str, Any]:
    """Read sentence_bert_config.json, or the file with another model type in its name."""
    names = "bert roberta distilbert camembert albert xlm-roberta xlnet"
    paths = [folder / f"sentence_{name}_config.json" for name in names.split()]
    path, config = next(((path, found) for path in paths if (found := read_object(path, optional=True))), (folder, {}))
    for key in LOADING_ARGUMENTS:
        if unknown := sorted(section(config, key).keys() - IGNORED_ARGUMENTS):
            raise not_implemented(f"{key} in {path}", unknown, sorted(IGNORED_ARGUMENTS))
    output, name = TASK_OUTPUTS[task]
    modality = {"text": {"method": "forward", "method_output_name": output}}
    supported = {"transformer_task": task, "modality_config": modality, "module_output_name": name}
    supported |= TRANSFORMER_DEFAULTS | ({} if tokens else dict.fromkeys(TOKEN_KEYS))
    known = TRANSFORMER_KEYS | supported.keys() | {*LOADING_ARGUMENTS, *TOKEN_KEYS}
    allow_only(config, supported | dict.fromkeys(config.keys() - known), path)
    return config


def _read_pooling(path: Path) -> Pooling:
    config = read_object(path)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in POOLING_FLAGS.items() if config.get(key)] or ["mean"]
    modes = modes if isinstance(modes, list) else [modes]
    if modes not in [[mode] for mode in POOLING_MODES]:
        raise not_implemented(f"pooling_mode in {path}", modes, ", ".join(POOLING_MODES))
    allow_only(config, {"include_prompt": True}, path)
    return POOLING_MODES[modes[0]]


def _read_splade(path: Path) -> int:
    """Return how often log1p is applied. Other keys, such as chunk_size, change no weight."""
    config = read_object(path)
    allow_only(config, {"pooling_strategy": "max"}, path)
    activation = config.get("activation_function", "relu")
    if activation not in SPLADE_ACTIVATIONS:
        raise not_implemented(f"activation_function in {path}", activation, ", ".join(SPLADE_ACTIVATIONS))
    return SPLADE_ACTIVATIONS[activation]


def _read_dense(folder: Path) -> Dense:
    """Read a Dense or a LayerNorm."""
    path = folder / "config.json"
    config = read_object(path)
    allow_only(config, {"use_residual": False}, path)
    class_name = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    activation = str(class_name).rpartition(".")[2]
    if not str(class_name).startswith("torch.") or activation not in DENSE_ACTIVATIONS:
        raise not_implemented(f"activation_function in {path}", class_name, ", ".join(DENSE_ACTIVATIONS))
    weight_file = folder / "model.safetensors"
    if not weight_file.exists():
        present = ", ".join(sorted(os.listdir(folder)))
        raise WeightsError(
            f"{weight_file} is absent (found: {present}); pickled weights are never loaded; convert them to safetensors"
        )
    if "dimension" in config:
        return Dense(name="norm", shape=(required(config, ("dimension",), int, path),), weight_files=(weight_file,))
    return Dense(
        name="linear",
        shape=(required(config, ("out_features",), int, path), required(config, ("in_features",), int, path)),
        bias="bias" not in config or read_value(config, "bias", bool),
        activation=DENSE_ACTIVATIONS[activation],
        weight_files=(weight_file,),
    )


def read_linear(weight_files: tuple[Path, ...], name: str = "") -> Dense:
    """Return the linear layer whose tensors are name.weight and name.bias, or weight and bias; its shape is stored."""
    stored = {tensor.name: tensor.shape for tensor in read_headers(weight_files)}
    weight, bias = (f"{name}.{kind}".lstrip(".") for kind in ("weight", "bias"))
    if len(stored.get(weight, ())) != 2:
        raise WeightsError(f"{weight_files[0]} has no matrix {weight} (found: {', '.join(stored)[:200]}); add it")
    return Dense(name=name, shape=stored[weight], bias=bias in stored, weight_files=weight_files)


def reject_pickle(folder: Path, name: str) -> None:
    """Raise WeightsError, with the way to convert it, if the file of a linear layer is there as a pickle only."""
    path = folder / f"{name}.pt"
    if path.exists() and not path.with_suffix(".safetensors").exists():
        raise WeightsError(
            f"{path} is a pickle, which is never loaded; convert it with torch and safetensors: "
            f"save_file(torch.load('{name}.pt', weights_only=True), '{name}.safetensors')"
        )
