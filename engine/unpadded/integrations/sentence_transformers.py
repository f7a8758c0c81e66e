"""sentence-transformers' SentenceTransformer, whose texts go through the engine.

>>> from unpadded.integrations.sentence_transformers import SentenceTransformer
>>> SentenceTransformer("nomic-ai/nomic-embed-text-v1.5").encode(["search_query: What is TSNE?"])

Loading, saving and everything around are sentence-transformers' own; a list of strings to embeddings of sentences or
tokens is the engine's work. What the engine does not do (modules of other kinds, a tokenizer that cuts on the left ...)
runs their code around the packed forward pass, and a checkpoint of no known family runs as they load it. The values are
theirs: `truncate_dim` cuts without layer norm, as there.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.base.modules import Transformer as TheirTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import truncate_embeddings
from torch import Tensor, nn

from unpadded.checkpoint.hub import fetch
from unpadded.checkpoint.modules import TASK_TRANSFORMER
from unpadded.checkpoint.reader import Checkpoint, open_checkpoint
from unpadded.engine import Engine
from unpadded.errors import ConfigError, OptionError
from unpadded.execution.runner import Dense as RunnerDense
from unpadded.execution.runner import Runner
from unpadded.integrations.transformers import UnpaddedModel, make_config

logger = logging.getLogger("unpadded")

POOLING = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
ACTIVATIONS: dict[type, str] = {nn.Identity: "identity", nn.Tanh: "tanh"}
# Loading keywords that sentence-transformers adds, already applied to the folder.
APPLIED = {"token", "trust_remote_code", "revision", "local_files_only", "cache_dir"}
KEPT = ("processing_kwargs", "query_length", "document_length", "query_expansion")  # of what it saved
SENTENCE = "sentence_embedding"


class Transformer(TheirTransformer):
    """Their first module, around an `UnpaddedModel`."""

    tokenizer_as_loaded: tuple[object, ...] = ()  # set by `around`

    @classmethod
    def load(cls, model_name_or_path: str, **options: Any) -> TheirTransformer:  # type: ignore[override]
        """Theirs for a checkpoint that is refused; the log has the reason."""
        checkpoint = _open(model_name_or_path, **options)
        found: TheirTransformer = (
            TheirTransformer.load(model_name_or_path, **options)
            if checkpoint is None
            else Transformer.around(checkpoint, **options)
        )
        return found

    @staticmethod
    def around(
        checkpoint: Checkpoint,
        *,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> Transformer:
        folder = str(checkpoint.folder)
        saved = Transformer.load_config(folder)
        transformer: Transformer = Transformer(
            folder,
            model_kwargs=_own(model_kwargs) | _own(config_kwargs),
            processor_kwargs=_own(processor_kwargs),
            do_lower_case=checkpoint.lower_case,
            **{key: saved[key] for key in KEPT if key in saved},
        )
        if "model_max_length" not in (processor_kwargs or {}):
            transformer.max_seq_length = checkpoint.max_length
        transformer.tokenizer_as_loaded = transformer.tokenizer_state()
        return transformer

    def tokenizer_state(self) -> tuple[object, ...]:
        """What a caller may change of a tokenizer, and the engine's own would not know."""
        tokenizer: Any = self.tokenizer
        backend = tokenizer.backend_tokenizer
        parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
        states = (part and part.__getstate__() for part in parts)
        return len(tokenizer), tokenizer.truncation_side, self.do_lower_case, *states

    def _load_config(self, model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]) -> tuple[Any, bool]:
        return make_config(open_checkpoint(model_name_or_path)), False

    def _load_model(  # type: ignore[override]  # what is used of a PreTrainedModel, UnpaddedModel has
        self, model_name_or_path: str, task: str, config: Any, backend: str, is_peft_model: bool, **options: Any
    ) -> UnpaddedModel:
        return UnpaddedModel.from_pretrained(model_name_or_path, **options)


