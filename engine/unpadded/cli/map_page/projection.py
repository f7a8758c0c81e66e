"""Vectors to places on a plane, by UMAP."""

from __future__ import annotations

import warnings

import numpy as np

from unpadded.errors import OptionError

NEIGHBORS = 15
FEWEST = 4  # points that UMAP can place


def import_umap() -> None:
    """Raise OptionError where the extra is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TensorFlow is not installed
            import umap  # noqa: F401
    except ImportError as error:
        raise OptionError("umap-learn is not installed: a map needs it; pip install 'unpadded[map]'") from error


def project(vectors: np.ndarray) -> np.ndarray:
    """[n, dimensions] fp32 -> [n, 2]: near vectors by cosine lie near. Seeded: equal vectors give equal places."""
    import umap

    if len(vectors) < FEWEST:
        return np.stack([np.arange(len(vectors)), np.zeros(len(vectors))], axis=1)
    fitted = umap.UMAP(n_neighbors=min(NEIGHBORS, len(vectors) - 1), metric="cosine", random_state=0, n_jobs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few points: some lie apart from all others
        places: np.ndarray = fitted.fit_transform(vectors)
    return places
