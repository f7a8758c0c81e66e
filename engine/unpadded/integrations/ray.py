"""Past one machine, on Ray: `UnpaddedEmbedder` and `embed` for Ray Data, `serve` for Ray Serve."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unpadded.integrations.ray_data import UnpaddedEmbedder, embed
    from unpadded.integrations.ray_serve import serve

__all__ = ["UnpaddedEmbedder", "embed", "serve"]

# Imported at first use: each needs its half of the extra alone.
_HOMES = {"UnpaddedEmbedder": "ray_data", "embed": "ray_data", "serve": "ray_serve"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"unpadded.integrations.{_HOMES[name]}"), name)
