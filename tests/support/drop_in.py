"""Texts on which sentence-transformers and its drop-in are compared, and the comparison."""

import numpy as np
import torch

TEXTS = [
    "The weather is lovely today.",
    "He drove to the stadium, " * 60,
    "",
    "It's so sunny outside!",
    "Naïve café, ÅNGSTRÖM 東京",
    "[SEP] [CLS] [MASK] \x00 \u200b",
]


def assert_same(actual, expected, atol=1e-5):
    """Assert that nested results have the same types, dtypes and shapes, and values within atol."""
    assert type(actual) is type(expected)
    if isinstance(expected, list):
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other, atol)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, other in expected.items():
            if key == "token_embeddings":  # the drop-in's are zero at padding
                kept = expected["attention_mask"].bool()
                assert_same(actual[key][kept], other[kept], atol)
            else:
                assert_same(actual[key], other, atol)
    elif isinstance(expected, np.ndarray | np.generic | torch.Tensor):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        actual, expected = (torch.as_tensor(value).double() for value in (actual, expected))
        assert not actual.numel() or (actual - expected).abs().max() <= atol
    else:
        assert actual == expected
