"""Download the files of a checkpoint from the Hugging Face hub: only those that are read, no pickles, no Python."""

from pathlib import Path
from typing import Any, cast

from unpadded.errors import CheckpointError

_FILES = """
    *.model adapter_config.json added_tokens.json artifact.metadata colbert_linear.safetensors config.json
    config_sentence_transformers.json merges.txt model-*-of-*.safetensors model.safetensors
    model.safetensors.index.json modules.json sentence_*_config.json sparse_linear.safetensors special_tokens_map.json
    tokenizer.json tokenizer_config.json vocab.json vocab.txt
"""
FILES = _FILES.split()  # in the root or in the folder of a module
PATTERNS = [*FILES, *(f"[0-9]_*/{name}" for name in FILES)]


def fetch(model: str, revision: str | None, **options: Any) -> Path:
    """Return the folder of a snapshot, downloading what the cache lacks; HF_HUB_OFFLINE and HF_TOKEN apply.

    options: cache_dir, token and local_files_only of huggingface_hub.snapshot_download.
    """
    import huggingface_hub  # importing it takes a second, and a local folder does not need it
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError

    # of httpx, or of httpx2 from huggingface_hub 2 on, which lets its errors of the connection and of proxies through
    http_error = cast(type[Exception], HfHubHTTPError.__bases__[0])
    # without it, snapshot_download asks the hub which files a commit has, even offline
    options["local_files_only"] = options.get("local_files_only") or HF_HUB_OFFLINE
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=PATTERNS, **options))
    except (http_error, OSError, ValueError) as error:
        raise CheckpointError(
            f"model {model!r} (revision {revision!r}) is not a local folder and cannot be fetched from the hub: "
            f"{type(error).__name__}: {str(error).strip()}\n"
            "check the name, the revision, the network, and for private models `hf auth login`"
        ) from error
