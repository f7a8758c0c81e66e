"""HTTP as clients really send it: heads, upgrades, pipelines, slow readers, SIGTERM."""

import contextlib
import gzip
import json
import re
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import add_sentence_transformers_files, write_bert
from support.serving import HANG_SECONDS, serving, wait_until

import unpadded

MIB = 1 << 20
TEXT = b'{"inputs": "a"}'
LONG = {"inputs": ["word " * 120] * 60}  # about 6 MiB of token vectors as JSON


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sizes = {"layers": 1, "hidden": 64, "heads": 2, "intermediate": 64}
    return add_sentence_transformers_files(write_bert(tmp_path_factory.mktemp("served") / "tiny", **sizes))


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, "--max-body", "1250000") as server:
        yield server


@pytest.fixture(scope="module")
def impatient(folder):
    flags = "--read-timeout 2 --send-timeout 5 --max-body 1250000"
    with serving(folder, *flags.split()) as server:
        yield server


@pytest.fixture(scope="module")
def vector(folder):
    return unpadded.load(folder, device="cpu").encode("a")


def connect(server, receive_bytes=None):
    client = socket.socket()
    if receive_bytes is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.settimeout(HANG_SECONDS)
    client.connect(("127.0.0.1", server.port))
    return client


def exchange(server, *parts):
    """Send bytes and return everything until the server closes the connection."""
    with connect(server) as client:
        for part in parts:
            client.sendall(part)
            time.sleep(0.02 if len(parts) > 1 else 0)
        return b"".join(iter(lambda: client.recv(65536), b""))


def post(body=TEXT, *headers, path=b"/embed", close=True):
    lines = [b"POST %s HTTP/1.1" % path, b"Host: a", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join([*lines, *([b"Connection: close"] if close else []), b"", body])


def statuses(received):
    return [int(code) for code in re.findall(rb"HTTP/1.1 (\d{3}) ", received) if code != b"100"]


def resident(server):
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())[1])


HEADERS = b"".join(b"h%06d: %s\r\n" % (index, b"v" * 200) for index in range(5000))
CHUNKED = b"POST /embed HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (200, b"GET /info HTTP/1.1\r\nHost: a\r\nConnection: close\r\nx: " + b"v" * 60_000 + b"\r\n\r\n"),
        (431, b"GET /info HTTP/1.1\r\nHost: a\r\nx: " + b"v" * 80_000 + b"\r\n\r\n"),
        (431, b"GET /info HTTP/1.1\r\nHost: a\r\n" + HEADERS),
        (431, b"GET /info HTTP/1.1\r\nHost: a\r\nx: " + b"v" * MIB),
        (431, b"GET /info HTTP/1.1\r\nHost: a\r\n" + b"v" * MIB),
        (431, b"GET /" + b"v" * MIB),
        (431, CHUNKED + b"1;" + b"v" * MIB),
        (431, CHUNKED + b"0\r\n" + HEADERS),
        (400, b"GET /info HTTP/1.1\r\n\r\n"),
        (400, b"GET /info HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n"),
        (200, b"GET /info HTTP/1.0\r\n\r\n"),
        (400, b"GET /info HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n"),
        (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
        (501, b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n"),
        (400, b"POST /embed HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n"),
        (400, b"POST /embed HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n"),
        (400, CHUNKED + b"xyz\r\n"),
        (200, post(TEXT, b"Expect: 100-Continue")),
        (413, post(b"x", b"Expect: 100-continue").replace(b"Length: 1", b"Length: 99999999")),
        (200, b"POST /embed HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %015000d\r\n\r\n" % 15 + TEXT),
        (400, b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 18446744073709551617\r\n\r\n"),
    ],
)
def test_a_head_gets_its_status(server, status, request_):
    received = exchange(server, request_)
    assert statuses(received) == [status], received[:300]
    if status != 200:
        assert json.loads(received.rpartition(b"\r\n\r\n")[2])["error"]


def test_a_flood_of_headers_takes_no_memory(server):
    before = resident(server)
    with connect(server) as client, contextlib.suppress(OSError):
        client.sendall(b"GET /info HTTP/1.1\r\nHost: a\r\n")
        for _ in range(200):
            client.sendall(HEADERS)
    assert resident(server) - before < 32 * MIB


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"HTTP/3.0, h2c"])
def test_an_upgrade_is_declined_and_the_body_kept(server, vector, protocol):
    """Java's HttpClient offers h2c with the first request of a connection."""
    headers = (
        b"Connection: Upgrade, HTTP2-Settings",
        b"Upgrade: " + protocol,
        b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk",
    )
    chunked = CHUNKED.removesuffix(b"\r\n") + b"\r\n".join(headers) + b"\r\n\r\n"
    for request_ in (post(TEXT, *headers, close=False), chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(TEXT), TEXT)):
        for parts in ([request_ + post()], [bytes([byte]) for byte in request_[-40:]]):
            received = exchange(
                server, request_[: -sum(map(len, parts))], *parts, *([] if len(parts) == 1 else [post()])
            )
            assert statuses(received) == [200, 200]
            for body in received.split(b"HTTP/1.1 ")[1:]:
                assert np.array_equal(np.array(json.loads(body.rpartition(b"\r\n\r\n")[2]), np.float32)[0], vector)


