"""Limits, overload, broken requests, clients that disconnect, and shutdown."""

import contextlib
import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.corpus import PARAGRAPHS
from support.forks import run_cli
from support.serving import HANG_SECONDS, encode_chunks, serving, wait_until

import unpadded
from unpadded.server.options import ServerOptions
from unpadded.server.serve import reserve, serve

PATIENT = ["--read-timeout", str(HANG_SECONDS), "--grace", str(HANG_SECONDS)]


@pytest.fixture(scope="module")
def engine(minilm):
    return unpadded.load(minilm, device="cpu")


@pytest.fixture(scope="module")
def limited(minilm):
    flags = "--max-body 400000 --max-inputs 64 --long-input reject --max-concurrent-requests 4 --max-queued-tokens 4000"
    with serving(minilm, *flags.split()) as server:
        yield server


@pytest.fixture(scope="module")
def impatient(minilm):
    with serving(minilm, "--read-timeout", "1") as server:
        yield server


def test_invalid_requests_get_a_status_and_a_message(limited):
    for path, value, status, message in [
        ("/embed", {"inputs": ["a"] * 65}, 413, "65, maximum 64"),
        ("/v1/embeddings", {"input": ["a"] * 65}, 400, "65, maximum 64"),
        ("/v1/embedding/text", {"texts": ["a"] * 65}, 413, "65, maximum 64"),
        ("/tokenize", {"inputs": ["a"] * 65}, 413, "65, maximum 64"),
        ("/decode", {"ids": [[1]] * 65}, 413, "65, maximum 64"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["a"] * 64}}, 413, "65, maximum 64"),
        ("/embed", {"inputs": "a" * 400_001}, 413, "400000 bytes"),
        ("/embed", {"inputs": "a " * 300}, 413, "text 0 is too long: more than 256 tokens"),
        ("/v1/embeddings", {"input": "a " * 300}, 400, "context_length_exceeded"),
        ("/embed", {"inputs": "a", "prompt_name": "query2"}, 422, "'query2'"),
        ("/embed", b"{", 400, "not JSON"),
        ("/embed", b'{"inputs": "\xff"}', 400, "not JSON"),
        ("/embed", b"[" * 100_000, 400, "not JSON"),
        ("/embed", b'{"inputs": "a\\ud800"}', 400, "a lone surrogate at byte 13"),
        ("/nowhere", {}, 404, "POST /nowhere"),
        ("/health", {}, 405, "POST /health"),
    ]:
        found, _, body = limited.request("POST", path, value)
        assert found == status and message in body.decode(), (path, found, body)


def test_a_slow_body_gets_408(impatient):
    with contextlib.closing(impatient.connection()) as connection:
        connection.putrequest("POST", "/embed")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b'{"inputs": ')
        response = connection.getresponse()
        assert response.status == 408 and b"11 bytes in 1 s" in response.read()


def test_a_slow_head_closes_the_connection(impatient):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=HANG_SECONDS) as slow:
        slow.sendall(b"POST /embed HTTP/1.1\r\nHost:")
        assert slow.recv(1) == b""
    with contextlib.closing(impatient.connection()) as kept:
        kept.request("GET", "/health")
        assert kept.getresponse().read() == b""
        kept.sock.sendall(b"GET /health HTTP/1.1\r\nHos")
        assert kept.sock.recv(1) == b""


def embed(texts):
    return "/embed", {"inputs": texts}


def embeddings(texts):
    return "/v1/embeddings", {"input": texts}


def late_chunking(texts):
    return "/v1/embeddings", {"input": texts, "late_chunking": True}


def contextualized(texts):
    return "/v1/contextualizedembeddings", {"inputs": [texts[start : start + 20] for start in range(0, len(texts), 20)]}


def vectors_of(answer):
    """Return the vectors in an answer of one of these routes."""
    if isinstance(answer, list):
        return answer
    return [row["embedding"] for item in answer["data"] for row in item.get("data", [item])]


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (embed, b'"error_type":"Overloaded"'),
        (late_chunking, b'"code":"rate_limit_exceeded"'),
        (contextualized, b'"message":"the '),
    ],
)
def test_overload_gets_429_and_the_server_recovers(limited, engine, make, error):
    texts = [" ".join(PARAGRAPHS[i : i + 2])[:300] for i in range(0, 80, 2)]
    path, body = make(texts)
    expected = engine.encode(texts) if make is embed else encode_chunks(engine, body.get("inputs", [texts]))
    statuses, errors = [], []

    def flood(_):
        for _ in range(2):
            status, headers, content = limited.request("POST", path, body)
            statuses.append(status)
            if status == 200:
                assert np.array_equal(np.float32(vectors_of(json.loads(content))), expected)
            elif status == 429:
                assert int(headers["retry-after"]) >= 1 and error in content
                errors.append(content)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(flood, range(12)))
    assert set(statuses) == {200, 429}
    assert any(b"the queue is full" in content for content in errors)
    assert limited.metric("unpadded_queued_tokens") == 0  # nothing is computed before the next request
    assert limited.request("POST", *make(["after"]))[0] == 200


