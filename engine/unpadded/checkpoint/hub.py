"""Download the files of a checkpoint from the Hugging Face hub: only those that are read, no pickles, no Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unpadded.errors import CheckpointError

FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "sentence_*_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
PATTERNS = (
    *FILES,
    *(f"[0-9]_*/{name}" for name in FILES),
    "*/adapter_config.json",
    "*/adapter_model.safetensors",
    "modules.json",
    "config_sentence_transformers.json",
)


def fetch(model: str, revision: str | None, **options: Any) -> Path:
    """Return the folder of a snapshot, downloading what the cache lacks; HF_HUB_OFFLINE and HF_TOKEN apply.

    options: cache_dir, token and local_files_only of huggingface_hub.snapshot_download.
    """
    import httpx  # a dependency of huggingface_hub, which lets errors of the connection and of proxies through
    import huggingface_hub  # importing it takes a second, and a local folder does not need it
    from huggingface_hub.constants import HF_HUB_OFFLINE

    # without it, snapshot_download asks the hub which files a commit has, even offline
    options["local_files_only"] = options.get("local_files_only") or HF_HUB_OFFLINE
    try:
        return Path(
            huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=list(PATTERNS), **options)
        )
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"model {model!r} (revision {revision!r}) is not a local folder and cannot be fetched from the hub: "
            f"{type(error).__name__}: {str(error).strip()}\n"
            "check the name, the revision, the network, and for private models `hf auth login`"
        ) from error
