"""Several engines, threads and streams on CUDA devices, and errors of a device. Without a GPU on the stand-in."""

import asyncio
import contextlib
import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from support.checkpoints import REAL, write_nomic
from support.devices import HAS_CUDA
from support.family_checks import random_ids

import unpadded
from unpadded.execution import worker_process
from unpadded.execution.worker_pool import WorkerPool
from unpadded.model.batch import pack
from unpadded.options import VectorOptions

SHAPE = REAL | {"layers": 4} if HAS_CUDA else {"layers": 1, "hidden": 64, "heads": 4, "intermediate": 256}
OPTIONS = {"dtype": "float16", "max_length": 8192, "batch_invariant": True}
VECTORS = VectorOptions(layer_norm=False, dimensions=SHAPE["hidden"], normalize=False)
SMALL, SAME_BUCKET = random_ids((5,)), random_ids((7,), seed=1)
LARGE = random_ids((600, 5000) if HAS_CUDA else (9, 12))  # exceeds every bucket
BREAKING = 11  # tokens of a text whose batch breaks the CUDA context


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_nomic(tmp_path_factory.mktemp("nomic"), tokenizer=False, **SHAPE)


@pytest.fixture
def load(folder, cuda):
    return partial(unpadded.load, folder, device=cuda, **OPTIONS)


@pytest.fixture
def expected(load):
    """Return a function that computes vectors without graphs."""
    engine = load()
    engine._pipeline.backend.graphs = None
    return engine.encode


def delay(stream):
    """Let the work of a stream begin late, so that work that does not wait for it runs before it."""
    if HAS_CUDA:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)


def test_graphs_outlive_another_engine(load, cuda, expected):
    one, other = load(), load()
    for engine in (one, other):
        engine.encode(SMALL)
    assert one._pipeline.backend.graphs.by_key and other._pipeline.backend.graphs.by_key
    del other, engine
    gc.collect()
    torch.cuda.empty_cache()
    torch.full((2**24,), float("nan"), device=cuda)  # in memory that is free
    assert np.array_equal(one.encode(SMALL), expected(SMALL))


def test_engines_on_two_devices(folder, cuda, expected):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    engines = [unpadded.load(folder, device=f"cuda:{index}", **OPTIONS) for index in (0, 1)]
    for texts in (SMALL, SAME_BUCKET):
        for engine in engines:
            assert np.array_equal(engine.encode(texts), expected(texts)), engine.describe()


def test_encode_after_aembed_and_close(load, expected):
    """The graphs were captured in a thread that has exited."""
    engine = load()
    assert np.array_equal(asyncio.run(engine.aencode(SMALL)), expected(SMALL))
    assert engine._pipeline.backend.graphs.by_key
    engine.close()
    for texts in (SAME_BUCKET, SMALL):
        assert np.array_equal(engine.encode(texts), expected(texts))


def test_two_threads_compute_the_bits_of_one(load, expected, monkeypatch):
    """Each waits before a replay until the other is about to replay too, which a lock prevents."""
    engine, batches = load(), (SMALL, SAME_BUCKET)
    alone = [expected(texts) for texts in batches]
    engine.encode(SMALL)
    both, replay = threading.Barrier(2), torch.cuda.CUDAGraph.replay

    def replay_together(graph):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay_together)
    with ThreadPoolExecutor(2) as threads:
        for _ in range(50 if HAS_CUDA else 1):
            for vectors, one in zip(threads.map(engine.encode, batches), alone, strict=True):
                assert np.array_equal(vectors, one)
    assert both.broken


def test_batches_in_flight_keep_their_inputs(load, expected):
    runner = load()._pipeline.backend
    batches = (SMALL, LARGE, SAME_BUCKET, LARGE[::-1])
    for texts in batches:
        runner.launch(texts, VECTORS)()
    delay(runner.encoder.stream)
    pending = [runner.launch(texts, VECTORS) for texts in batches]
    for vectors, texts in zip(pending, batches, strict=True):
        assert np.array_equal(vectors(), expected(texts))


@pytest.mark.parametrize("texts", [SMALL, LARGE], ids=["graph", "eager"])
@torch.no_grad()
def test_forward_is_ordered_with_the_stream_of_its_caller(load, cuda, texts):
    runner = load()._pipeline.backend
    batch = pack(texts, runner.encoder.spec)
    expected = (runner.forward(batch) * 2).cpu()
    side, default = torch.cuda.Stream(cuda), torch.cuda.current_stream(cuda)
    delay(runner.encoder.stream)
    with torch.cuda.stream(side):
        hidden = runner.forward(batch)
        delay(side)
        found = hidden * 2
        del hidden
        with torch.cuda.stream(default):
            runner.forward(pack(LARGE, runner.encoder.spec))  # must not use the memory that was freed
        embeds = runner.encoder.weights.word * 1
        from_embeds = runner.forward(batch, embeds=embeds) * 2
        del embeds
        torch.zeros_like(runner.encoder.weights.word)
        assert torch.equal(found.cpu(), expected) and torch.equal(from_embeds.cpu(), expected)


def test_an_engine_loaded_on_a_side_stream(load, cuda, expected):
    side = torch.cuda.Stream(cuda)
    delay(side)
    with torch.cuda.stream(side):
        engine = load()
    assert np.array_equal(engine.encode(SMALL), expected(SMALL))


@pytest.mark.skipif(HAS_CUDA, reason="would break the CUDA context of all tests")
def test_a_broken_context_is_not_ready(load, cuda, monkeypatch):
    runner = load()._pipeline.backend
    assert runner.ready_devices == 1
    torch._assert_async(torch.zeros(1, device=cuda))
    exits = []
    monkeypatch.setattr(os, "_exit", exits.append)
    worker_process._attempt(lambda: runner.launch(SMALL, VECTORS)(), torch.device(cuda))
    assert exits == [1] and runner.ready_devices == 0
    with pytest.raises(torch.AcceleratorError):
        runner.launch(SMALL, VECTORS)


def breakable_pipeline(folder, device):
    """Load a model in the process of a device."""
    pipeline = unpadded.load(folder, device=device, **OPTIONS)._pipeline
    launch = pipeline.backend.launch

    def launch_and_break(sequences, options):
        if any(len(ids) == BREAKING for ids in sequences):
            torch._assert_async(torch.zeros(1, device=device))
        return launch(sequences, options)

    pipeline.backend.launch = launch_and_break
    return pipeline


@pytest.mark.gpu
def test_a_worker_whose_context_breaks_is_replaced(folder):
    pool = WorkerPool(partial(breakable_pipeline, folder), [torch.device("cuda", 0)] * 2)
    try:
        before, pids = pool.launch(SMALL, VECTORS)(), [worker.process.pid for worker in pool._pool.workers]
        with pytest.raises(unpadded.WorkerError):
            pool.launch(random_ids((BREAKING,)), VECTORS)()
        until = time.monotonic() + 600
        while pool.ready_devices < 2 and time.monotonic() < until:
            time.sleep(0.1)
        assert pool.ready_devices == 2 and [worker.process.pid for worker in pool._pool.workers] != pids
        for _ in range(8):
            assert np.array_equal(pool.launch(SMALL, VECTORS)(), before)
    finally:
        pool.close()
