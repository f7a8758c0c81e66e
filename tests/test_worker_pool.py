"""Several devices, one process each: the bits and the order of one device, whichever process is killed."""

import asyncio
import logging
import os
import pydoc_data.topics
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import write_nomic

import unpadded
from unpadded.cli.main import main
from unpadded.execution.backend import PendingVectors
from unpadded.execution.worker_pool import WorkerPool
from unpadded.options import VectorOptions

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
PARAGRAPHS = [
    " ".join(block.split())
    for topic in sorted(pydoc_data.topics.topics)
    for block in pydoc_data.topics.topics[topic].split("\n\n")
    if len(block) >= 40
][:160]
BUDGET = 512
OPTIONS = VectorOptions(layer_norm=False, dimensions=2, normalize=False)


@pytest.fixture(scope="module")
def expected(minilm):
    return unpadded.load(minilm, device="cpu", token_budget=BUDGET).embed(PARAGRAPHS)


@pytest.fixture(scope="module")
def engine(minilm):
    with unpadded.load(minilm, device=["cpu", "cpu"], token_budget=BUDGET) as engine:
        yield engine


class Echo:
    """A runner whose vectors are the first id and the length of each sequence. Some first ids cause errors; for SLEEP
    the vector has the process id instead of the length.
    """

    dimensions = 2
    depth = 1
    KILL, RAISE, RAISE_UNPICKLABLE, PRINT, SLEEP, HANG = -9, -1, -2, -3, -4, -5

    def __init__(self, device):
        if flag := os.environ.get("UNPADDED_TEST_FLAG"):
            assert not Path(flag).exists()

    def describe(self):
        return {"device": "cpu", "dtype": "float32", "attention": "none"}

    def max_batch_tokens(self):
        return 101

    def launch(self, sequences, options):
        for ids in sequences:
            match ids[0]:
                case Echo.KILL:
                    os.kill(os.getpid(), signal.SIGKILL)
                case Echo.RAISE:
                    raise ZeroDivisionError("a negative id")
                case Echo.RAISE_UNPICKLABLE:
                    error = ValueError("cannot be pickled")
                    error.lock = threading.Lock()
                    raise error
                case Echo.PRINT:
                    print("on stdout")
                    logging.getLogger("unpadded").warning("logged by %s", "a worker")
                case Echo.SLEEP:
                    time.sleep(0.2)
                case Echo.HANG:
                    time.sleep(600)
        rows = [[ids[0], os.getpid() if ids[0] == Echo.SLEEP else len(ids)] for ids in sequences]
        return PendingVectors(lambda: np.array(rows, np.float32))


@pytest.fixture(scope="module")
def echoes():
    workers = WorkerPool(Echo, [CPU, CPU])
    yield workers
    workers.close()


def ids(first, length=3):
    return np.full(length, first, np.int32)