class SentenceTransformer(sentence_transformers.SentenceTransformer):
    """Takes the same arguments and gives the same results; `trust_remote_code` is not needed and runs nothing."""

    def _load_modules(  # type: ignore[override]  # passed on as they come
        self, model_name_or_path: str, *, trust_remote_code: bool, **options: Any
    ) -> tuple[list[nn.Module] | OrderedDict[str, nn.Module], dict[str, Any]]:
        if self.backend != "torch":
            raise OptionError(f"backend = {self.backend!r} is not offered; leave it out, or use sentence_transformers")
        if trust_remote_code:
            logger.info("trust_remote_code is not needed: no code of a checkpoint is ever run")
        return super()._load_modules(model_name_or_path, trust_remote_code=False, **options)

    def _load_module_class_from_ref(
        self,
        class_ref: str,
        model_name_or_path: str,
        trust_remote_code: bool,
        revision: str | None,
        *args: Any,
        **where: Any,
    ) -> Any:
        if class_ref == TASK_TRANSFORMER and _open(model_name_or_path, revision=revision, **where) is not None:
            return Transformer
        found = super()._load_module_class_from_ref(
            class_ref, model_name_or_path, trust_remote_code, revision, *args, **where
        )
        return Transformer if found is TheirTransformer else found

    def _load_default_modules(  # type: ignore[override]  # passed on as they come
        self, model_name_or_path: str, **options: Any
    ) -> tuple[list[nn.Module] | OrderedDict[str, nn.Module], dict[str, Any]]:
        checkpoint = _open(model_name_or_path, **options)
        if checkpoint is None:
            return super()._load_default_modules(model_name_or_path, **options)
        if not options["local_files_only"]:
            self.model_card_data.set_base_model(model_name_or_path, revision=options["revision"])
        return [Transformer.around(checkpoint, **options), Pooling(checkpoint.spec.hidden, "mean")], {}

    @torch.inference_mode()
    def _inference(  # type: ignore[override]  # the keywords are SentenceTransformer's own
        self,
        inputs: list[Any],
        *,
        prompt: str | None,
        show_progress_bar: bool,
        output_value: str | None,
        normalize_embeddings: bool,
        truncate_dim: int | None,
        save_to_cpu: bool,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> Any:
        where = self._resolve_inference_device(device)
        self.eval()
        plain = set(options) <= {"batch_size", "task"} and all(isinstance(text, str) for text in inputs)
        engine = self._engine() if plain and inputs else None
        adapter = self._adapter(options.get("task"))
        if adapter is not None and (engine is None or output_value is None):
            raise OptionError(f"task = {adapter!r} was given with what its adapter is not run for; encode plain texts")
        if engine is not None and output_value == "token_embeddings" and self.tokenizer.padding_side == "right":
            rows = engine.token_embeddings(inputs, prompt=prompt or "", task=adapter)
            return [torch.from_numpy(row).to(where, self.dtype) for row in rows]
        if engine is None or output_value != SENTENCE:
            return super()._inference(
                inputs,
                prompt=prompt,
                show_progress_bar=show_progress_bar,
                output_value=output_value,
                normalize_embeddings=normalize_embeddings,
                truncate_dim=truncate_dim,
                save_to_cpu=save_to_cpu,
                device=device,
                **options,
            )
        vectors = engine.embed(
            inputs,
            prompt=prompt or "",
            task=adapter,
            normalize=self._normalizes(),
            show_progress=bool(show_progress_bar),
        ).vectors
        embeddings: Tensor = torch.from_numpy(vectors).to(self.dtype)
        if truncate_dim is not None:
            embeddings = truncate_embeddings(embeddings, truncate_dim)
        if normalize_embeddings:
            embeddings = nn.functional.normalize(embeddings, p=2, dim=1)
        return embeddings if save_to_cpu else embeddings.to(where)

    def _adapter(self, task: str | None) -> str | None:
        """The task where the checkpoint has adapters, which its own first module takes it for."""
        model = getattr(self[0], "model", None)
        adapters = model.engine.checkpoint.spec.lora if isinstance(model, UnpaddedModel) else None
        if task is None or adapters is None:
            return None
        if task not in adapters.tasks:
            raise OptionError(f"task is unknown: {task!r}; the adapters are {', '.join(adapters.tasks)}")
        return task

    def _engine(self) -> Engine | None:
        """The engine, where it does exactly what the modules do as they are set up at this moment."""
        transformer, *following = self.children()
        pipeline = _pipeline(following[:-1] if self._normalizes() else following)
        if pipeline is None or not isinstance(transformer, Transformer) or _hooked(self):
            return None
        engine: Engine = transformer.model.engine
        length = transformer.max_seq_length
        limit = engine.checkpoint.spec.position_limit
        if (
            not isinstance(length, int)
            or (limit and length > limit)
            or any(getattr(transformer, key) for key in KEPT)
            or transformer.tokenizer_state() != transformer.tokenizer_as_loaded
            or Path(transformer.tokenizer.name_or_path) != engine.checkpoint.folder
        ):
            return None
        runner = engine._pipeline.runner
        if (runner.pooling, _addresses(runner.dense)) != (pipeline[0], _addresses(pipeline[1])):
            runner = Runner(runner.encoder, runner.device, pooling=pipeline[0], dense=pipeline[1])
        if runner is not engine._pipeline.runner or length != engine.checkpoint.max_length:
            transformer.model.engine = engine = Engine(engine._pipeline.with_runner(runner, max_length=length))
        return engine

    def _normalizes(self) -> bool:
        last = self._last_module()
        return type(last) is Normalize and last.module_input_name == last.module_output_name == SENTENCE

    def save(self, path: str, *args: Any, **options: Any) -> None:
        """As sentence-transformers saves, loadable by it as well."""
        super().save(path, *args, **options)
        if path is None:
            return
        file = Path(path) / "modules.json"
        modules = json.loads(file.read_text())
        for module in modules:
            if module["type"] == f"{Transformer.__module__}.{Transformer.__qualname__}":
                module["type"] = "sentence_transformers.models.Transformer"
        file.write_text(json.dumps(modules, indent=2))


def _open(
    model: str,
    *,
    token: str | bool | None,
    cache_folder: str | None,
    revision: str | None,
    local_files_only: bool,
    **_: Any,
) -> Checkpoint | None:
    """Where it is refused None, and the log says why."""
    folder = Path(model)
    if not folder.is_dir():
        folder = fetch(model, revision, cache_dir=cache_folder, token=token, local_files_only=local_files_only)
    try:
        return open_checkpoint(folder)
    except ConfigError as error:
        logger.warning("%s runs as sentence-transformers loads it, no faster: %s", model, error)
        return None


def _own(keywords: dict[str, Any] | None) -> dict[str, Any]:
    """Loading keywords without those that were applied to the folder."""
    return {key: value for key, value in (keywords or {}).items() if key not in APPLIED}


def _pipeline(modules: list[nn.Module]) -> tuple[str, tuple[RunnerDense, ...]] | None:
    """A Pooling and Dense modules as a runner takes them, sharing their memory; None for what it does not do."""
    if not modules:
        return None
    pooling, *dense = modules
    mode: Any = getattr(pooling, "pooling_mode", None)
    if type(pooling) is not Pooling or not pooling.include_prompt or mode not in POOLING:
        return None
    found: list[RunnerDense] = []
    for module in dense:
        if (
            type(module) is not Dense
            or not module.module_input_name == module.module_output_name == SENTENCE
            or module.use_residual
            or type(module.activation_function) not in ACTIVATIONS
        ):
            return None
        linear: Any = module.linear
        bias = None if linear.bias is None else linear.bias.detach()
        found.append((linear.weight.detach(), bias, ACTIVATIONS[type(module.activation_function)]))
    return POOLING[mode], tuple(found)


def _addresses(dense: tuple[RunnerDense, ...]) -> list[tuple[object, ...]]:
    return [(weight.data_ptr(), bias is not None and bias.data_ptr(), name) for weight, bias, name in dense]


def _hooked(model: nn.Module) -> bool:
    """Somebody wants to see the modules' forward passes."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
