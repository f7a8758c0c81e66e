"""What crosses to a device arrives as it was, and what fills a bucket for a CUDA graph changes no text's bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import write_nomic

import unpadded
from unpadded.batch import pack
from unpadded.graphs import BUCKETS, TEXTS, bucket_of, fill
from unpadded.runner import FIELDS, _stage, _views
from unpadded_kernels import pool
from unpadded_kernels.attention import tile_map_of


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    folder = write_nomic(tmp_path_factory.mktemp("nomic"), scaling_factor=2.0, trained_length=100)
    return unpadded.load(folder, device="cpu").runner


def draw(lengths):
    ids = np.random.default_rng(0)
    return [ids.integers(5, 30000, length, dtype=np.int32) for length in lengths]


@pytest.mark.parametrize("lengths", [(1,), (7, 3, 40), (130, 5, 99)])
def test_a_batch_survives_the_crossing(runner, lengths):
    batch = replace(pack(draw(lengths), runner.encoder.spec), tile_map=tile_map_of(lengths, 64))
    words = _stage(batch)
    arrived = _views(words, batch)
    for name in FIELDS:
        assert torch.equal(getattr(arrived, name), getattr(batch, name)), name
        assert (getattr(arrived, name).data_ptr() - words.data_ptr()) % 16 == 0, name


@pytest.mark.parametrize("lengths", [(1,), (64,), (7, 3, 40), (60, 60, 60, 60), (99, 1)])
def test_a_filled_bucket_gives_the_same_bits(runner, lengths):
    texts = draw(lengths)
    batch = pack(texts, runner.encoder.spec)
    bucket = bucket_of(batch)
    assert bucket == min(size for size in BUCKETS if size >= sum(lengths))
    filled = fill(batch, bucket, TEXTS, tiles=0)
    assert len(filled.input_ids) == bucket and len(filled.cu_seqlens) == TEXTS + 1
    with torch.inference_mode():
        rows = pool(runner.encoder(filled), filled.cu_seqlens, "mean", False, 128, True)[: len(texts)]
    alone = np.concatenate([runner.embed([ids], layer_norm=False, dimensions=128, normalize=True) for ids in texts])
    assert np.array_equal(rows.numpy(), alone)


def test_tiles_that_fill_a_map_point_to_the_empty_text(runner):
    batch = replace(pack(draw((70, 3)), runner.encoder.spec), tile_map=tile_map_of((70, 3), 64))
    filled = fill(batch, 128, TEXTS, tiles=10)
    assert filled.tile_map.tolist() == [[0, 0], [0, 1], [1, 0], *[[TEXTS - 1, 0]] * 7]
    assert filled.cu_seqlens[TEXTS] - filled.cu_seqlens[TEXTS - 1] == 0


def test_what_no_bucket_holds(runner):
    spec = runner.encoder.spec
    assert bucket_of(pack(draw([33] * TEXTS), spec)) is None  # too many texts
    assert bucket_of(pack(draw([99] * 21), spec)) is None  # too many tokens
    assert bucket_of(pack(draw([101, 5]), spec)) is None  # a text with rotary frequencies of its own
