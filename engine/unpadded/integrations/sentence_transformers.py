"""sentence-transformers' SentenceTransformer with a packed forward pass.

>>> from unpadded.integrations.sentence_transformers import SentenceTransformer
>>> SentenceTransformer("nomic-ai/nomic-embed-text-v1.5").encode(["search_query: What is TSNE?"])

Loading, saving, prompts, pools and precisions are sentence-transformers' own code. The engine computes sentence and
token embeddings of plain texts, with the values of sentence-transformers: `truncate_dim` cuts without a layer norm.
Whatever the engine does not support (other kinds of modules, truncation on the left, pairs of texts ...) runs in the
modules, around the packed forward pass. A checkpoint of an unsupported family runs as sentence-transformers loads it.

Written for sentence-transformers >= 6.2, < 7, because it overrides methods that are private there: `_inference`,
`_load_default_modules` and `_load_module_class_from_ref` of the model, `_load_config` and `_load_model` of the module.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import sentence_transformers
import torch
from sentence_transformers.base import modules
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import truncate_embeddings
from torch import Tensor, nn

from unpadded.checkpoint.hub import fetch
from unpadded.checkpoint.modules import POOLING_MODES, TASK_TRANSFORMER
from unpadded.checkpoint.reader import Checkpoint, open_checkpoint
from unpadded.engine import Engine
from unpadded.errors import ConfigError, OptionError
from unpadded.execution.runner import Runner
from unpadded.integrations.transformers import UnpaddedModel, make_config
from unpadded.model.heads import Dense as RunnerDense

logger = logging.getLogger("unpadded")

SENTENCE, TOKENS = "sentence_embedding", "token_embeddings"  # values of output_value
ACTIVATIONS: dict[type, str] = {nn.Identity: "identity", nn.Tanh: "tanh"}
# Keywords of the hub, which sentence-transformers adds to model_kwargs and others; the folder is already downloaded.
HUB_KEYWORDS = {"token", "trust_remote_code", "revision", "local_files_only", "cache_dir"}
# Settings of a saved Transformer module that change the token ids.
PREPROCESSING = ("processing_kwargs", "query_length", "document_length", "query_expansion")
# Keywords of `_inference` that do not keep the engine from running.
ENGINE_KEYWORDS = {"batch_size", "normalize_embeddings", "save_to_cpu", "show_progress_bar", "task", "truncate_dim"}


class SentenceTransformer(sentence_transformers.SentenceTransformer):
    """Takes the same arguments and returns the same results. `trust_remote_code` is not needed and is ignored."""

    def __init__(
        self,
        model_name_or_path: str | None = None,
        *,
        trust_remote_code: bool = False,
        backend: str = "torch",
        **options: Any,
    ) -> None:
        if backend != "torch":
            raise OptionError(f"backend = {backend!r} is not supported; omit it, or use sentence_transformers")
        if trust_remote_code:
            logger.info("trust_remote_code is not needed: no code of a checkpoint is ever run")
        super().__init__(model_name_or_path, **options)

    def _load_module_class_from_ref(
        self,
        class_ref: str,
        model_name_or_path: str,
        trust_remote_code: bool,
        revision: str | None,
        *args: Any,
        **options: Any,
    ) -> Any:
        """Return `Transformer` in place of the base class, and of the checkpoint's class that takes a task."""
        if class_ref == TASK_TRANSFORMER and _open(model_name_or_path, revision=revision, **options) is not None:
            return Transformer
        module_class = super()._load_module_class_from_ref(
            class_ref, model_name_or_path, trust_remote_code, revision, *args, **options
        )
        return Transformer if module_class is modules.Transformer else module_class

    def _load_default_modules(  # type: ignore[override]  # keywords are passed through
        self, model_name_or_path: str, **options: Any
    ) -> tuple[list[nn.Module] | OrderedDict[str, nn.Module], dict[str, Any]]:
        """Return the modules of a checkpoint without modules.json."""
        checkpoint = _open(model_name_or_path, **options)
        if checkpoint is None:
            return super()._load_default_modules(model_name_or_path, **options)
        if not options["local_files_only"]:
            self.model_card_data.set_base_model(model_name_or_path, revision=options["revision"])
        return [Transformer.from_checkpoint(checkpoint, **options), Pooling(checkpoint.spec.hidden, "mean")], {}

    @torch.inference_mode()
    def _inference(  # type: ignore[override]  # keywords are passed through
        self,
        inputs: list[Any],
        *,
        prompt: str | None,
        output_value: str | None,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> Any:
        """Embed in the engine if it computes what the modules would compute, else in the modules."""
        target = self._resolve_inference_device(device)
        self.eval()
        task = self._adapter_task(options.get("task"))
        engine = self._engine_for(inputs, output_value, options)
        if engine is None:
            if task is not None and inputs:
                raise OptionError(
                    f"task = {task!r} selects an adapter, which is not supported for these inputs and output_value = "
                    f"{output_value!r}; pass plain texts, and omit output_value"
                )
            return super()._inference(inputs, prompt=prompt, output_value=output_value, device=device, **options)
        if output_value == TOKENS:
            rows = engine.token_embeddings(inputs, prompt=prompt or "", task=task)
            return [torch.from_numpy(row).to(target, self.dtype) for row in rows]
        vectors = engine.embed(
            inputs,
            prompt=prompt or "",
            task=task,
            normalize=_is_normalize(self[-1]),
            show_progress=bool(options["show_progress_bar"]),
        ).vectors
        embeddings: Tensor = torch.from_numpy(vectors).to(self.dtype)
        if options["truncate_dim"] is not None:
            embeddings = truncate_embeddings(embeddings, options["truncate_dim"])
        if options["normalize_embeddings"]:
            embeddings = nn.functional.normalize(embeddings, p=2, dim=1)
        return embeddings if options["save_to_cpu"] else embeddings.to(target)

    def _adapter_task(self, task: str | None) -> str | None:
        """Return the task if the checkpoint has adapters, which its own Transformer class selects by it."""
        model = getattr(self[0], "model", None)
        adapters = model.engine.checkpoint.spec.lora if isinstance(model, UnpaddedModel) else None
        if task is None or adapters is None:
            return None
        if task not in adapters.tasks:
            raise OptionError(f"task is unknown: {task!r}; use one of {', '.join(adapters.tasks)}")
        return task

    def _engine_for(self, inputs: list[Any], output_value: str | None, options: dict[str, Any]) -> Engine | None:
        """Return an engine that computes what the modules, in their current state, would; None if it cannot."""
        transformer, *rest = self.children()
        head = _read_head(rest)
        if (
            not inputs
            or not all(isinstance(text, str) for text in inputs)
            or not options.keys() <= ENGINE_KEYWORDS
            or output_value not in (SENTENCE, TOKENS)
            or (output_value == TOKENS and self.tokenizer.padding_side != "right")
            or head is None
            or not isinstance(transformer, Transformer)
            or not transformer.tokenizes_as_engine()
            or _has_hooks(self)
        ):
            return None
        engine: Engine = transformer.engine_with(head)
        return engine

    def save(self, path: str, *args: Any, **options: Any) -> None:
        """Save as sentence-transformers does, so that it can load the folder too."""
        super().save(path, *args, **options)
        if path is None:
            return
        file = Path(path) / "modules.json"
        entries = json.loads(file.read_text())
        for entry in entries:
            if entry["type"] == f"{Transformer.__module__}.{Transformer.__qualname__}":
                entry["type"] = "sentence_transformers.models.Transformer"
        file.write_text(json.dumps(entries, indent=2))


class Head(NamedTuple):
    """The modules between a Transformer and a Normalize, as a runner takes them."""

    pooling: str
    dense: tuple[RunnerDense, ...]  # they share the modules' memory


class Transformer(modules.Transformer):
    """sentence-transformers' first module, around an `UnpaddedModel`."""

    model: Any  # an UnpaddedModel
    initial_tokenizer_state: tuple[object, ...] = ()  # set by `from_checkpoint`

    @classmethod
    def load(cls, model_name_or_path: str, **options: Any) -> modules.Transformer:  # type: ignore[override]
        """Load a saved module; the base class if the checkpoint is not supported."""
        checkpoint = _open(model_name_or_path, **options)
        if checkpoint is None:
            module: modules.Transformer = modules.Transformer.load(model_name_or_path, **options)
            return module
        return cls.from_checkpoint(checkpoint, **options)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> Transformer:
        folder = str(checkpoint.folder)
        saved = cls.load_config(folder)
        transformer: Transformer = cls(
            folder,
            model_kwargs=_without_hub_keywords(model_kwargs) | _without_hub_keywords(config_kwargs),
            processor_kwargs=_without_hub_keywords(processor_kwargs),
            do_lower_case=checkpoint.lower_case,
            **{name: saved[name] for name in PREPROCESSING if name in saved},
        )
        if "model_max_length" not in (processor_kwargs or {}):
            transformer.max_seq_length = checkpoint.max_length
        transformer.initial_tokenizer_state = transformer.tokenizer_state()
        return transformer

    def _load_config(self, model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]) -> tuple[Any, bool]:
        return make_config(open_checkpoint(model_name_or_path)), False

    def _load_model(  # type: ignore[override]  # UnpaddedModel has what the module uses of a PreTrainedModel
        self, model_name_or_path: str, task: str, config: Any, backend: str, is_peft_model: bool, **options: Any
    ) -> UnpaddedModel:
        return UnpaddedModel.from_pretrained(model_name_or_path, **options)

    def tokenizer_state(self) -> tuple[object, ...]:
        """Return the settings of the tokenizer that a caller may change and that the engine's tokenizer lacks."""
        tokenizer: Any = self.tokenizer
        backend = tokenizer.backend_tokenizer
        steps = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
        states = (step and step.__getstate__() for step in steps)
        return len(tokenizer), tokenizer.truncation_side, self.do_lower_case, *states

    def tokenizes_as_engine(self) -> bool:
        """Return whether the module, in its current state, makes the same token ids of a text as the engine."""
        checkpoint: Checkpoint = self.model.engine.checkpoint
        length, limit = self.max_seq_length, checkpoint.spec.position_limit
        tokenizer: Any = self.tokenizer
        return (
            isinstance(length, int)
            and not (limit and length > limit)
            and not any(getattr(self, name) for name in PREPROCESSING)
            and self.tokenizer_state() == self.initial_tokenizer_state
            and Path(tokenizer.name_or_path) == checkpoint.folder
        )

    def engine_with(self, head: Head) -> Engine:
        """Return the model's engine with this head and the module's max_seq_length; it is kept for the next call."""
        engine: Engine = self.model.engine
        runner = engine._pipeline.runner
        same_head = runner.pooling == head.pooling and _addresses(runner.dense) == _addresses(head.dense)
        if not same_head or self.max_seq_length != engine.checkpoint.max_length:
            if not same_head:
                runner = Runner(runner.encoder, runner.device, pooling=head.pooling, dense=head.dense)
            engine = Engine(engine._pipeline.with_runner(runner, max_length=self.max_seq_length))
            self.model.engine = engine
        return engine


