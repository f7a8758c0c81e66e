"""sentence-transformers' SentenceTransformer, whose texts go through the engine.

>>> from unpadded.adapters.sentence_transformers import SentenceTransformer
>>> SentenceTransformer("nomic-ai/nomic-embed-text-v1.5").encode(["search_query: What is TSNE?"])

A list of strings to sentence embeddings is the engine's work. Everything else (token embeddings, modules that were
changed, a tokenizer that cuts on the left ...) runs sentence-transformers' own code around the packed forward pass. The
values are sentence-transformers': `truncate_dim` cuts without layer norm, as there.
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

from unpadded.adapters.transformers import UnpaddedModel, make_config
from unpadded.checkpoint import MODEL_FILE, Checkpoint, open_checkpoint
from unpadded.config import read_object
from unpadded.engine import Engine
from unpadded.errors import OptionError
from unpadded.hub import fetch

logger = logging.getLogger("unpadded")

POOLING = {"mean": "mean", "cls": "cls", "last": "lasttoken"}
# Loading keywords that sentence-transformers adds, already applied to the folder.
APPLIED = {"token", "trust_remote_code", "revision", "local_files_only", "cache_dir"}


class Transformer(TheirTransformer):
    """Their first module, around an `UnpaddedModel`; the checkpoint is a folder."""

    def _load_config(self, model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]) -> tuple[Any, bool]:
        return make_config(open_checkpoint(model_name_or_path)), False

    def _load_model(  # type: ignore[override]  # what is used of a PreTrainedModel, UnpaddedModel has
        self, model_name_or_path: str, task: str, config: Any, backend: str, is_peft_model: bool, **options: Any
    ) -> UnpaddedModel:
        return UnpaddedModel.from_pretrained(model_name_or_path, **options)


class SentenceTransformer(sentence_transformers.SentenceTransformer):
    """Takes the same arguments and gives the same results; `trust_remote_code` is not needed and runs nothing."""

    def _load_modules(
        self,
        model_name_or_path: str,
        token: bool | str | None,
        cache_folder: str | None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
    ) -> tuple[list[nn.Module] | OrderedDict[str, nn.Module], dict[str, Any]]:
        if self.backend != "torch":
            raise OptionError(f"backend = {self.backend!r} is not offered; leave it out, or use sentence_transformers")
        if trust_remote_code:
            logger.info("trust_remote_code is not needed: no code of a checkpoint is ever run")
        folder = Path(model_name_or_path)
        if not folder.is_dir():
            folder = fetch(
                model_name_or_path,
                revision,
                cache_dir=cache_folder,
                token=token,
                local_files_only=local_files_only,
            )
        if (folder / MODEL_FILE).exists():
            self._parse_model_config(read_object(folder / MODEL_FILE))
        checkpoint = open_checkpoint(folder)
        options = {key: value for key, value in (model_kwargs or {}).items() if key not in APPLIED}
        options |= {key: value for key, value in (config_kwargs or {}).items() if key not in APPLIED}
        transformer = Transformer(
            str(checkpoint.folder),
            model_kwargs=options,
            processor_kwargs={key: value for key, value in (processor_kwargs or {}).items() if key not in APPLIED},
            do_lower_case=checkpoint.lower_case,
        )
        if "model_max_length" not in (processor_kwargs or {}):
            transformer.max_seq_length = checkpoint.max_length
        return [transformer, *_following(checkpoint)], {}

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
        engine = self._engine() if output_value == "sentence_embedding" else None
        plain = set(options) <= {"batch_size", "task"} and all(isinstance(text, str) for text in inputs)
        if engine is None or not plain or not inputs:
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
        where = self._resolve_inference_device(device)
        self.eval()
        engine = self._engine() or engine  # of the device that it was moved to
        vectors = engine.embed(inputs, prompt=prompt or "", show_progress=bool(show_progress_bar)).vectors
        embeddings: Tensor = torch.from_numpy(vectors).to(self.dtype)
        if truncate_dim is not None:
            embeddings = truncate_embeddings(embeddings, truncate_dim)
        if normalize_embeddings:
            embeddings = nn.functional.normalize(embeddings, p=2, dim=1)
        return embeddings if save_to_cpu else embeddings.to(where)

    def _engine(self) -> Engine | None:
        """The engine, where it does exactly what the modules do as they are set up at this moment."""
        transformer, *following = self.children()
        if not isinstance(transformer, Transformer) or not isinstance(transformer.model, UnpaddedModel):
            return None
        engine, tokenizer, length = transformer.model.engine, transformer.tokenizer, transformer.max_seq_length
        checkpoint = engine.checkpoint
        as_loaded = (
            [type(module) for module in following] == _kinds(checkpoint)
            and following[0].pooling_mode == POOLING[checkpoint.pooling]
            and following[0].include_prompt
            and not checkpoint.dense  # their weights are parameters, which may have been changed
            and not transformer.processing_kwargs
            and not (transformer.query_length or transformer.document_length or transformer.query_expansion)
            and tokenizer.truncation_side == "right"
            and Path(tokenizer.name_or_path) == checkpoint.folder
        )
        longest = checkpoint.spec.position_limit or length
        if not as_loaded or not isinstance(length, int) or length > longest:
            return None
        if length != checkpoint.max_length:
            transformer.model.engine = engine = engine.with_runner(engine.runner, max_length=length)
        return engine

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


def _following(checkpoint: Checkpoint) -> list[nn.Module]:
    """The modules after the first, with their weights."""
    pooling = Pooling(checkpoint.spec.hidden, POOLING[checkpoint.pooling])
    dense = [Dense.load(str(one.weight_file.parent)) for one in checkpoint.dense]
    return [pooling, *dense, *([Normalize()] if checkpoint.normalize else [])]


def _kinds(checkpoint: Checkpoint) -> list[type[nn.Module]]:
    """The types of those modules."""
    return [Pooling, *[Dense] * len(checkpoint.dense), *([Normalize] if checkpoint.normalize else [])]
