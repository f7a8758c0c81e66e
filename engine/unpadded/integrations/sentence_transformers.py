"""sentence-transformers' SentenceTransformer with a packed forward pass.

>>> from unpadded.integrations.sentence_transformers import SentenceTransformer
>>> SentenceTransformer("nomic-ai/nomic-embed-text-v1.5").encode(["search_query: What is TSNE?"])

Loading, saving, prompts, pools and precisions are sentence-transformers' own code. The engine computes sentence and
token embeddings of plain texts, with the values of sentence-transformers: `truncate_dim` cuts without a layer norm.
The engine has a copy of the model's current tokenizer. Whatever the engine does not support (other kinds of modules,
truncation on the left, pairs of texts ...) runs in the modules, around the packed forward pass. An unsupported
checkpoint runs as sentence-transformers loads it.

Written for sentence-transformers >= 6.2, < 7, because it overrides methods that are private there: `_inference`,
`_load_default_modules` and `_load_module_class_from_ref` of the model, `_load_config` and `_load_model` of the module.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import sentence_transformers
import tokenizers
import torch
from sentence_transformers.base import modules
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import truncate_embeddings
from torch import Tensor, nn

from unpadded.checkpoint.modules import TASK_TRANSFORMER
from unpadded.checkpoint.reader import Checkpoint, open_checkpoint
from unpadded.engine import Engine
from unpadded.errors import CheckpointError, ConfigError, OptionError
from unpadded.execution.pipeline import EmbeddingPipeline
from unpadded.execution.runner import Runner
from unpadded.integrations.encoders import CrossEncoder as CrossEncoder
from unpadded.integrations.encoders import MultiVectorEncoder as MultiVectorEncoder
from unpadded.integrations.encoders import SparseEncoder as SparseEncoder
from unpadded.integrations.module_checks import (
    is_modified,
    log_unsupported,
    open_supported,
    tokenizer_state,
    tokenizes_as_engine,
    without_hub_keywords,
)
from unpadded.integrations.module_head import SENTENCE, addresses, is_normalize, read_head
from unpadded.integrations.transformers import UnpaddedModel, make_config
from unpadded.model.heads import Head
from unpadded.tokenization.tokenizer import Tokenizer

TOKENS = "token_embeddings"  # a value of output_value, as is SENTENCE
# Keywords of `_inference` that do not keep the engine from running.
ENGINE_KEYWORDS = {"batch_size", "device", "normalize_embeddings", "output_value", "prompt", "save_to_cpu"}
ENGINE_KEYWORDS |= {"show_progress_bar", "task", "truncate_dim"}


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
        if (
            class_ref == TASK_TRANSFORMER
            and open_supported(model_name_or_path, revision=revision, **options) is not None
        ):
            return Transformer
        module_class = super()._load_module_class_from_ref(
            class_ref, model_name_or_path, trust_remote_code, revision, *args, **options
        )
        return Transformer if module_class is modules.Transformer else module_class

    def _load_default_modules(  # type: ignore[override]  # keywords are passed through
        self, model_name_or_path: str, **options: Any
    ) -> tuple[list[nn.Module] | OrderedDict[str, nn.Module], dict[str, Any]]:
        """Return the modules of a checkpoint without modules.json."""
        checkpoint = open_supported(model_name_or_path, **options)
        if checkpoint is None:
            return super()._load_default_modules(model_name_or_path, **options)
        if not options["local_files_only"]:
            self.model_card_data.set_base_model(model_name_or_path, revision=options["revision"])
        return [Transformer.from_checkpoint(checkpoint, **options), Pooling(checkpoint.spec.hidden, "mean")], {}

    @torch.inference_mode()
    def _inference(self, inputs: list[Any], **options: Any) -> Any:
        """Embed in the engine if it computes what the modules would compute, else in the modules."""
        target = self._resolve_inference_device(options.get("device"))
        self.eval()
        prompt, output_value = options["prompt"] or "", options["output_value"]
        task = self._adapter_task(options.get("task"))
        engine = self._engine_for(inputs, output_value, options)
        if engine is None:
            if task is not None and inputs:
                raise OptionError(
                    f"task = {task!r} selects an adapter, which is not supported for these inputs and output_value = "
                    f"{output_value!r}; pass plain texts, and omit output_value"
                )
            return super()._inference(inputs, **options)
        if output_value == TOKENS:
            rows = engine.token_embeddings(inputs, prompt=prompt, task=task)
            return [torch.from_numpy(row).to(target, self.dtype) for row in rows]
        normalize, show_progress = is_normalize(self[-1]), bool(options["show_progress_bar"])
        found = engine.embed(inputs, prompt=prompt, task=task, normalize=normalize, show_progress=show_progress)
        embeddings: Tensor = torch.from_numpy(found.vectors).to(self.dtype)
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
        head = read_head(rest)
        if (
            not inputs
            or not all(isinstance(text, str) for text in inputs)
            or not options.keys() <= ENGINE_KEYWORDS
            or output_value not in (SENTENCE, TOKENS)
            or head is None
            or not isinstance(transformer, Transformer)
            or not tokenizes_as_engine(
                transformer, transformer.model.engine.checkpoint.spec, padded=output_value == TOKENS
            )
            or is_modified(self)
        ):
            return None
        engine: Engine | None = transformer.engine_with(head)
        return engine

    def save(self, path: str, *args: Any, **options: Any) -> None:
        """Save as sentence-transformers does, so that it can load the folder too."""
        super().save(path, *args, **options)
        if path is None:
            return
        file = Path(path) / "modules.json"
        own = f'"{Transformer.__module__}.{Transformer.__qualname__}"'
        file.write_text(file.read_text().replace(own, '"sentence_transformers.models.Transformer"'))


class Transformer(modules.Transformer):
    """sentence-transformers' first module, around an `UnpaddedModel`."""

    model: Any  # an UnpaddedModel
    engine_tokenizer_state: tuple[object, ...] | None = None  # of the tokenizer that the engine has a copy of

    @classmethod
    def load(cls, model_name_or_path: str, **options: Any) -> modules.Transformer:  # type: ignore[override]
        """Load a saved module; the base class if the checkpoint is not supported."""
        checkpoint = open_supported(model_name_or_path, **options)
        if checkpoint is not None:
            saved = cls.load_config(str(checkpoint.folder))
            modality = {name: saved[name] for name in ("modality_config", "module_output_name")}
            try:
                return cls.from_checkpoint(checkpoint, modality, **options)
            except ConfigError as error:
                log_unsupported(model_name_or_path, error)
        module: modules.Transformer = modules.Transformer.load(model_name_or_path, **options)
        return module

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        modality: dict[str, Any] | None = None,  # None: infer it
        *,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> Transformer:
        transformer: Transformer = cls(
            str(checkpoint.folder),
            model_kwargs=without_hub_keywords(model_kwargs) | without_hub_keywords(config_kwargs),
            processor_kwargs=without_hub_keywords(processor_kwargs),
            do_lower_case=checkpoint.lower_case,
            **modality or {},
        )
        if "model_max_length" not in (processor_kwargs or {}):
            transformer.max_seq_length = checkpoint.max_length
        if not without_hub_keywords(processor_kwargs).keys() - {"model_max_length"}:  # both have read the same files
            transformer.engine_tokenizer_state = tokenizer_state(transformer.tokenizer)
        return transformer

    def _load_config(self, model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]) -> tuple[Any, bool]:
        return make_config(open_checkpoint(model_name_or_path)), False

    def _load_model(  # type: ignore[override]  # UnpaddedModel has what the module uses of a PreTrainedModel
        self, model_name_or_path: str, task: str, config: Any, backend: str, is_peft_model: bool, **options: Any
    ) -> UnpaddedModel:
        return UnpaddedModel.from_pretrained(model_name_or_path, **options)

    def engine_with(self, head: Head) -> Engine | None:
        """Return the model's engine with this head and the module's tokenizer and max_seq_length; it is kept.

        None for a tokenizer that the engine does not support.
        """
        engine: Engine = self.model.engine
        runner, tokenizer, state = engine._pipeline.runner, engine.tokenizer, tokenizer_state(self.tokenizer)
        if state != self.engine_tokenizer_state:
            module_tokenizer: Any = self.tokenizer
            backend = tokenizers.Tokenizer.from_str(module_tokenizer.backend_tokenizer.to_str())
            backend.no_truncation()
            backend.no_padding()
            try:
                tokenizer = Tokenizer(backend, tokenizer.folder)
            except CheckpointError:
                return None
            self.engine_tokenizer_state = state
        same_head = addresses(runner.heads["vector"]) == addresses(head)
        same_length = self.max_seq_length == engine.checkpoint.max_length
        if not (same_head and same_length and tokenizer is engine.tokenizer):
            if not same_head:
                runner = Runner(runner.encoder, runner.device, {"vector": head})
            max_length = self.max_seq_length or engine.checkpoint.max_length
            checkpoint = replace(engine.checkpoint, max_length=max_length)
            budget = engine._pipeline.token_budget
            self.model.engine = engine = Engine(EmbeddingPipeline(checkpoint, tokenizer, runner, budget))
        return engine
