"""`unpadded serve --device cpu,cpu`: one worker process per device behind one port, also while they are killed."""

import contextlib
import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.corpus import PARAGRAPHS
from support.serving import HANG_SECONDS, serving, wait_until

import unpadded

TICKS = os.sysconf("SC_CLK_TCK")
PAUSE = 0.5  # seconds between a client's requests while a worker restarts, to leave it the cores


@pytest.fixture(scope="module")
def server(minilm):
    """A server that the last test stops."""
    flags = ["--device", "cpu,cpu", "--grace", str(HANG_SECONDS), "--deadline", "0"]
    with serving(minilm, *flags) as server:
        yield server


@pytest.fixture(scope="module")
def expected(minilm):
    return unpadded.load(minilm, device="cpu").encode(PARAGRAPHS[:200])


def worker_pids(server):
    found = []
    for task in Path(f"/proc/{server.process.pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has exited since it was listed
            found += map(int, (task / "children").read_text().split())
    return found


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def start_clients(server, expected, stop, killed):
    """Send requests from six threads until `stop` is set, fewer once `killed` is set, and check every response.

    Returns one future per thread, of its number of responses.
    """

    def client(number):
        responses = 0
        while not stop.is_set():
            start, size = (37 * number + 11 * responses) % 190, (1, 2, 10)[responses % 3]
            status, _, body = server.request("POST", "/embed", {"inputs": PARAGRAPHS[start : start + size]})
            assert status == 200, body
            assert np.array_equal(np.array(json.loads(body), np.float32), expected[start : start + size])
            responses += 1
            stop.wait(PAUSE if killed.is_set() else 0)
        return responses

    pool = ThreadPoolExecutor(6)
    return [pool.submit(client, number) for number in range(6)]


def test_one_request_runs_on_both_devices(server, expected):
    info = json.loads(server.request("GET", "/info")[2])
    assert info["device"] == "cpu,cpu"
    wait_until(lambda: server.metric("unpadded_devices") == 2)
    before = {pid: cpu_seconds(pid) for pid in worker_pids(server)}
    assert len(before) == 2
    status, headers, body = server.request("POST", "/embed", {"inputs": PARAGRAPHS[:200]})
    assert status == 200 and np.array_equal(np.array(json.loads(body), np.float32), expected)
    assert headers["x-compute-type"] == "cpu"
    used = [cpu_seconds(pid) - seconds for pid, seconds in before.items()]
    assert min(used) > 0.2 * max(used) > 0, used


def test_no_request_is_lost_when_one_worker_is_killed(server, expected):
    stop, killed = threading.Event(), threading.Event()
    clients = start_clients(server, expected, stop, killed)
    wait_until(lambda: server.metric("unpadded_active_requests") > 1)  # that of /metrics is one
    os.kill(worker_pids(server)[0], signal.SIGKILL)
    killed.set()
    wait_until(lambda: server.metric("unpadded_devices") == 1)
    assert server.request("GET", "/health")[0] == 200
    wait_until(lambda: server.metric("unpadded_devices") == 2)
    stop.set()
    assert min(future.result() for future in clients) > 0
    assert server.request("GET", "/health")[0] == 200
    wait_until(lambda: any(line["level"] == "warning" and "worker" in line["message"] for line in server.log))


@pytest.mark.slow
def test_requests_wait_while_all_workers_restart(server, expected):
    stop, killed = threading.Event(), threading.Event()
    clients = start_clients(server, expected, stop, killed)
    wait_until(lambda: server.metric("unpadded_active_requests") > 1)  # that of /metrics is one
    for pid in worker_pids(server):
        os.kill(pid, signal.SIGKILL)
    killed.set()
    wait_until(lambda: server.request("GET", "/health")[0] == 503)
    wait_until(lambda: server.metric("unpadded_devices") == 2)
    stop.set()
    assert min(future.result() for future in clients) > 0
    assert server.request("GET", "/health")[0] == 200


def test_sigterm_stops_the_workers(server, expected):
    with ThreadPoolExecutor(6) as pool:
        pids = worker_pids(server)
        answers = [pool.submit(server.request, "POST", "/embed", {"inputs": PARAGRAPHS[:60]}) for _ in range(6)]
        wait_until(lambda: server.metric("unpadded_active_requests") == len(answers) + 1)  # that of /metrics
        assert server.stop() == 0
        for answer in answers:
            status, _, body = answer.result()
            assert status == 200 and np.array_equal(np.array(json.loads(body), np.float32), expected[:60])
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
