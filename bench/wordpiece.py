"""A WordPiece tokenizer trained on Python's manual, for models with seeded weights."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path

from tokenizers import BertWordPieceTokenizer
from tokenizers.processors import BertProcessing

VOCABULARY = 30522
SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}


def write_tokenizer(folder: Path, model_max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer = BertWordPieceTokenizer()
    texts = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    tokenizer.train_from_iterator(texts, VOCABULARY, min_frequency=1, show_progress=False)
    around = [(SPECIAL[name], tokenizer.token_to_id(SPECIAL[name])) for name in ("sep_token", "cls_token")]
    tokenizer._tokenizer.post_processor = BertProcessing(*around)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model_max_length, **SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
