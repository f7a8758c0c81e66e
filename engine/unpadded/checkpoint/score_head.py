"""The head of rerankers and classifiers: from the pooled state of a text, or of a pair of texts, to its scores."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unpadded.checkpoint.family import Family
from unpadded.checkpoint.json_config import not_implemented, optional, read_object, section
from unpadded.checkpoint.modules import Dense, Modules, Pooling, output_width
from unpadded.checkpoint.spec import EncoderSpec

IDENTITY, SIGMOID = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Sigmoid"


@dataclass(frozen=True, kw_only=True)
class ScoreHead:
    """One score per label, by the layers after a pooling."""

    pooling: Pooling
    dense: tuple[Dense, ...]
    labels: tuple[str, ...]
    sigmoid: bool  # of the scores, unless a caller wants the logits
    token_types: bool  # the second text of a pair has tokens of type 1


def read_score_head(
    modules: Modules, config: Mapping[str, Any], family: Family, spec: EncoderSpec, weight_files: tuple[Path, ...]
) -> ScoreHead | None:
    """Return the score head of a model for sequence classification or of modules that end in scores; None without one.

    The activation is that of sentence-transformers: the stated one, else a sigmoid if there is one label.
    """
    pooling, dense = modules.pooling, modules.score_dense
    if dense:
        labels = tuple(f"LABEL_{index}" for index in range(output_width(dense, spec.hidden)))
    else:
        classifies = modules.classifies
        if classifies is None:
            classifies = "ForSequenceClassification" in str(config.get("architectures"))
        if not classifies or family.score is None:
            return None
        names = section(config, "id2label")
        size = len(names) or optional(config, "num_labels", 2)
        labels = tuple(str(names.get(str(index), f"LABEL_{index}")) for index in range(size))
        pooling, dense = family.score(spec, config, size)
        dense = tuple(replace(layer, weight_files=weight_files) for layer in dense)
    stated = {**section(config, "sentence_transformers"), **modules.model_config}.get("activation_fn")
    stated = stated or config.get("sbert_ce_default_activation_function")
    if str(stated).startswith("torch.") and stated not in (IDENTITY, SIGMOID):
        raise not_implemented("activation_fn", stated, f"{IDENTITY}, {SIGMOID}")
    sigmoid = stated == SIGMOID if str(stated).startswith("torch.") else len(labels) == 1
    inputs = read_object(modules.transformer / "tokenizer_config.json", optional=True).get("model_input_names")
    typed = spec.token_types > 1 and (inputs is None or "token_type_ids" in inputs)
    return ScoreHead(pooling=pooling, dense=dense, labels=labels, sigmoid=sigmoid, token_types=typed)
