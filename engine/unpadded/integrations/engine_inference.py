"""Inference of sentence-transformers' models by an engine, for classes that keep sentence-transformers' own modules.

The first call that is supported loads the weights a second time, into an engine. It runs as long as modules, parameters
and tokenizer are as they were loaded; they may have been moved, cast or copied, and `max_seq_length` may differ.
Otherwise the modules run, and a warning is logged once for each reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from sentence_transformers.base.model import BaseModel
from torch import Tensor, nn

from unpadded.checkpoint.reader import Checkpoint, open_checkpoint
from unpadded.engine import Engine
from unpadded.errors import CheckpointError, OptionError, UnpaddedError
from unpadded.execution.pipeline import EmbeddingPipeline
from unpadded.integrations.module_checks import (
    PREPROCESSING,
    find_folder,
    is_modified,
    log_unsupported,
    logger,
    tokenizer_state,
    tokenizes_as_engine,
    without_hub_keywords,
)
from unpadded.loading import load

# Keywords of transformers' from_pretrained that do not affect the values of the parameters.
MODEL_KEYWORDS = {"dtype", "torch_dtype", "attn_implementation", "low_cpu_mem_usage", "use_safetensors"}
KEYWORDS = {"batch_size", "device", "prompt", "show_progress_bar"}  # of `_inference`
SAMPLES = 64  # at least, of the values of a parameter, unless it has fewer


class EngineInference(BaseModel):
    """The first base of a model class, whose `_run` returns what `_inference` does, on a device."""

    head: ClassVar[str]  # field of a Checkpoint, None for one without the head
    results: ClassVar[str]  # of the head, in errors
    keywords: ClassVar[frozenset[str]]  # of `_inference` that `_run` honors, in addition to KEYWORDS
    last: ClassVar[type[nn.Module]] = nn.Module  # class of the last module
    _run: Callable[[Engine, list[Any], dict[str, Any], torch.device, dict[str, Any]], Any]
    _checkpoint: Checkpoint | None = None  # that the engine loads; set by _load_modules
    _engine: Engine | None = None  # set by the first call that it supports
    # the sample, the settings and the weight files after loading; set by __init__
    _loaded: tuple[Tensor, tuple[object, ...], list[object]]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"trust_remote_code": False})
        self._logged_reasons: set[str] = set()
        if self._checkpoint is not None:
            self._loaded = self._sample(), self._settings(), _file_states(self._checkpoint)

    def _load_modules(self, model_name_or_path: str, **options: Any) -> Any:  # type: ignore[override]
        found = super()._load_modules(model_name_or_path, **options)
        try:
            self._checkpoint = self._open(model_name_or_path, **options)
        except UnpaddedError as error:
            log_unsupported(model_name_or_path, error)
        return found

    def _open(
        self, model: str, *, model_kwargs: Any, processor_kwargs: Any, config_kwargs: Any, **options: Any
    ) -> Checkpoint:
        """Return the checkpoint; UnpaddedError, with the reason, if an engine cannot compute its results."""
        if self.backend != "torch":
            raise OptionError(f"backend = {self.backend!r} is not supported; omit it")
        checkpoint = open_checkpoint(find_folder(model, **options))
        head = getattr(checkpoint, self.head)
        if head is None or getattr(head, "skip_first", False):  # bge-m3's, which sentence-transformers does not load
            raise OptionError(f"{model} has no head for {self.results} that sentence-transformers loads; train one")
        keywords = without_hub_keywords(config_kwargs)
        if checkpoint.score is not None and keywords.get("num_labels") == len(checkpoint.score.labels):
            del keywords["num_labels"]
        keywords |= {name: None for name in without_hub_keywords(processor_kwargs) if name != "model_max_length"}
        keywords |= {name: None for name in without_hub_keywords(model_kwargs) if name not in MODEL_KEYWORDS}
        if keywords:
            raise OptionError(f"the engine does not support {', '.join(keywords)}; omit it")
        return checkpoint

    def _inference(self, inputs: list[Any], **options: Any) -> Any:
        """Run the engine if it computes what the modules would compute, else the modules."""
        target = self._resolve_inference_device(options.get("device"))
        self.eval()
        engine = self._engine_for(inputs, options)
        if engine is None:
            return super()._inference(inputs, **options)
        shared = {"prompt": options["prompt"] or "", "show_progress": bool(options["show_progress_bar"])}
        return self._run(engine, inputs, shared, target, options)

    def _engine_for(self, inputs: list[Any], options: dict[str, Any]) -> Engine | None:
        """Return an engine that computes what the modules, in their current state, would; None if it cannot."""
        checkpoint = self._checkpoint
        if checkpoint is None or not inputs:
            return None
        reason = self._own_reason(checkpoint, inputs, options)
        if reason is None:
            try:
                return self._current_engine(checkpoint)
            except UnpaddedError as error:
                reason, self._checkpoint = str(error), None
        if reason not in self._logged_reasons:
            self._logged_reasons.add(reason)
            logger.warning("%s runs in sentence-transformers' modules: %s", checkpoint.name, reason)
        return None

    def _own_reason(self, checkpoint: Checkpoint, inputs: list[Any], options: dict[str, Any]) -> str | None:
        """Return why the modules have to run, or None."""
        unsupported = options.keys() - KEYWORDS - self.keywords
        if unsupported := {name for name in unsupported if options[name] is not None}:
            return f"{', '.join(sorted(unsupported))} is not supported"
        texts = all(isinstance(one, str) for one in inputs)
        if not texts and (self.head != "score" or not all(map(_is_pair, inputs))):
            return "the inputs are not texts"
        if torch.is_autocast_enabled(self.device.type):
            return "autocast is enabled"
        if is_modified(self):
            return "its modules have hooks or replaced methods"
        sample, settings, _ = self._loaded
        current = self._sample()
        if torch.promote_types(current.dtype, sample.dtype) != sample.dtype:
            return f"its parameters were cast from {sample.dtype} to {current.dtype}"
        if not torch.equal(sample.to(current), current):
            return "its parameters have changed"
        tokenizes = tokenizes_as_engine(self[0], checkpoint.spec, preprocessing=self.head == "tokens")
        if settings != self._settings() or not tokenizes or not isinstance(self[-1], self.last):
            return "its modules or its tokenizer have changed, or are not supported"
        return None

    def _sample(self) -> Tensor:
        """Return values of every parameter. All of them would take longer to read than the forward pass of a pair."""
        values = (parameter.detach().reshape(-1) for parameter in self.parameters())
        return torch.cat([value[:: max(1, len(value) // SAMPLES)] for value in values])

    def _settings(self) -> tuple[object, ...]:
        """Return what the modules compute with, except for the parameters and `max_seq_length`."""
        transformer: Any = self[0]
        return (
            [(type(module), module.extra_repr()) for module in self.modules()],
            # The first forward pass sets the dimension of a SpladePooling.
            [module.get_config_dict() | {"embedding_dimension": None} for module in (*self,)[1:]],
            transformer.model.config.to_dict(),
            tokenizer_state(transformer.tokenizer),
            transformer.tokenizer.model_input_names,
            [getattr(transformer, name) for name in PREPROCESSING],
        )

    def _current_engine(self, checkpoint: Checkpoint) -> Engine:
        """Return an engine on the model's device, in its dtype, with its max_seq_length; it is kept."""
        engine, dtype, length = self._engine, self.dtype, self.max_seq_length
        assert dtype is not None and length is not None, (dtype, length)  # see tokenizes_as_engine
        where = engine and (engine._pipeline.runner.device, engine._pipeline.runner.encoder.weights.word.dtype)
        if engine is None or where != (self.device, dtype):
            self._engine = None  # before the next one needs memory
            if _file_states(checkpoint) != self._loaded[2]:
                raise CheckpointError(
                    f"the weight files have changed since the modules were loaded: {checkpoint.folder}"
                )
            engine = load(checkpoint.folder, device=self.device, dtype=dtype)
        if engine.checkpoint.max_length != length:
            pipeline = engine._pipeline
            checkpoint = replace(pipeline.checkpoint, max_length=length)
            engine = Engine(EmbeddingPipeline(checkpoint, pipeline.tokenizer, pipeline.runner, pipeline.token_budget))
        self._engine = engine
        return engine

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the engine; a copy loads its own."""
        return {**self.__dict__, "_engine": None}


def _file_states(checkpoint: Checkpoint) -> list[object]:
    """Return what differs after a weight file was replaced or deleted."""
    layers = checkpoint.score.dense if checkpoint.score else ()
    files = [*checkpoint.weight_files, *(file for layer in layers for file in layer.weight_files)]
    states = (file.exists() and file.stat() for file in files)
    return [state and (state.st_mtime_ns, state.st_size) for state in states]


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(text, str) for text in value)
