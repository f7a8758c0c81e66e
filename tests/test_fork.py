"""A process that was forked after a model was loaded: it embeds, or raises an error with the remedy; it never hangs."""

import os
import subprocess
import sys

import pytest
from support.checkpoints import write_bert
from support.forks import ENVIRONMENT

import unpadded
from unpadded.execution import runner

# Two OpenMP threads per process, on any machine. Each child exits at once, with status 0 if it raised nothing.
SCRIPT = """
import asyncio, os, signal, sys, threading, time
import numpy as np, torch, unpadded

folder, texts = sys.argv[1], ["a", "b c"] * 600
ids = [np.arange(5, 25, dtype=np.int32)] * 300

def in_fork(run):
    pid = os.fork()
    if pid == 0:
        signal.alarm(600)
        run()
        os._exit(0)
    print(run.__name__, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)

engine = unpadded.load(folder, device="cpu")

def torch_after_load():  # loading starts no threads of OpenMP in the main thread
    torch.ones(1 << 20).mul_(2)
    assert len(engine.encode(texts)) == len(texts)

in_fork(torch_after_load)
expected = engine.encode(texts)
assert np.array_equal(asyncio.run(engine.aembed(texts)).vectors, expected)

def every_method():
    for embed in (engine.encode, lambda texts: asyncio.run(engine.aembed(texts)).vectors):
        assert np.array_equal(embed(texts), expected)
    assert len(engine.token_embeddings(ids)) == len(ids)
    engine.close()
    assert np.array_equal(asyncio.run(engine.aencode(texts)), expected)
    assert np.array_equal(unpadded.load(folder, device="cpu").encode(texts), expected)

in_fork(every_method)

encoder = engine._pipeline.runner.encoder
weights_of = encoder.weights_of
running = threading.Event()
encoder.weights_of = lambda adapter: (running.set(), time.sleep(0.5), weights_of(adapter))[2]
threading.Thread(target=engine.encode, args=(["a"],)).start()
running.wait()  # a batch runs at the time of the fork

def while_a_batch_runs():
    assert len(engine.encode(["a"])) == 1

in_fork(while_a_batch_runs)
"""


def test_forked_processes_embed_or_say_why_not(tmp_path):
    folder = write_bert(tmp_path, layers=1, hidden=64, heads=2, intermediate=64)
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "2"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2400)
    assert ran.stdout.splitlines() == ["torch_after_load 0", "every_method 0", "while_a_batch_runs 0"], ran.stderr


def test_cuda_after_a_fork_raises(minilm_engine, monkeypatch):
    monkeypatch.setattr(runner.torch.cuda, "_is_in_bad_fork", lambda: True)
    assert len(minilm_engine.encode(["a CPU is not affected"])) == 1
    monkeypatch.setattr(minilm_engine._pipeline.runner, "device", runner.torch.device("cuda", 1))
    with pytest.raises(unpadded.WorkerError, match=f"the CUDA devices .* process {os.getpid()}; .*'spawn'"):
        minilm_engine.encode(["a"])
    with pytest.raises(unpadded.WorkerError, match="load models after the fork"):
        unpadded.load("any", device="cuda")
