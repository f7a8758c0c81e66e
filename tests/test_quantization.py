"""Matryoshka and quantization against torch and sentence-transformers."""

from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sentence_transformers.util.quantization import quantize_embeddings

from unpadded.errors import OptionError
from unpadded.options import Precision
from unpadded.quantization import quantize
from unpadded_kernels import matryoshka


@pytest.fixture
def pooled() -> torch.Tensor:
    rows = torch.randn(150, 100, generator=torch.Generator().manual_seed(0)) * 3 + 0.5
    rows[7] = 0
    return rows


def test_matryoshka_is_layer_norm_then_cut_then_l2(pooled: torch.Tensor) -> None:
    x = pooled.double()
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    x = x[:, :64]
    expected = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
    actual = matryoshka(pooled, dimensions=64, layer_norm=True, normalize=True)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(actual[7], torch.zeros(64))


def test_without_layer_norm_the_cut_comes_before_l2(pooled: torch.Tensor) -> None:
    actual = matryoshka(pooled, dimensions=64, layer_norm=False, normalize=True)
    assert torch.equal(actual, F.normalize(pooled[:, :64], dim=1))
    assert torch.equal(actual[7], torch.zeros(64))


def test_matryoshka_without_options_changes_nothing(pooled: torch.Tensor) -> None:
    assert torch.equal(matryoshka(pooled, dimensions=100, layer_norm=False, normalize=False), pooled)
    assert torch.equal(matryoshka(pooled, dimensions=1, layer_norm=False, normalize=False), pooled[:, :1])
    assert matryoshka(pooled[:0], dimensions=64, layer_norm=True, normalize=True).shape == (0, 64)


@pytest.mark.parametrize("dimensions", [1, 7, 64, 100])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_row_does_not_depend_on_its_batch(pooled: torch.Tensor, dimensions: int, layer_norm: bool) -> None:
    together = matryoshka(pooled, dimensions=dimensions, layer_norm=layer_norm, normalize=True)
    for size in (1, 2, 7, 64):
        apart = [
            matryoshka(part, dimensions=dimensions, layer_norm=layer_norm, normalize=True)
            for part in pooled.split(size)
        ]
        assert torch.equal(torch.cat(apart), together)


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("rows", [0, 2, 150])
@pytest.mark.parametrize("dimensions", [96, 100])
def test_quantize_matches_sentence_transformers(
    pooled: torch.Tensor, precision: Precision, rows: int, dimensions: int
) -> None:
    vectors = pooled[:rows, :dimensions].numpy()
    expected = quantize_embeddings(vectors, precision)
    actual = quantize(vectors, precision)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_quantize_with_ranges_matches_sentence_transformers(
    pooled: torch.Tensor, precision: Precision, dtype: type
) -> None:
    vectors = pooled.numpy()
    ranges = np.stack([vectors[:50].min(axis=0), vectors[:50].max(axis=0)]).astype(dtype)
    ranges[1, 3] = ranges[0, 3]  # a constant dimension
    for part in (vectors, vectors[:1]):  # some values are outside of the ranges
        np.testing.assert_array_equal(quantize(part, precision, ranges), quantize_embeddings(part, precision, ranges))


def test_float16_rounds_to_nearest_even() -> None:
    actual = quantize(np.array([[1 + 2**-11, 1 + 3 * 2**-11, 0.1]], np.float32), "float16")
    assert actual.dtype == np.float16
    np.testing.assert_array_equal(actual.astype(np.float64), [[1, 1 + 2**-9, 0.0999755859375]])


def test_quantize_rejects_wrong_arguments(pooled: torch.Tensor) -> None:
    vectors = pooled.numpy()
    with pytest.raises(OptionError, match=f"precision is unknown: 'int4'; use one of {', '.join(get_args(Precision))}"):
        quantize(vectors, "int4")
    with pytest.raises(OptionError, match=r"wrong shape: \(2, 99\); pass \(2, 100\)"):
        quantize(vectors, "int8", np.zeros((2, 99), np.float32))
    with pytest.raises(OptionError, match=r"int8 needs the range of each dimension.*pass ranges"):
        quantize(vectors[:1], "int8")