def _open(
    model: str,
    *,
    token: str | bool | None,
    cache_folder: str | None,
    revision: str | None,
    local_files_only: bool,
    **_: Any,
) -> Checkpoint | None:
    """Return the checkpoint, or None if it is not supported (the reason is logged)."""
    folder = Path(model)
    if not folder.is_dir():
        folder = fetch(model, revision, cache_dir=cache_folder, token=token, local_files_only=local_files_only)
    try:
        return open_checkpoint(folder)
    except ConfigError as error:
        logger.warning("%s runs as sentence-transformers loads it, without speedup: %s", model, error)
        return None


def _without_hub_keywords(keywords: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (keywords or {}).items() if name not in HUB_KEYWORDS}


def _read_head(following: list[nn.Module]) -> Head | None:
    """Return the modules that follow the Transformer as a head, without a Normalize; None if one is not supported."""
    if following and _is_normalize(following[-1]):
        following = following[:-1]
    if not following:
        return None
    pooling, *dense = following
    mode: Any = getattr(pooling, "pooling_mode", None)
    if type(pooling) is not Pooling or not pooling.include_prompt or mode not in POOLING_MODES:
        return None
    if not all(map(_is_supported_dense, dense)):
        return None
    return Head(POOLING_MODES[mode], tuple(map(_runner_dense, dense)))


def _is_normalize(module: nn.Module) -> bool:
    return type(module) is Normalize and module.module_input_name == module.module_output_name == SENTENCE


def _is_supported_dense(module: nn.Module) -> bool:
    return (
        type(module) is Dense
        and module.module_input_name == module.module_output_name == SENTENCE
        and not module.use_residual
        and type(module.activation_function) in ACTIVATIONS
    )


def _runner_dense(module: Any) -> RunnerDense:
    linear = module.linear
    bias = None if linear.bias is None else linear.bias.detach()
    return linear.weight.detach(), bias, ACTIVATIONS[type(module.activation_function)]


def _addresses(dense: tuple[RunnerDense, ...]) -> list[tuple[object, ...]]:
    return [(weight.data_ptr(), bias is not None and bias.data_ptr(), name) for weight, bias, name in dense]


def _has_hooks(model: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
