"""Limits, overload, broken requests, clients that leave, and the end of the process."""

import contextlib
import gzip
import http.client
import http.server
import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.corpus import PARAGRAPHS
from support.serving import ENVIRONMENT, serving

import unpadded


@pytest.fixture(scope="module")
def engine(minilm):
    return unpadded.load(minilm, device="cpu")


@pytest.fixture(scope="module")
def narrow(minilm):
    flags = (
        "--max-body 400000 --max-inputs 64 --long-input refuse --read-timeout 1 "
        "--max-concurrent-requests 4 --max-queued-tokens 4000"
    )
    with serving(minilm, *flags.split()) as server:
        yield server


def test_limits_of_a_request(narrow):
    for path, value, status, said in [
        ("/embed", {"inputs": ["a"] * 65}, 413, "65, at most 64"),
        ("/embed", {"inputs": "a" * 400_001}, 413, "more than 400000 bytes"),
        ("/embed", {"inputs": "a " * 300}, 413, "text 0 is too long: more than 256 tokens"),
        ("/v1/embeddings", {"input": "a " * 300}, 400, "context_length_exceeded"),
        ("/embed", {"inputs": "a", "prompt_name": "query2"}, 422, "task is unknown"),
        ("/embed", b"{", 400, "not JSON"),
        ("/embed", b'{"inputs": "\xff"}', 400, "not JSON"),
        ("/embed", b"[" * 100_000, 422, "does not fit"),
        ("/embed", b'{"inputs": "\\ud800"}', 400, "not JSON"),
        ("/nowhere", {}, 404, "nothing answers POST /nowhere"),
        ("/health", {}, 405, "nothing answers POST /health"),
    ]:
        found, _, body = narrow.ask("POST", path, value)
        assert found == status and said in body.decode(), (path, found, body)


def test_a_body_that_drips_in(narrow):
    with contextlib.closing(narrow.connection()) as connection:
        connection.putrequest("POST", "/embed")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b'{"inputs": ')
        response = connection.getresponse()
        assert response.status == 408 and b"11 bytes in 1 s" in response.read()


def test_a_head_that_drips_in(narrow):
    with socket.create_connection(("127.0.0.1", narrow.port), timeout=10) as slow:
        slow.sendall(b"POST /embed HTTP/1.1\r\nHost:")
        assert slow.recv(1) == b""  # closed
    with contextlib.closing(narrow.connection()) as kept:
        kept.request("GET", "/health")
        assert kept.getresponse().read() == b""
        kept.sock.sendall(b"GET /health HTTP/1.1\r\nHos")
        assert kept.sock.recv(1) == b""


def test_overload_and_recovery(narrow, engine):
    texts = [" ".join(PARAGRAPHS[i : i + 2])[:300] for i in range(0, 80, 2)]
    expected = engine.encode(texts)
    outcomes = []

    def flood(_):
        for _ in range(2):
            status, headers, body = narrow.ask("POST", "/embed", {"inputs": texts})
            outcomes.append(status)
            if status == 200:
                assert np.array_equal(np.array(json.loads(body), np.float32), expected)
            elif status == 429:
                assert int(headers["retry-after"]) >= 1 and json.loads(body)["error_type"] == "Overloaded"

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(flood, range(12)))
    assert set(outcomes) == {200, 429}
    start = time.perf_counter()
    assert narrow.ask("POST", "/embed", {"inputs": "after"})[0] == 200
    assert time.perf_counter() - start < 2
    assert narrow.metric("unpadded_queued_tokens") == 0


def test_a_client_that_leaves_takes_its_work_along(minilm):
    with serving(minilm) as server:
        body = json.dumps({"inputs": PARAGRAPHS[:1500]}).encode()
        head = f"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.port)) as leaving:
            leaving.sendall(head + body)
            deadline = time.perf_counter() + 20
            while not server.metric("unpadded_queued_tokens") and time.perf_counter() < deadline:
                time.sleep(0.02)
            assert server.metric("unpadded_queued_tokens") > 10_000
        deadline = time.perf_counter() + 5
        while server.metric("unpadded_queued_tokens") and time.perf_counter() < deadline:
            time.sleep(0.02)
        assert server.metric("unpadded_queued_tokens") == 0 and server.metric("unpadded_disconnects_total") == 1


def test_a_deadline_drops_the_work(minilm):
    with serving(minilm, "--deadline", "0.05") as server:
        start = time.perf_counter()
        status, _, body = server.ask("POST", "/v1/embeddings", {"input": PARAGRAPHS[:1500]})
        assert status == 504 and json.loads(body)["error"]["message"].startswith("the deadline passed: 0.05 s")
        assert time.perf_counter() - start < 5
        while server.metric("unpadded_queued_tokens"):
            assert time.perf_counter() - start < 5
            time.sleep(0.02)


def drain(server):
    server.process.send_signal(signal.SIGTERM)
    while not any(line["message"] == "draining" for line in server.lines):
        time.sleep(0.01)


def test_sigterm_answers_what_is_under_way(minilm, engine):
    with serving(minilm) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.ask, "POST", "/embed", {"inputs": PARAGRAPHS[:150]})
        while not server.metric("unpadded_queued_tokens"):
            time.sleep(0.01)
        drain(server)
        assert server.ask("GET", "/health")[0] == 503
        status, headers, _ = server.ask("POST", "/embed", {"inputs": "late"})
        assert status == 503 and headers["retry-after"] == "1"
        status, _, body = asked.result()
        assert status == 200 and np.array_equal(np.array(json.loads(body), np.float32), engine.encode(PARAGRAPHS[:150]))
        assert server.wait() == 0


def test_a_second_sigterm_ends_at_once(minilm):
    with serving(minilm) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.ask, "POST", "/embed", {"inputs": PARAGRAPHS[:2000]})
        while not server.metric("unpadded_queued_tokens"):
            time.sleep(0.01)
        drain(server)
        start = time.perf_counter()
        assert server.stop() == 130
        assert time.perf_counter() - start < 2
        assert isinstance(asked.exception(), http.client.HTTPException | ConnectionError)


def test_spans_reach_a_collector(minilm):
    bodies = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector, ThreadPoolExecutor(1) as pool:
        pool.submit(collector.serve_forever)
        with serving(minilm, "--otlp-endpoint", f"http://127.0.0.1:{collector.server_port}") as server:
            parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            server.post("/embed", {"inputs": "a word"}, traceparent=parent)
            assert server.stop() == 0
        collector.shutdown()
    assert {path for path, _ in bodies} == {"/v1/traces"}
    sent = b"".join(gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body for _, body in bodies)
    assert b"POST /embed" in sent and bytes.fromhex(parent[3:35]) in sent and b"queue_seconds" in sent


def test_flags_that_do_not_fit(minilm, narrow):
    cases = {
        f"--port {narrow.port}": f"cannot listen on 127.0.0.1 port {narrow.port}",
        "--default-task poetry": "task is unknown: 'poetry'",
        "--tls-cert none.pem": "a certificate needs its key: --tls-cert none.pem",
        "--tls-cert none.pem --tls-key none.pem --port 0": "the certificate cannot be read: none.pem",
        "--api-key-file none.txt": "the key file cannot be read: none.txt",
    }
    command = [sys.executable, "-m", "unpadded", "serve", str(minilm)]
    for flags, said in cases.items():
        ran = subprocess.run([*command, *flags.split()], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
        assert ran.returncode == 2 and said in ran.stderr, ran.stderr
