"""Limits of what one client may cost: memory for bodies, and time and memory for tokenizing."""

import contextlib
import json
import socket
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.serving import HANG_SECONDS, serving, wait_until

from unpadded.server.api.tei import MAX_LISTED_TOKENS
from unpadded.server.endpoint import MAX_BODIES
from unpadded.server.service import MAX_CHARACTERS

MAX_BODY = 4_000_000
LARGE_REQUESTS = 12  # to tokenize them takes seconds, and a query 0.02 s


@pytest.fixture(scope="module")
def server(minilm):
    with serving(minilm, "--max-body", str(MAX_BODY), "--read-timeout", str(HANG_SECONDS)) as server:
        yield server


def test_texts_have_a_maximum_size(server):
    long = "a" * (MAX_CHARACTERS + 1)
    for path, value, status in [
        ("/embed", {"inputs": ["short", long]}, 413),
        ("/v1/embeddings", {"input": long}, 400),
        ("/v1/embedding/text", {"texts": [long]}, 413),
        ("/tokenize", {"inputs": [long[: MAX_CHARACTERS // 2]] * 3}, 413),
    ]:
        found, _, body = server.request("POST", path, value)
        assert found == status and f"maximum {MAX_CHARACTERS}" in body.decode(), (path, body)


def test_lists_of_tokens_have_a_maximum_length(server):
    for path, value in [
        ("/tokenize", {"inputs": "a " * (MAX_LISTED_TOKENS + 1)}),
        ("/decode", {"ids": [7592] * (MAX_LISTED_TOKENS + 1)}),
    ]:
        status, _, body = server.request("POST", path, value)
        assert status == 413 and f"maximum {MAX_LISTED_TOKENS}" in body.decode(), (path, body)


def partial_request(server, size):
    """Send a request without its last byte."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=HANG_SECONDS)
    head = f"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: {size + 1}\r\n\r\n"
    with contextlib.suppress(ConnectionError):  # the server answers and closes before it has read everything
        connection.sendall(head.encode() + b" " * size)
    return connection


def test_bodies_of_all_requests_have_a_maximum_size(server):
    with contextlib.ExitStack() as stack:
        for count in range(1, MAX_BODIES + 1):
            stack.enter_context(partial_request(server, MAX_BODY - 1000))
            wait_until(lambda count=count: server.metric("unpadded_body_bytes") == count * (MAX_BODY - 1000))
        rejected = stack.enter_context(partial_request(server, MAX_BODY - 1000))
        assert rejected.recv(15) == b"HTTP/1.1 429 To"
        assert server.request("POST", "/embed", {"inputs": "a query"})[0] == 200
        status, _, body = server.request("POST", "/embed", {"inputs": ["word " * 4000] * 3})
        assert status == 429 and b"bodies in progress are too large" in body
    wait_until(lambda: server.metric("unpadded_active_requests") <= 1)
    assert server.request("POST", "/embed", {"inputs": ["word " * 4000] * 3})[0] == 200


def test_tokenizing_large_inputs_does_not_delay_queries(server):
    """Words of the maximum size are the slowest input: all of a word is read, and it is one token."""
    body = json.dumps({"inputs": ["a" * (MAX_CHARACTERS - i) for i in range(7)]}).encode()
    head = f"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        for _ in range(LARGE_REQUESTS):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            client.sendall(head + body)
        wait_until(lambda: server.metric("unpadded_active_requests") > LARGE_REQUESTS)  # with that of /metrics
        for _ in range(3):
            assert server.request("POST", "/embed", {"inputs": "a query"})[0] == 200
        assert server.metric("unpadded_active_requests") > 1  # large inputs that came before the queries
    # The clients are gone, and what they sent is not tokenized any more.
    assert server.request("POST", "/embed", {"inputs": ["word " * 20] * 2000})[0] in (200, 429)
    wait_until(lambda: server.metric("unpadded_active_requests") <= 1)
    assert server.metric("unpadded_disconnects_total") > 0


def test_what_cannot_be_done_in_time_is_rejected_at_once(minilm, server):
    def ask(server):
        start = time.perf_counter()
        value = {"inputs": [f"{i} a few words of some length to embed" for i in range(100)]}
        status, headers, body = server.request("POST", "/embed", value)
        return status, time.perf_counter() - start, headers, body

    seconds = min(ask(server)[1] for _ in range(2))
    deadline = max(2.0, 10 * seconds)
    with serving(minilm, "--deadline", str(deadline)) as server:
        ask(server)  # measures the device
        clients = min(400, int(3 * deadline / seconds))  # three times what the deadline allows
        with ThreadPoolExecutor(clients) as pool:
            found = list(pool.map(ask, [server] * clients))
    statuses = [status for status, *_ in found]
    assert 200 in statuses and 429 in statuses, statuses
    accepted, rejected = ([seconds for one, seconds, *_ in found if one == status] for status in (200, 429))
    assert statistics.median(rejected) < statistics.median(accepted)
    for status, _, headers, body in found:
        if status == 429:
            assert b"deadline would pass" in body and int(headers["retry-after"]) >= 1
