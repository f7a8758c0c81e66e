"""Ray, for more than one machine: `UnpaddedEmbedder` and `embed` for Ray Data, `serve` for Ray Serve."""

from __future__ import annotations

from unpadded.integrations.ray_data import UnpaddedEmbedder, embed
from unpadded.integrations.ray_serve import serve

__all__ = ["UnpaddedEmbedder", "embed", "serve"]
