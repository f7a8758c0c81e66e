"""An engine as an encoder of mteb: `mteb.evaluate(UnpaddedEncoder(engine), tasks)`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name

from unpadded.engine import Engine
from unpadded.options import EncodeKeywords

# The task that nomic's models are evaluated with, by mteb's names of task types and of sides.
NOMIC_TASKS = {
    "query": "search_query",
    "document": "search_document",
    "Clustering": "clustering",
    "Classification": "classification",
    "MultilabelClassification": "classification",
    "PairClassification": "classification",
    "Reranking": "classification",
    "STS": "classification",
    "Summarization": "classification",
}
# The same of jina-embeddings-v3, whose tasks have adapters.
JINA_TASKS = {
    "Retrieval-query": "retrieval.query",
    "Retrieval-document": "retrieval.passage",
    "Clustering": "separation",
    "Classification": "classification",
    "MultilabelClassification": "classification",
    "PairClassification": "classification",
    "Reranking": "separation",
    "BitextMining": "text-matching",
    "STS": "text-matching",
    "Summarization": "text-matching",
}


class UnpaddedEncoder(AbsEncoder):  # type: ignore[misc, unused-ignore]  # Any where the package is absent
    """`unpadded.load(...)` for mteb.

    prompts: mteb's name of a task, a task type or a side (query, document) -> the words before every text; the most
    special one holds. Without them the checkpoint's own tasks.
    """

    def __init__(self, engine: Engine, *, prompts: Mapping[str, str] | None = None) -> None:
        self.engine = engine
        known = engine.checkpoint.prompts
        published = (*NOMIC_TASKS.items(), *JINA_TASKS.items())
        tasks = {name: task for name, task in published if task in known} | {name: name for name in known}
        self.options: dict[str, EncodeKeywords] = (
            {name: EncodeKeywords(task=task) for name, task in tasks.items()}
            if prompts is None
            else {name: EncodeKeywords(prompt=prompt) for name, prompt in prompts.items()}
        )
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": f"unpadded/{engine.checkpoint.name.rpartition('/')[2]}", "revision": "local"}
        )

    def encode(
        self,
        inputs: Iterable[Mapping[str, list[str]]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **_: Any,
    ) -> np.ndarray:
        """[texts, dimensions] of batches with a column `text`. batch_size has no say: the engine has a token budget."""
        name = get_prompt_name(dict.fromkeys(self.options, ""), task_metadata, prompt_type)
        texts = (text for batch in inputs for text in batch["text"])
        options = self.options[name] if name else EncodeKeywords(prompt="")
        vectors = self.engine.encode(texts, show_progress=False, **options)
        return np.asarray(vectors)
