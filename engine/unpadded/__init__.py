"""unpadded: text to embeddings with long-context encoders, nothing padded.

>>> import unpadded
>>> engine = unpadded.load("nomic-ai/nomic-embed-text-v1.5")
>>> engine.encode(["What is TSNE?"], task="search_query")
"""

from __future__ import annotations

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
    from unpadded.engine import Embeddings, Engine
    from unpadded.integrations import nomic as embed
    from unpadded.integrations.accelerate import accelerate, restore
    from unpadded.loading import load

__version__ = "0.1.0"

__all__ = [
    "BusyError",
    "CheckpointError",
    "ConfigError",
    "DeadlineError",
    "Embeddings",
    "Engine",
    "InputError",
    "OptionError",
    "OutputError",
    "OverloadedError",
    "TooLargeError",
    "UnpaddedError",
    "WeightsError",
    "WorkerError",
    "__version__",
    "accelerate",
    "embed",
    "load",
    "restore",
]

# Where each public name lives: imported at first use, so that the command line answers at once.
_HOMES = {
    "Embeddings": "unpadded.engine",
    "Engine": "unpadded.engine",
    "accelerate": "unpadded.integrations.accelerate",
    "load": "unpadded.loading",
    "restore": "unpadded.integrations.accelerate",
}
_MODULES = {"embed": "unpadded.integrations.nomic"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name not in _HOMES:
        raise AttributeError(f"module 'unpadded' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
