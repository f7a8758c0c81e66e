"""`unpadded serve --device cpu,cpu`: a process a device behind one port, and what it is like when they are killed."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.corpus import PARAGRAPHS
from support.serving import serving

import unpadded

TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def server(minilm):
    with serving(minilm, "--device", "cpu,cpu") as server:
        yield server


@pytest.fixture(scope="module")
def expected(minilm):
    return unpadded.load(minilm, device="cpu").encode(PARAGRAPHS[:200])


def workers(server):
    """The processes of the devices."""
    pid = server.process.pid
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def load(server, expected, until):
    """Ask from several connections until told to stop; how many answers came, all of them right."""

    def ask(caller):
        answers = 0
        while not until.is_set():
            start, size = (37 * caller + 11 * answers) % 190, (1, 2, 10)[answers % 3]
            status, _, body = server.ask("POST", "/embed", {"inputs": PARAGRAPHS[start : start + size]})
            if status == 503 and until.is_set():  # sent after SIGTERM, by a thread that had not yet been told
                break
            assert status == 200, body
            assert np.array_equal(np.array(json.loads(body), np.float32), expected[start : start + size])
            answers += 1
        return answers

    pool = ThreadPoolExecutor(6)
    return [pool.submit(ask, caller) for caller in range(6)]


def wait_for(condition):
    deadline = time.perf_counter() + 60
    while not condition():
        assert time.perf_counter() < deadline
        time.sleep(0.02)


def test_both_work_behind_one_port(server, expected):
    info = json.loads(server.ask("GET", "/info")[2])
    assert info["device"] == "cpu,cpu" and server.metric("unpadded_devices") == 2
    before = {pid: cpu_seconds(pid) for pid in workers(server)}
    assert len(before) == 2
    status, headers, body = server.ask("POST", "/embed", {"inputs": PARAGRAPHS[:200]})
    assert status == 200 and np.array_equal(np.array(json.loads(body), np.float32), expected)
    assert headers["x-compute-type"] == "cpu"
    worked = [cpu_seconds(pid) - seconds for pid, seconds in before.items()]
    assert min(worked) > 0.2 * max(worked) > 0, worked


def test_one_killed_under_load(server, expected):
    until = threading.Event()
    asked = load(server, expected, until)
    time.sleep(0.5)
    os.kill(workers(server)[0], signal.SIGKILL)
    wait_for(lambda: server.metric("unpadded_devices") == 1)
    assert server.ask("GET", "/health")[0] == 200
    wait_for(lambda: server.metric("unpadded_devices") == 2)
    until.set()
    assert min(future.result() for future in asked) > 0
    assert server.ask("GET", "/health")[0] == 200
    assert any("a worker died" in line["message"] for line in server.lines)


def test_all_killed_under_load(server, expected):
    """Requests wait for the processes that are started again; /health says so meanwhile."""
    until = threading.Event()
    asked = load(server, expected, until)
    time.sleep(0.5)
    for pid in workers(server):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: server.ask("GET", "/health")[0] == 503)
    wait_for(lambda: server.metric("unpadded_devices") == 2)
    until.set()
    assert min(future.result() for future in asked) > 0
    assert server.ask("GET", "/health")[0] == 200


def test_sigterm_ends_them_all(server, expected):
    processes = workers(server)
    until = threading.Event()
    asked = load(server, expected, until)
    time.sleep(0.5)
    until.set()
    assert server.stop() == 0
    for future in asked:
        future.result()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))
