"""Turn text into embeddings with long-context encoders, without padding.

>>> import unpadded
>>> engine = unpadded.load("nomic-ai/nomic-embed-text-v1.5")
>>> engine.encode(["What is TSNE?"], task="search_query")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from unpadded.errors import (
    BusyError,
    CheckpointError,
    ConfigError,
    DeadlineError,
    InputError,
    OptionError,
    OutputError,
    OverloadedError,
    TooLargeError,
    UnpaddedError,
    WeightsError,
    WorkerError,
)

if TYPE_CHECKING:
    from unpadded.engine import Engine
    from unpadded.execution.results import Embeddings, Spans, Sparse, TokenVectors, maxsim
    from unpadded.integrations import nomic as embed
    from unpadded.loading import load

__version__ = "0.1.0"

__all__ = [
    "BusyError", "CheckpointError", "ConfigError", "DeadlineError", "Embeddings", "Engine", "InputError",
    "OptionError", "OutputError", "OverloadedError", "Spans", "Sparse", "TokenVectors", "TooLargeError",
    "UnpaddedError", "WeightsError", "WorkerError", "__version__", "embed", "load", "maxsim",
]  # fmt: skip

# Names that are imported when first used, so that `unpadded --help` does not wait for torch.
_LAZY = dict.fromkeys(("Embeddings", "Spans", "Sparse", "TokenVectors", "maxsim"), "unpadded.execution.results")
_LAZY |= {"Engine": "unpadded.engine", "load": "unpadded.loading"}


def __getattr__(name: str) -> Any:
    if name == "embed":
        return import_module("unpadded.integrations.nomic")
    if name not in _LAZY:
        raise AttributeError(f"module 'unpadded' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