def computed_tokens(server):
    return server.metric("unpadded_batch_tokens_sum")


def count_tokens(engine, texts):
    return sum(len(row.ids) for row in engine.tokenizer.encode(list(dict.fromkeys(texts)), max_length=256))


@pytest.mark.parametrize("pipelined", [1, 3])
def test_a_disconnect_drops_the_work(minilm, engine, pipelined):
    texts = PARAGRAPHS[:1500]
    with serving(minilm) as server:
        before = computed_tokens(server)
        body = json.dumps({"inputs": texts}).encode()
        head = f"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(head + body + b"GET /info HTTP/1.1\r\nHost: a\r\n\r\n" * (pipelined - 1))
            wait_until(lambda: server.metric("unpadded_queued_tokens") > 10_000)
        wait_until(lambda: server.metric("unpadded_disconnects_total") == 1)
        wait_until(lambda: not server.metric("unpadded_queued_tokens"))
        assert computed_tokens(server) - before < count_tokens(engine, texts) / 2


@pytest.mark.parametrize("make", [embeddings, late_chunking, contextualized])
def test_a_deadline_drops_the_work(minilm, engine, make):
    texts = [text[:500] for text in PARAGRAPHS[:1500]]  # a chunk must fit into the model's maximum
    with serving(minilm, "--deadline", "0.05") as server:
        before = computed_tokens(server)
        status, _, body = server.request("POST", *make(texts))
        assert status == 504 and json.loads(body)["detail"].startswith("the deadline passed: 0.05 s"), body
        wait_until(lambda: not server.metric("unpadded_queued_tokens"))
        assert computed_tokens(server) - before < count_tokens(engine, texts) / 2


@contextlib.contextmanager
def unfinished_request(server):
    """Send a request without its last byte, so that the server drains until that is sent; yield the socket."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=HANG_SECONDS) as client:
        active = server.metric("unpadded_active_requests")
        client.sendall(b'POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 15\r\n\r\n{"inputs": "a"')
        wait_until(lambda: server.metric("unpadded_active_requests") == active + 1)
        yield client


def send_sigterm(server):
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: any(line["message"] == "draining" for line in server.log))


def test_sigterm_finishes_requests_in_progress(minilm, engine):
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(minilm, *PATIENT, fork=False))
        pool, client = stack.enter_context(ThreadPoolExecutor(1)), stack.enter_context(unfinished_request(server))
        response = pool.submit(server.request, "POST", "/embed", {"inputs": PARAGRAPHS[:150]})
        wait_until(lambda: server.metric("unpadded_queued_tokens") or response.done())
        send_sigterm(server)
        assert server.request("GET", "/health")[0] == 503
        status, headers, _ = server.request("POST", "/embed", {"inputs": "late"})
        assert status == 503 and headers["retry-after"] == "1"
        client.sendall(b"}")
        assert client.recv(15) == b"HTTP/1.1 200 OK"
        status, _, body = response.result()
        assert status == 200 and np.array_equal(np.array(json.loads(body), np.float32), engine.encode(PARAGRAPHS[:150]))
        assert server.wait() == 0


def test_sigterm_right_after_the_ready_line_exits_with_0(minilm):
    with serving(minilm) as server:
        assert server.stop() == 0


def test_a_second_sigterm_exits_immediately(minilm):
    with serving(minilm, *PATIENT) as server, unfinished_request(server) as client:
        send_sigterm(server)
        assert server.stop() == 130
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""


def test_a_port_that_is_taken_while_the_model_loads_is_an_error(engine):
    with reserve(ServerOptions(port=0)) as listener:
        options = ServerOptions(port=listener.getsockname()[1])
        with reserve(options) as other:
            other.listen()
            with pytest.raises(unpadded.OptionError, match=f"cannot listen on 127.0.0.1 port {options.port}"):
                serve([engine], options, listener, time.perf_counter())


def test_invalid_flags_exit_with_2_and_a_message(minilm, limited):
    for flags, message in {
        f"--port {limited.port}": f"cannot listen on 127.0.0.1 port {limited.port}",
        "--port 80800": "port is out of range: 80800",
        "--host nowhere.invalid": "cannot listen on nowhere.invalid port",
        "--default-task poetry": "'poetry'",
        "--max-body 0": "max_body is out of range: 0",
        "--grace nan": "grace is out of range: nan",
        "--tls-cert none.pem": "--tls-cert none.pem, --tls-key None; pass both or neither",
        "--tls-cert none.pem --tls-key none.pem --port 0": "the certificate cannot be read: none.pem",
        "--api-key-file none.txt": "the API key file cannot be read: none.txt",
    }.items():
        status, stderr = run_cli("serve", str(minilm), *flags.split())
        assert status == 2 and message in stderr, stderr
        assert "loading the model" not in stderr or flags == "--default-task poetry"