def test_trailers_are_no_headers(folder):
    with serving(folder, "--api-key", "k") as server:
        body = b"%x\r\n%s\r\n0\r\nAuthorization: Bearer k\r\n\r\n" % (len(TEXT), TEXT)
        assert statuses(exchange(server, CHUNKED + body + post(path=b"/nowhere"))) == [401, 404]


def test_pipelined_requests_are_answered_in_order(server):
    received = exchange(server, post(close=False) * 300 + post(b"{", close=False) + b"nonsense\r\n\r\n")
    assert statuses(received) == [200] * 300 + [400]


@pytest.mark.parametrize("first", [post(b"").replace(b"Length: 0", b"Length: 99999999"), b"\r\n"])
def test_trickled_bytes_that_are_no_request_do_not_keep_a_connection(impatient, first):
    """The rest of a body that is too large, and empty lines. uvicorn restarts its timer at every byte."""
    with connect(impatient) as client, pytest.raises(ConnectionError):
        client.sendall(first)
        for _ in range(300):  # half a minute
            client.sendall(b"\r\n")
            time.sleep(0.1)


def test_unread_responses_are_bounded_and_their_clients_closed(impatient):
    server = impatient
    before = resident(server)
    refused = server.metric("unpadded_errors_total")
    body = gzip.compress(json.dumps(LONG).encode())
    request_ = post(body, b"Content-Encoding: gzip", path=b"/embed_all", close=False)
    clients = [connect(server, 4096) for _ in range(12)]
    for client in clients:
        client.sendall(request_)
    wait_until(lambda: server.metric("unpadded_errors_total") > refused)
    assert server.metric("unpadded_active_requests") > 2  # requests whose responses are not read are in progress
    assert server.request("POST", "/embed", {"inputs": "a"})[0] == 200
    assert resident(server) - before < 120 * MIB
    wait_until(lambda: server.metric("unpadded_active_requests") == 1)
    for client in clients:
        client.close()


def test_a_slow_reader_gets_its_whole_response(impatient):
    """In more seconds than --send-timeout, but not for each MiB."""
    with connect(impatient, 65536) as client:
        client.sendall(post(json.dumps(LONG).encode(), path=b"/embed_all"))
        received = client.recv(1000)
        size = int(re.search(rb"content-length: (\d+)", received)[1])
        while part := client.recv(300_000):
            received += part
            time.sleep(0.1)
    assert len(received.partition(b"\r\n\r\n")[2]) == size


def test_sigterm_answers_what_is_being_read_or_written(folder):
    flags = [f"--{name}={HANG_SECONDS}" for name in ("grace", "read-timeout", "send-timeout")]
    with serving(folder, *flags) as server, contextlib.ExitStack() as stack:
        reader, head, body = (stack.enter_context(connect(server, 65536)) for _ in range(3))
        reader.sendall(post(json.dumps(LONG).encode(), path=b"/embed_all"))
        received = reader.recv(1000)
        head.sendall(post()[:30])
        body.sendall(post()[:-3])
        # the server has read what was sent before on other connections
        wait_until(lambda: server.metric("unpadded_active_requests") == 3)  # with that of /metrics
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: any(line["message"] == "draining" for line in server.log))
        time.sleep(1.5)  # more than uvicorn waits for connections by default
        for client, rest in ((head, post()[30:]), (body, post()[-3:])):
            client.sendall(rest)
            answer = b"".join(iter(lambda client=client: client.recv(65536), b""))
            assert statuses(answer) == [200] and b"connection: close" in answer
        assert statuses(exchange(server, post())) == [503]
        while part := reader.recv(300_000):
            received += part
            time.sleep(0.05)  # 1 s for the whole response
        size = int(re.search(rb"content-length: (\d+)", received)[1])
        assert len(received.partition(b"\r\n\r\n")[2]) == size
        assert server.wait() == 0
