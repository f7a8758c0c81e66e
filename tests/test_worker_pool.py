"""Several devices, one process each: the bits and the order of one device, whichever process is killed."""

import asyncio
import io
import logging
import os
import pickle
import pydoc_data.topics
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import write_nomic
from support.serving import HANG_SECONDS, wait_until

import unpadded
from unpadded.cli.main import main
from unpadded.execution import worker_process
from unpadded.execution.worker_pool import WorkerPool, _Job, _Pool
from unpadded.execution.worker_process import _run_jobs
from unpadded.options import VectorOptions
from unpadded.tokenization.windows import TextGroup

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
def loaded(minilm):
    with unpadded.load(minilm, device=["cpu", "cpu"], token_budget=BUDGET) as engine:
        yield engine


@pytest.fixture
def engine(loaded):
    """The engine of all tests, with two processes that run, whatever an earlier test did to them."""
    recover(loaded._pipeline.backend)
    return loaded


@pytest.fixture(scope="module")
def nomics(tmp_path_factory):
    """The same model in this process and in two."""
    folder = write_nomic(tmp_path_factory.mktemp("nomic"))
    options = {"max_length": 64, "token_budget": 64}
    with unpadded.load(folder, device="cpu,cpu", **options) as two:
        yield unpadded.load(folder, device="cpu", **options), two


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr("unpadded.execution.pipeline.MIN_GROUP_TOKENS", 0)


def random_texts(count):
    """Return strings of 0 to 100 words and token ids, some of them equal."""
    draw, texts = random.Random(0), []
    for _ in range(count):
        words = " ".join(draw.choices(["tide", "bread", "coroutine", "of", "7"], k=draw.randrange(100)))
        ids = [draw.randrange(1000, 3000) for _ in range(draw.randrange(1, 64))]
        texts.append(draw.choice([words, words, np.str_(words), ids, np.array(ids), *texts[-1:]]))
    return texts


class Echo:
    """A runner whose vectors are the first id and the length of each sequence. Some first ids cause errors; for WAIT
    the vector has the process id instead of the length.

    gate: a file; WAIT waits until it exists.
    """

    dimensions = 2
    depth = 1
    KILL, RAISE, RAISE_UNPICKLABLE, PRINT, WAIT, HANG = -9, -1, -2, -3, -4, -5

    def __init__(self, gate=None):
        self.gate = gate

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
                case Echo.WAIT:
                    wait_until(self.gate.exists)
                case Echo.HANG:
                    time.sleep(600)
        rows = [[ids[0], os.getpid() if ids[0] == Echo.WAIT else len(ids)] for ids in sequences]
        return lambda: np.array(rows, np.float32)


def echo_pipeline(device, gate=None):
    return SimpleNamespace(backend=Echo(gate), embed_group=echo_group)


def pipeline_without(file, device):
    assert not file.exists()
    return echo_pipeline(device)


def echo_group(group, plan, token_budget):
    if "kill" in group.texts:
        os.kill(os.getpid(), signal.SIGKILL)
    return lambda: group.texts


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    return tmp_path_factory.mktemp("gate") / "open"


@pytest.fixture(scope="module")
def echo_pool(gate):
    workers = WorkerPool(partial(echo_pipeline, gate=gate), [CPU, CPU])
    yield workers
    workers.close()


@pytest.fixture
def echoes(echo_pool, gate):
    recover(echo_pool)
    gate.unlink(missing_ok=True)
    return echo_pool


def recover(workers):
    """Wait until all processes run, and forget their crashes, of which three in a row end the restarts."""
    wait_until(lambda: workers.ready_devices == workers.devices)
    for worker in workers._pool.workers:
        worker.crashes = 0


def ids(first, length=3):
    return np.full(length, first, np.int32)


def pids(engine):
    return process_ids(engine._pipeline.backend)


def process_ids(workers):
    return [worker.process.pid for worker in workers._pool.workers]


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return state(pid) == "Z"


