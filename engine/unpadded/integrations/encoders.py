"""sentence-transformers' CrossEncoder, SparseEncoder and MultiVectorEncoder with a packed forward pass.

>>> from unpadded.integrations.sentence_transformers import CrossEncoder
>>> CrossEncoder("cross-encoder/ms-marco-MiniLM-L6-v2").predict([("What is TSNE?", "A method to visualize data.")])

The classes take the same arguments and return the same results, see `engine_inference`; `batch_size` is ignored.

Written for sentence-transformers >= 6.2, < 7, because it overrides `_inference` and `_load_modules`, private there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import sentence_transformers
import torch
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor, nn

from unpadded.checkpoint.reader import Checkpoint
from unpadded.engine import Engine
from unpadded.integrations.engine_inference import EngineInference


class CrossEncoder(EngineInference, sentence_transformers.CrossEncoder):
    head, results = "score", "scores"
    keywords = frozenset({"activation_fn", "apply_softmax"})

    def _run(
        self, engine: Engine, inputs: list[Any], shared: dict[str, Any], target: torch.device, options: dict[str, Any]
    ) -> Tensor:
        pairs = [one if isinstance(one, str) else tuple(one) for one in inputs]
        logits = engine.score(pairs, activation="none", **shared)
        scores = torch.from_numpy(logits).to(target).reshape(len(pairs), -1)
        if options["activation_fn"] is not None:
            scores = options["activation_fn"](scores)
        if self.num_labels == 1 and scores.ndim > 1:
            scores = scores.squeeze(-1)
        return nn.functional.softmax(scores, dim=1) if options["apply_softmax"] and scores.ndim > 1 else scores


class SparseEncoder(EngineInference, sentence_transformers.SparseEncoder):
    head, results, last = "sparse", "sparse vectors", SpladePooling
    keywords = frozenset({"convert_to_sparse_tensor", "max_active_dims", "save_to_cpu", "task"})

    def _run(
        self, engine: Engine, inputs: list[Any], shared: dict[str, Any], target: torch.device, options: dict[str, Any]
    ) -> Tensor:
        pooling: Any = self[-1]
        # as the modules' first call does; for None all weights are kept, not the checkpoint's own top_k
        pooling.embedding_dimension = width = pooling.embedding_dimension or engine.checkpoint.spec.vocabulary
        found = engine.encode_sparse(inputs, top_k=options["max_active_dims"] or width, **shared)
        text, size = np.repeat(np.arange(len(inputs)), np.diff(found.indptr)), (len(inputs), found.vocabulary)
        indices, weights = torch.from_numpy(np.stack([text, found.ids])), torch.from_numpy(found.weights).to(self.dtype)
        vectors = torch.sparse_coo_tensor(indices, weights, size, check_invariants=True, is_coalesced=True)
        vectors = vectors if options["save_to_cpu"] else vectors.to(target)
        return vectors if options["convert_to_sparse_tensor"] else vectors.to_dense()


class MultiVectorEncoder(EngineInference, sentence_transformers.MultiVectorEncoder):
    head, results = "tokens", "token vectors"
    keywords = frozenset({"normalize_embeddings", "output_value", "save_to_cpu", "task", "token_pooling"})

    def _run(
        self, engine: Engine, inputs: list[Any], shared: dict[str, Any], target: torch.device, options: dict[str, Any]
    ) -> list[Tensor]:
        found = engine.encode_tokens(inputs, kind=options["task"], **shared)
        vectors = [torch.from_numpy(one).to(target, self.dtype) for one in found]
        if options["normalize_embeddings"]:
            vectors = [nn.functional.normalize(one, dim=-1) for one in vectors]
        if options["token_pooling"] is not None:
            vectors = options["token_pooling"].pool(vectors, task=options["task"])
        return [one.cpu() for one in vectors] if options["save_to_cpu"] else vectors

    def _own_reason(self, checkpoint: Checkpoint, inputs: list[Any], options: dict[str, Any]) -> str | None:
        if options["output_value"] != "token_embeddings" or options["task"] not in ("query", "document"):
            return "the engine gives the vectors of queries and of documents only"
        return super()._own_reason(checkpoint, inputs, options)

    def _settings(self) -> tuple[object, ...]:
        return *super()._settings(), self.max_seq_length
