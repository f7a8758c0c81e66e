"""An engine as an encoder or a cross-encoder of mteb: `mteb.evaluate(UnpaddedEncoder(engine), tasks)`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name

from unpadded.engine import Engine
from unpadded.options import EncodeKeywords

Batches: TypeAlias = Iterable[Mapping[str, list[str]]]  # of texts, in the column `text`

# mteb's task types and prompt types -> the tasks with which nomic's models are evaluated
NOMIC_TASKS = {"query": "search_query", "document": "search_document", "Clustering": "clustering"}
_CLASSIFIED = "Classification MultilabelClassification PairClassification Reranking STS Summarization"
NOMIC_TASKS |= dict.fromkeys(_CLASSIFIED.split(), "classification")
# The same for jina-embeddings-v3, whose tasks select adapters.
JINA_TASKS = {"Retrieval-query": "retrieval.query", "Retrieval-document": "retrieval.passage"}
JINA_TASKS |= dict.fromkeys(("Clustering", "Reranking"), "separation")
JINA_TASKS |= dict.fromkeys(("Classification", "MultilabelClassification", "PairClassification"), "classification")
JINA_TASKS |= dict.fromkeys(("BitextMining", "STS", "Summarization"), "text-matching")


class UnpaddedEncoder(AbsEncoder):  # type: ignore[misc, unused-ignore]  # Any where the package is absent
    """An engine for mteb.

    prompts: the prompt of each text by mteb's name of a task, a task type or a prompt type (query, document); the most
    specific one is used. None uses the checkpoint's tasks.
    """

    def __init__(self, engine: Engine, *, prompts: Mapping[str, str] | None = None) -> None:
        self.engine = engine
        self.options: dict[str, EncodeKeywords]
        if prompts is None:
            supported = engine.checkpoint.prompts
            tasks = [*NOMIC_TASKS.items(), *JINA_TASKS.items(), *((task, task) for task in supported)]
            self.options = {name: EncodeKeywords(task=task) for name, task in tasks if task in supported}
        else:
            self.options = {name: EncodeKeywords(prompt=prompt) for name, prompt in prompts.items()}
        self.mteb_model_meta = _model_meta(engine)

    def encode(self, inputs: Batches, *, task_metadata: Any, prompt_type: Any = None, **_: Any) -> np.ndarray:
        """Embed the column `text` of batches: [texts, dimensions]. batch_size is ignored; the token budget applies."""
        name = get_prompt_name(dict.fromkeys(self.options, ""), task_metadata, prompt_type)
        texts = (text for batch in inputs for text in batch["text"])
        options = self.options[name] if name else EncodeKeywords(prompt="")
        return np.asarray(self.engine.encode(texts, show_progress=False, **options))


class UnpaddedCrossEncoder:
    """An engine of a reranker for mteb's reranking tasks."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.mteb_model_meta = _model_meta(engine)
        engine.rank("", [])  # raises OptionError unless the model gives one score per pair

    def predict(self, inputs1: Batches, inputs2: Batches, **_: Any) -> np.ndarray:
        """Score the texts of two sequences of batches in pairs: [pairs]. batch_size is ignored."""
        queries, documents = ((text for batch in inputs for text in batch["text"]) for inputs in (inputs1, inputs2))
        return self.engine.score(zip(queries, documents, strict=True), show_progress=False)


def _model_meta(engine: Engine) -> Any:
    name = engine.checkpoint.name.rpartition("/")[2]
    return ModelMeta.create_empty({"name": f"unpadded/{name}", "revision": "local"})
