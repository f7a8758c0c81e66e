"""The files of a checkpoint on the Hugging Face hub: only those that are read, never a pickle, never Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

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
ADAPTER_FILES = ("*/adapter_config.json", "*/adapter_model.safetensors")
ALLOWED = (
    *FILES,
    *(f"[0-9]_*/{name}" for name in FILES),
    *ADAPTER_FILES,
    "modules.json",
    "config_sentence_transformers.json",
)


def fetch(model: str, revision: str | None, **where: Any) -> Path:
    """The folder of a snapshot, downloaded where the cache lacks it; HF_HUB_OFFLINE and tokens are the library's.

    where: its cache_dir, token and local_files_only.
    """
    import huggingface_hub  # takes a second to import, and a folder does not need it
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    # httpx's, for connections and proxies; the package it comes from depends on the version of the hub's library
    transport_error = cast(type[Exception], HfHubHTTPError.__mro__[1])
    # said outright, or it asks the hub which files a commit has even offline
    where["local_files_only"] = where.get("local_files_only") or HF_HUB_OFFLINE
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=list(ALLOWED), **where))
    except (transport_error, HFValidationError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise CheckpointError(
            f"model {model!r} (revision {revision!r}) is not a folder here and cannot be fetched from the hub: "
            f"{type(error).__name__}: {str(error).strip()}\n"
            "check the name, the revision, the network, and for private models `hf auth login`"
        ) from error
