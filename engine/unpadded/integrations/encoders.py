"""sentence-transformers' CrossEncoder and SparseEncoder with a packed forward pass.

>>> from unpadded.integrations.sentence_transformers import CrossEncoder
>>> CrossEncoder("cross-encoder/ms-marco-MiniLM-L6-v2").predict([("What is TSNE?", "A method to visualize data.")])

The classes take the same arguments and return the same results; `batch_size` and `trust_remote_code` are ignored. See
`engine_inference` for what runs where.

Written for sentence-transformers >= 6.2, < 7, because it overrides `_inference` and `_load_modules`, private there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import sentence_transformers
import torch
from torch import Tensor, nn

from unpadded.integrations.engine_inference import EngineInference


class CrossEncoder(EngineInference, sentence_transformers.CrossEncoder):
    head, results = "score", "scores"

    @torch.inference_mode()
    def _inference(  # type: ignore[override]  # keywords are passed through
        self,
        inputs: list[Any],
        *,
        prompt: str | None,
        show_progress_bar: bool,
        activation_fn: Callable[[Tensor], Tensor] | None,
        apply_softmax: bool | None,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> Tensor:
        """Score in the engine if it computes what the modules would compute, else in the modules."""
        target = self._resolve_inference_device(device)
        self.eval()
        engine = self._engine_for(inputs, options)
        if engine is None:
            return super()._inference(
                inputs,
                prompt=prompt,
                show_progress_bar=show_progress_bar,
                activation_fn=activation_fn,
                apply_softmax=apply_softmax,
                device=device,
                **options,
            )
        pairs = [one if isinstance(one, str) else tuple(one) for one in inputs]
        logits = engine.score(pairs, activation="none", prompt=prompt or "", show_progress=bool(show_progress_bar))
        scores = torch.from_numpy(logits).to(target).reshape(len(pairs), -1)
        if activation_fn is not None:
            scores = activation_fn(scores)
        if self.num_labels == 1 and scores.ndim > 1:
            scores = scores.squeeze(-1)
        return nn.functional.softmax(scores, dim=1) if apply_softmax and scores.ndim > 1 else scores

    def _are_supported(self, inputs: list[Any]) -> bool:
        return super()._are_supported(inputs) or all(map(_is_pair, inputs))


class SparseEncoder(EngineInference, sentence_transformers.SparseEncoder):
    head, results = "sparse", "sparse vectors"

    @torch.inference_mode()
    def _inference(  # type: ignore[override]  # keywords are passed through
        self,
        inputs: list[Any],
        *,
        prompt: str | None,
        show_progress_bar: bool,
        convert_to_sparse_tensor: bool,
        save_to_cpu: bool,
        max_active_dims: int | None,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> Tensor:
        """Encode in the engine if it computes what the modules would compute, else in the modules."""
        target = self._resolve_inference_device(device)
        self.eval()
        engine = self._engine_for(inputs, options)
        if engine is None:
            return super()._inference(
                inputs,
                prompt=prompt,
                show_progress_bar=show_progress_bar,
                convert_to_sparse_tensor=convert_to_sparse_tensor,
                save_to_cpu=save_to_cpu,
                max_active_dims=max_active_dims,
                device=device,
                **options,
            )
        found = engine.encode_sparse(
            inputs, prompt=prompt or "", top_k=max_active_dims, show_progress=bool(show_progress_bar)
        )
        text = np.repeat(np.arange(len(inputs)), np.diff(found.indptr))
        size = len(inputs), self.get_embedding_dimension() or found.vocabulary
        indices = torch.from_numpy(np.stack([text, found.ids]))
        vectors = torch.sparse_coo_tensor(indices, torch.from_numpy(found.weights), size, is_coalesced=True)
        vectors = vectors if save_to_cpu else vectors.to(target)
        return vectors if convert_to_sparse_tensor else vectors.to_dense()


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(text, str) for text in value)