def pids(engine):
    return engine._pipeline.backend.process_ids


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def wait_until(condition):
    for _ in range(2400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("the condition was not met in two minutes")


def check(found, expected):
    assert np.array_equal(found.vectors, expected.vectors)
    assert np.array_equal(found.token_counts, expected.token_counts)
    assert np.array_equal(found.truncated, expected.truncated)


def killing(texts, at, numbers):
    """Yield the texts; kill the processes before the text at index `at`."""
    for index, text in enumerate(texts):
        if index == at:
            for number in numbers:
                os.kill(number, signal.SIGKILL)
        yield text


def test_vectors_equal_those_of_one_device(engine, expected, monkeypatch):
    check(engine.embed(PARAGRAPHS), expected)
    monkeypatch.setattr("unpadded.tokenization.windows.WindowReader.max_texts", 40)
    blocks = list(engine.stream(PARAGRAPHS))
    assert [len(block.vectors) for block in blocks] == [40] * 4
    assert np.array_equal(np.concatenate([block.vectors for block in blocks]), expected.vectors)
    check(asyncio.run(engine.aembed(PARAGRAPHS)), expected)


def test_token_embeddings(engine, minilm):
    alone = unpadded.load(minilm, device="cpu").token_embeddings(PARAGRAPHS[:9])
    for rows, one in zip(engine.token_embeddings(PARAGRAPHS[:9]), alone, strict=True):
        assert np.array_equal(rows, one)


def test_both_processes_run_batches(echoes):
    pending = [echoes.launch([ids(Echo.SLEEP)], OPTIONS) for _ in range(4)]
    processes = [vectors.wait()[0][1] for vectors in pending]
    assert sorted(processes) == sorted(2 * echoes.process_ids)


def test_processes_on_the_cpu_share_its_memory(echoes):
    assert echoes.max_batch_tokens() == 50


@pytest.mark.parametrize("killed", [1, 2])
def test_embed_survives_killed_processes(engine, expected, killed, caplog, monkeypatch):
    monkeypatch.setattr("unpadded.tokenization.windows.WindowReader.max_texts", 40)
    victims = pids(engine)[:killed]
    check(engine.embed(killing(PARAGRAPHS, 100, victims)), expected)
    for pid in victims:
        assert f"cpu (process {pid}, exit code -9)" in caplog.text
    wait_until(lambda: engine._pipeline.backend.ready_devices == 2)
    assert set(pids(engine)).isdisjoint(victims)


def test_concurrent_callers_survive_a_killed_process(engine, expected, caplog):
    async def callers():
        calls = [asyncio.create_task(engine.aembed(PARAGRAPHS[start::10])) for start in range(10)]
        await asyncio.sleep(0.1)
        os.kill(pids(engine)[0], signal.SIGKILL)
        return await asyncio.gather(*calls)

    for start, found in enumerate(asyncio.run(callers())):
        assert np.array_equal(found.vectors, expected.vectors[start::10])
    assert "exit code -9" in caplog.text
    wait_until(lambda: engine._pipeline.backend.ready_devices == 2)


def test_an_abandoned_stream_stops_its_threads(engine, expected, monkeypatch):
    monkeypatch.setattr("unpadded.tokenization.windows.WindowReader.max_texts", 40)
    before = threading.active_count()
    blocks = engine.stream(PARAGRAPHS)
    next(blocks)
    blocks.close()
    assert threading.active_count() == before
    check(engine.embed(PARAGRAPHS[:50]), type(expected)(*(part[:50] for part in vars(expected).values())))


def test_stream_yields_the_blocks_before_a_bad_text(engine, monkeypatch):
    monkeypatch.setattr("unpadded.tokenization.windows.WindowReader.max_texts", 2)
    blocks = engine.stream(["a", "b", "c", "d", "e", None])
    assert [len(next(blocks).vectors) for _ in range(2)] == [2, 2]
    with pytest.raises(unpadded.InputError, match="text 5 is neither"):
        next(blocks)
    assert np.isfinite(engine.encode(["still works"])).all()


def test_the_runner_is_not_available(engine):
    with pytest.raises(unpadded.OptionError, match="not in this process: device='cpu,cpu'"):
        _ = engine._pipeline.runner
    assert engine.describe()["device"] == "cpu,cpu"


def test_errors_in_a_worker_are_raised(echoes):
    for _ in range(3):
        with pytest.raises(ZeroDivisionError, match="a negative id") as raised:
            echoes.launch([ids(5), ids(Echo.RAISE)], OPTIONS).wait()
        assert "in the worker on cpu" in raised.value.__notes__[0]
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        echoes.launch([ids(Echo.RAISE_UNPICKLABLE)], OPTIONS).wait()
    assert echoes.launch([ids(5)], OPTIONS).wait().tolist() == [[5, 3]]


def test_log_messages_of_a_worker_are_forwarded(echoes, caplog):
    assert echoes.launch([ids(Echo.PRINT)], OPTIONS).wait().tolist() == [[Echo.PRINT, 3]]
    assert "logged by a worker" in caplog.messages


def test_every_batch_gets_its_own_vectors(echoes):
    pending = [echoes.launch([ids(i, 1 + i % 5)] * (1 + i % 3), OPTIONS) for i in range(1, 200)]
    for i, vectors in reversed(list(enumerate(pending, 1))):
        assert vectors.wait().tolist() == [[i, 1 + i % 5]] * (1 + i % 3)


def test_a_batch_that_crashes_two_workers_raises(echoes, caplog):
    others = [echoes.launch([ids(Echo.SLEEP)], OPTIONS), echoes.launch([ids(2)], OPTIONS)]
    crashing = echoes.launch([ids(7), ids(Echo.KILL, 4)], OPTIONS)
    others += [echoes.launch([ids(i)], OPTIONS) for i in range(3, 9)]
    named = r"a batch of 2 texts and 7 tokens crashed 2 workers in a row: (cpu \(process \d+, exit code -9\)(, )?){2};"
    with pytest.raises(unpadded.WorkerError, match=named):
        crashing.wait()
    assert [other.wait()[0][0] for other in others] == [Echo.SLEEP, 2, 3, 4, 5, 6, 7, 8]
    assert len([line for line in caplog.messages if "a worker crashed" in line]) == 2


def test_a_worker_that_cannot_restart_raises(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("UNPADDED_TEST_FLAG", str(tmp_path / "flag"))
    workers = WorkerPool(Echo, [CPU])
    (tmp_path / "flag").touch()
    os.kill(workers.process_ids[0], signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(unpadded.WorkerError, match=r"no worker is left for a batch of 1 texts .* crashed 3 times"):
            workers.launch([ids(1)], OPTIONS).wait()
    assert "could not be loaded again on cpu" in caplog.text and "not restarted" in caplog.text
    workers.close()


def test_errors_while_loading_are_raised(tmp_path):
    folder = write_nomic(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["emb_ln.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    before = threading.active_count()
    with pytest.raises(unpadded.WeightsError, match="not finite"):
        unpadded.load(folder, device="cpu,cpu")
    wait_until(lambda: threading.active_count() == before)


def test_close_drops_pending_batches(minilm, caplog):
    workers = WorkerPool(Echo, [CPU])
    for i in range(1, 100):
        workers.launch([ids(i)], OPTIONS)  # some finish while the pool closes, which logs nothing
    dropped = [workers.launch([ids(Echo.HANG)], OPTIONS), workers.launch([ids(2)], OPTIONS)]
    process = workers._pool.workers[0].process
    workers.close()
    workers.close()
    assert process.returncode == 0 and not caplog.messages
    for vectors in dropped:
        with pytest.raises(unpadded.WorkerError, match="the engine was closed: a batch of 1 texts"):
            vectors.wait()
    with pytest.raises(unpadded.WorkerError, match="the engine is closed: a batch of 1 texts"):
        workers.launch([ids(1)], OPTIONS).wait()
    with unpadded.load(minilm, device="cpu") as plain:
        pass
    assert plain.encode("an engine of one device can still be used").shape == (384,)


@pytest.mark.parametrize("end", ["left open", "killed"])
def test_no_process_outlives_the_parent(minilm, end):
    code = f"""
import os, signal, unpadded, unpadded.tokenization.windows
unpadded.tokenization.windows.WindowReader.max_texts = 50
engine = unpadded.load({str(minilm)!r}, device="cpu,cpu", token_budget=64)
blocks = engine.stream(f"text {{i}}" for i in range(100_000))
next(blocks)
print(*engine._pipeline.backend.process_ids)
"""
    if end == "killed":
        code += "os.kill(os.getpid(), signal.SIGKILL)"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'engine'}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-u", "-W", "error", "-c", code]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == (-signal.SIGKILL if end == "killed" else 0), ran.stderr
    assert not ran.stderr
    numbers = list(map(int, ran.stdout.split()))
    assert len(numbers) == 2
    wait_until(lambda: all(map(gone, numbers)))


def test_the_command_line_uses_several_devices(minilm, tmp_path, expected):
    (tmp_path / "texts.txt").write_text("\n".join(PARAGRAPHS))
    out = tmp_path / "vectors.npy"
    flags = ["--device", "cpu,cpu", "--token-budget", str(BUDGET)]
    assert main(["embed", str(tmp_path / "texts.txt"), "-m", str(minilm), "-o", str(out), *flags]) == 0
    assert np.array_equal(np.load(out), expected.vectors)


def test_wrong_devices_raise(minilm):
    assert unpadded.load(minilm, device=["cpu"])._pipeline.runner.device == CPU
    if not torch.cuda.is_available():
        assert unpadded.load(minilm, device="all")._pipeline.runner.device == CPU
    for device, message in [
        (["cpu", "meta"], "of different types"),
        ("cpu,tpu-9", "unknown: 'tpu-9'"),
        ([], "no device"),
    ]:
        with pytest.raises(unpadded.OptionError, match=message):
            unpadded.load(minilm, device=device)