def stop(pid):
    """Stop a process; on a busy machine its threads run on until one of them gets the signal."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state(pid) == "T")


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


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize(
    "options",
    [
        {"prompt": ""},
        {"prompt": "search_query: ", "truncation": "left", "precision": "ubinary"},
        {"task": "clustering", "dimensions": 64},
    ],
)
def test_random_inputs_give_the_bits_of_one_device(nomics, options):
    one, two = nomics
    texts, advanced = random_texts(150), []
    check(two.embed(texts, **options), one.embed(texts, **options))
    blocks = list(two.stream(iter(texts), show_progress=lambda *counts: advanced.append(counts), **options))
    assert len(blocks) > 9 and advanced == [(len(block), block.token_counts.sum()) for block in blocks]


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("text", [None, "\ud800", "many " * 99, [10**6], threading.Lock()])
def test_errors_name_the_same_text_as_on_one_device(nomics, text):
    texts = [*(paragraph[:40] for paragraph in PARAGRAPHS[:60]), text, "end"]
    raised = []
    for engine in nomics:
        with pytest.raises(unpadded.InputError, match="text 60 ") as found:
            engine.encode(texts, prompt="", truncation="error")
        raised.append((str(found.value), getattr(found.value, "__notes__", [])))
    assert raised[0] == raised[1]


def test_token_embeddings(engine, minilm):
    alone = unpadded.load(minilm, device="cpu").token_embeddings(PARAGRAPHS[:9])
    for rows, one in zip(engine.token_embeddings(PARAGRAPHS[:9]), alone, strict=True):
        assert np.array_equal(rows, one)


def test_both_processes_run_batches(echoes, gate):
    pending = [echoes.launch([ids(Echo.WAIT)], OPTIONS) for _ in range(4)]
    gate.touch()
    processes = [vectors()[0][1] for vectors in pending]
    assert sorted(processes) == sorted(2 * process_ids(echoes))


def test_processes_on_the_cpu_share_its_memory(echoes):
    assert echoes.max_batch_tokens() == 50


def test_threads_of_torch_in_a_process():
    """On CUDA one, which leaves the cores to the tokenizer."""
    assert _Pool(echo_pipeline, [CPU, CPU])._threads == max(1, torch.get_num_threads() // 2)
    assert _Pool(echo_pipeline, [torch.device("cuda", 0), torch.device("cuda", 1)])._threads == 1


@pytest.mark.parametrize("killed", [1, 2])
def test_embed_survives_killed_processes(engine, expected, killed, caplog, monkeypatch):
    monkeypatch.setattr("unpadded.tokenization.windows.WindowReader.max_texts", 40)
    victims = pids(engine)[:killed]
    check(engine.embed(killing(PARAGRAPHS, 100, victims)), expected)
    for pid in victims:  # the crash of a process whose jobs were done may be noticed later
        wait_until(lambda pid=pid: f"cpu (process {pid}, exit code -9)" in caplog.text)
    wait_until(lambda: engine._pipeline.backend.ready_devices == 2)
    assert set(pids(engine)).isdisjoint(victims)


def test_concurrent_callers_survive_a_killed_process(engine, expected, caplog):
    worker = engine._pipeline.backend._pool.workers[0]

    async def callers():
        calls = [asyncio.create_task(engine.aembed(PARAGRAPHS[start::10])) for start in range(10)]
        while not worker.jobs:
            await asyncio.sleep(0.001)
        os.kill(worker.process.pid, signal.SIGKILL)
        return await asyncio.gather(*calls)

    for start, found in enumerate(asyncio.run(callers())):
        assert np.array_equal(found.vectors, expected.vectors[start::10])
    wait_until(lambda: "exit code -9" in caplog.text)
    wait_until(lambda: engine._pipeline.backend.ready_devices == 2)


def test_an_abandoned_stream_stops_its_threads(engine, expected, monkeypatch):
    monkeypatch.setattr("unpadded.tokenization.windows.WindowReader.max_texts", 40)
    before = set(threading.enumerate())
    blocks = engine.stream(PARAGRAPHS)
    next(blocks)
    blocks.close()
    assert set(threading.enumerate()) <= before
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
            echoes.launch([ids(5), ids(Echo.RAISE)], OPTIONS)()
        assert "in the worker on cpu" in raised.value.__notes__[0]
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        echoes.launch([ids(Echo.RAISE_UNPICKLABLE)], OPTIONS)()
    assert echoes.launch([ids(5)], OPTIONS)().tolist() == [[5, 3]]


@pytest.mark.parametrize("broken", [False, True])
def test_a_worker_exits_if_its_cuda_context_is_broken(monkeypatch, caplog, broken):
    """It would fail every later batch, and get more of them than the other workers."""

    def fail(*_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def exit(code):
        raise SystemExit(code)

    stream = SimpleNamespace(query=fail if broken else lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(os, "_exit", exit)
    cuda = torch.device("cuda", 1)
    if broken:
        with pytest.raises(SystemExit, match="1"):
            worker_process._attempt(fail, cuda)
        assert "cuda:1 cannot be used any longer by this process: CUDA error: an illegal memory" in caplog.text
    else:
        assert worker_process._attempt(fail, cuda)[0] == "failed"
    assert worker_process._attempt(fail, CPU)[0] == "failed"


def test_log_messages_of_a_worker_are_forwarded(echoes, caplog):
    for vectors in [echoes.launch([ids(Echo.PRINT)], OPTIONS) for _ in range(4)]:
        assert vectors().tolist() == [[Echo.PRINT, 3]]
    assert caplog.messages == ["logged by a worker"]  # once, although both processes log it


def test_every_batch_gets_its_own_vectors(echoes):
    pending = [echoes.launch([ids(i, 1 + i % 5)] * (1 + i % 3), OPTIONS) for i in range(1, 200)]
    for i, vectors in reversed(list(enumerate(pending, 1))):
        assert vectors().tolist() == [[i, 1 + i % 5]] * (1 + i % 3)


def test_a_batch_that_crashes_two_workers_raises(echoes, gate, caplog):
    others = [echoes.launch([ids(Echo.WAIT)], OPTIONS), echoes.launch([ids(2)], OPTIONS)]
    crashing = echoes.launch([ids(7), ids(Echo.KILL, 4)], OPTIONS)
    others += [echoes.launch([ids(i)], OPTIONS) for i in range(3, 9)]
    gate.touch()
    named = r"a batch of 2 texts and 7 tokens crashed 2 workers in a row: (cpu \(process \d+, exit code -9\)(, )?){2};"
    with pytest.raises(unpadded.WorkerError, match=named):
        crashing()
    assert [other()[0][0] for other in others] == [Echo.WAIT, 2, 3, 4, 5, 6, 7, 8]
    assert len([line for line in caplog.messages if "a worker crashed" in line]) == 2


def test_texts_that_crash_two_workers_are_named(echoes):
    groups = [TextGroup(10 * i, ["a", "kill" if i == 3 else str(i)], 9, False) for i in range(6)]
    pending = [echoes.embed(group, None, 0) for group in groups]
    with pytest.raises(unpadded.WorkerError, match=r"a batch of 2 texts \(30 to 31\) crashed 2 workers in a row"):
        pending.pop(3)()
    assert [texts()[1] for texts in pending] == ["0", "1", "2", "4", "5"]


def test_a_worker_tokenizes_while_the_device_computes():
    second, sent, jobs = threading.Event(), SimpleQueue(), SimpleQueue()

    def embed_group(group):
        if group.first_index == 1:
            second.set()
        return lambda: second.wait(HANG_SECONDS)

    for number in range(2):
        jobs.put((number, (TextGroup(number, ["a"], 1, False), {})))
    pipeline = SimpleNamespace(backend=SimpleNamespace(depth=1), embed_group=embed_group)
    send = lambda *message: sent.put(message)  # noqa: E731
    threading.Thread(target=_run_jobs, args=(pipeline, CPU, jobs, send), daemon=True).start()
    assert [sent.get(timeout=HANG_SECONDS) for _ in range(2)] == [("done", (0, True)), ("done", (1, True))]


def test_a_hang_is_noticed_while_other_jobs_finish():
    pool = _Pool(echo_pipeline, [CPU])
    (worker,) = pool.workers
    worker.jobs, worker.running = {number: _Job("a job", 1, ()) for number in (4, 5, 6)}, 7
    pool._finish_job(worker, "done", 5, None)
    assert worker.running == 7
    pool._finish_job(worker, "done", 4, None)
    assert worker.running == 0 and list(worker.jobs) == [6]


def test_the_reason_for_a_kill_stays_until_the_exit_is_handled(monkeypatch):
    pool, reasons, ticks = _Pool(echo_pipeline, [CPU]), [], iter(range(15))
    (worker,) = pool.workers
    worker.ready, worker.process = True, SimpleNamespace(kill=lambda: reasons.append(worker.hang))

    def sleep(seconds):
        pool._closed = next(ticks, None) is None

    monkeypatch.setattr("unpadded.execution.worker_pool.time", SimpleNamespace(sleep=sleep))
    pool._watch()
    assert set(reasons) == {"killed after 11 s without an answer"}


def test_a_warning_of_two_processes_at_the_same_time_is_logged_once(monkeypatch):
    pool, logged = _Pool(echo_pipeline, [CPU]), []

    def read():
        message = pickle.dumps(("log", (logging.WARNING, "a warning", "a warning")))
        pool._read(pool.workers[0], SimpleNamespace(stdout=io.BytesIO(message), kill=lambda: None))

    def log(*message):
        logged.append(message)
        if len(logged) == 1:
            read()  # the message of the other process, while that of the first is logged

    monkeypatch.setattr("unpadded.execution.worker_pool.logger", SimpleNamespace(log=log))
    read()
    assert len(logged) == 1


def test_processes_share_the_cores(echoes):
    cores = max(1, os.cpu_count() // 2)
    for pid in process_ids(echoes):
        assert f"RAYON_NUM_THREADS={cores}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert _Pool(echo_pipeline, [CPU, CPU])._threads == max(1, torch.get_num_threads() // 2)
    assert _Pool(echo_pipeline, [torch.device("cuda", 0)])._threads == 1  # its batches run on the GPU


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_raises_and_its_parent_goes_on(engine, expected):
    child = os.fork()
    if child == 0:
        try:
            engine.encode(["a"])
        except unpadded.WorkerError as error:
            engine.close()
            os._exit(3 if "load models after the fork" in str(error) else 4)
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    check(engine.embed(PARAGRAPHS[:50]), type(expected)(*(part[:50] for part in vars(expected).values())))


def test_processes_that_hang_are_replaced(echoes, monkeypatch, caplog):
    """One is stopped, with more to read than a pipe holds; the other runs a batch that does not finish."""
    monkeypatch.setattr("unpadded.execution.worker_pool.SILENT_SECONDS", 4)  # a message per second, on a busy machine
    stopped = process_ids(echoes)[0]
    stop(stopped)
    large = [echoes.launch([ids(3, 100_000)], OPTIONS) for _ in range(6)]
    assert all(vectors().tolist() == [[3, 100_000]] for vectors in large)
    assert f"a worker crashed: cpu (process {stopped}, killed after 5 s without an answer)" in caplog.text
    monkeypatch.setattr("unpadded.execution.worker_pool.JOB_SECONDS", {"cpu": 1})
    monkeypatch.setattr("unpadded.execution.worker_pool.MAX_CRASHES_PER_JOB", 1)
    hanging = echoes.launch([ids(Echo.HANG)], OPTIONS)
    (pid,) = (worker.process.pid for worker in echoes._pool.workers if worker.jobs)
    with pytest.raises(unpadded.WorkerError, match=rf"\(process {pid}, killed after 2 s in a batch of 1 texts"):
        hanging()
    assert echoes.launch([ids(5)], OPTIONS)().tolist() == [[5, 3]]


def test_a_worker_that_cannot_restart_raises(tmp_path, caplog):
    workers = WorkerPool(partial(pipeline_without, tmp_path / "flag"), [CPU])
    (tmp_path / "flag").touch()
    os.kill(process_ids(workers)[0], signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(unpadded.WorkerError, match=r"no worker is left for a batch of 1 texts .* crashed 3 times"):
            workers.launch([ids(1)], OPTIONS)()
    assert "could not be loaded again on cpu" in caplog.text and "not restarted" in caplog.text
    workers.close()


def test_errors_while_loading_are_raised(tmp_path):
    folder = write_nomic(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["emb_ln.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    before = set(threading.enumerate())
    with pytest.raises(unpadded.WeightsError, match="not finite"):
        unpadded.load(folder, device="cpu,cpu")
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_close_drops_pending_batches(minilm, caplog, monkeypatch):
    """Also if one of the processes is stopped, which is killed."""
    workers = WorkerPool(echo_pipeline, [CPU, CPU])
    stop(process_ids(workers)[0])
    monkeypatch.setattr("unpadded.execution.worker_pool.EXIT_SECONDS", 3)
    for i in range(1, 100):
        workers.launch([ids(i)], OPTIONS)  # some finish while the pool closes, which logs nothing
    dropped = [workers.launch([ids(Echo.HANG)], OPTIONS), workers.launch([ids(2)], OPTIONS)]
    processes = [worker.process for worker in workers._pool.workers]
    workers.close()
    workers.close()
    assert [process.wait(HANG_SECONDS) for process in processes] == [-signal.SIGKILL, 0] and not caplog.messages
    for vectors in dropped:
        with pytest.raises(unpadded.WorkerError, match="the engine was closed: a batch of 1 texts"):
            vectors()
    with pytest.raises(unpadded.WorkerError, match="the engine is closed: a batch of 1 texts"):
        workers.launch([ids(1)], OPTIONS)()
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
print(*(worker.process.pid for worker in engine._pipeline.backend._pool.workers))
"""
    if end == "killed":
        code += "os.kill(os.getpid(), signal.SIGKILL)"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'engine'}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-u", "-W", "error", "-c", code]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)
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
        ("mps", "not supported: 'mps'; use auto"),
        ("xpu:1", "not supported: 'xpu:1'"),
        (torch.device("meta"), r"not supported: device\(type='meta'\)"),
        ("cpu,tpu-9", "unknown: 'tpu-9'"),
        ([], "no device"),
    ]:
        with pytest.raises(unpadded.OptionError, match=message):
            unpadded.load(minilm, device=device)
