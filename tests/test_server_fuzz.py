"""Requests that match the OpenAPI document, that violate it, and mutations of valid ones, to every endpoint.

`pytest tests/test_server_fuzz.py --fuzz 10000` sends 10000 requests to each.
"""

import contextlib
import gzip
import json
import os
import random
import re
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import schemathesis
from schemathesis import GenerationMode
from support.checkpoints import add_sentence_transformers_files, write_bert_reranker, write_nomic
from support.corpus import PARAGRAPHS
from support.serving import HANG_SECONDS, serving, wait_until
from support.sparse import write_models

import unpadded

VALID = {
    "/v1/embeddings": {"input": ["a", "b"], "model": "reranker", "encoding_format": "float", "dimensions": 5},
    "/embeddings": {"input": [[101, 102], [101, 2054, 102]], "encoding_format": "base64", "user": "u"},
    "/v1/embedding/text": {
        "texts": ["a"],
        "task_type": "clustering",
        "dimensionality": 3,
        "long_text_mode": "truncate",
    },
    "/": {"inputs": ["a"], "normalize": True},
    "/embed": {"inputs": ["a", [101, 102]], "truncate": True, "truncation_direction": "left", "normalize": False},
    "/embed_all": {"inputs": "a b", "truncate": None},
    "/embed_sparse": {"inputs": ["a", "b"]},
    "/similarity": {"inputs": {"source_sentence": "a", "sentences": ["b", "c"]}, "parameters": {"truncate": True}},
    "/rerank": {"query": "a", "texts": ["b", "c"], "raw_scores": True, "return_text": True, "truncate": False},
    "/predict": {"inputs": [["a"], ["b", "c"]], "truncation_direction": "right"},
    "/v1/embed": {"texts": ["a"], "embedding_types": ["int8", "base64"], "input_type": "clustering", "images": None},
    "/v2/embed": {"texts": ["a", "b"], "truncate": "START", "output_dimension": 3},
    "/v1/rerank": {"query": "a", "documents": [{"text": "c"}], "return_documents": True},
    "/v2/rerank": {"query": "a", "documents": ["b"], "max_tokens_per_doc": 4096, "priority": 0},
    "/v1/contextualizedembeddings": {"inputs": [["a", "b"], ["c"]], "output_dtype": "int8", "output_dimension": 3},
    "/tokenize": {"inputs": ["a"], "add_special_tokens": False},
    "/decode": {"ids": [[1, 2], [3]], "skip_special_tokens": True},
}
ODD = [None, True, 0, -1, 2**31, 2**70, 1e300, "", "\x00", "é" * 50, "a " * 400, [], {}, [[]], [None], ["", 1], [30521]]
HEADERS = [
    {"accept": "application/octet-stream"},
    {"accept": "application/x-unknown;q=0, \x80"},
    {"content-encoding": "gzip"},
    {"content-encoding": "zstd"},
    {"content-encoding": "br"},
    {"content-type": "text/html"},
    {"authorization": "Bearer \xff"},
    {"x-request-id": "é" * 200},
    {"traceparent": "00-zz"},
]
STATUSES = {200, 400, 404, 413, 415, 422}
MAX_GENERATED = 400  # cases from schemathesis per operation and mode; the rest are mutations of them
CANARY_EVERY = 25
CANARY = PARAGRAPHS[:3]
MIB = 1 << 20
PARTS = (0.2, 0.2, 0.3, 0.3)  # of the requests; memory is measured after each part
MIN_REQUESTS_FOR_MEMORY = 2000  # in a shorter run, the allocator's arenas still grow
# By default oneDNN caches 1024 kernels, hundreds of MiB that would hide a leak.
SMALL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}


def mutate(value, draw):
    """Return a JSON value similar to a valid one, or occasionally an unrelated one."""
    if draw.random() < 0.12:
        return draw.choice(ODD)
    if isinstance(value, dict):
        value = {key: mutate(item, draw) for key, item in value.items() if draw.random() > 0.08}
        return value | {"extra": 1} if draw.random() < 0.03 else value
    return [mutate(item, draw) for item in value] if isinstance(value, list) else value


def generate_cases(operation, count):
    """Return (path, body) of requests that match the operation's schema, and of ones that violate it."""
    cases = []

    def keep(case):
        cases.append((case.formatted_path, case.body))

    modes = GenerationMode if operation.method == "post" else [GenerationMode.POSITIVE]
    for mode in modes:
        settings = hypothesis.settings(
            max_examples=min(count, MAX_GENERATED),
            deadline=None,
            database=None,
            derandomize=True,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        settings(hypothesis.given(operation.as_strategy(generation_mode=mode))(keep))()
    return cases


def fuzz(server, operation, cases, count, seed, expected):
    """Send `count` requests to an operation, its cases first, then mutations. Return the statuses of the responses."""
    draw, statuses = random.Random(f"{operation.label} {seed}"), set()
    valid = VALID.get(operation.path)
    method = operation.method.upper()
    with contextlib.closing(server.connection()) as connection:

        def send(method, path, body, headers):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()

        for index in range(count):
            is_generated = seed == 0 and index < len(cases)
            path, value = cases[index] if is_generated else draw.choice(cases)
            if method == "GET":
                body = None
                path += draw.choice(["", "?", "?a=%00", f"?{draw.random()}=é".encode().decode("latin-1")])
            else:
                if not is_generated:
                    value = mutate(valid if draw.random() < 0.7 else value, draw)
                body = value if isinstance(value, bytes) else json.dumps(value, default=str).encode()
                if body and draw.random() < 0.1:
                    place = draw.randrange(len(body))
                    body = body[:place] + bytes([draw.randrange(256)]) + body[place + 1 :]
            headers = draw.choice(HEADERS) if draw.random() < 0.1 else {}
            if headers.get("content-encoding") == "gzip" and draw.random() < 0.5:
                body = gzip.compress(body or b"")
            path = "".join(char if "!" < char < "\x7f" else "_" for char in path)
            status, response_headers, content = send(
                method, path, body, {k: v.encode("latin-1") for k, v in headers.items()}
            )
            assert status in STATUSES, (path, body, headers, status, content)
            if response_headers["content-type"] == "application/json":
                json.loads(content)
            statuses.add(status)
            if index % CANARY_EVERY == 0:
                status, _, content = send("POST", "/embed", json.dumps({"inputs": CANARY}), {})
                assert status == 200 and np.array_equal(np.array(json.loads(content), np.float32), expected)
    return statuses


def resident(server):
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])


@pytest.mark.slow
def test_fuzzed_requests_never_break_the_server(tmp_path, request):
    """No 500, no hang, no memory growth, and known texts get exactly the same vectors in between."""
    count = request.config.getoption("fuzz")
    folder = write_bert_reranker(tmp_path / "reranker", prompts={"search_document": "", "clustering": ""})
    expected = unpadded.load(folder, device="cpu").encode(CANARY, prompt="", normalize=True)
    sparse = write_models(tmp_path / "sparse")["bert"]
    measured = count >= MIN_REQUESTS_FOR_MEMORY
    process = {"fork": False, "env": SMALL_CACHES} if measured else {}
    with serving([folder, sparse], "--max-body", "400000", "--max-inputs", "64", **process) as server:
        document = json.loads(server.request("GET", "/openapi.json")[2])
        operations = [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]
        assert {operation.path for operation in operations if operation.method == "post"} == VALID.keys()

        cases = [generate_cases(operation, 1 + count // 10) for operation in operations]

        for path, body in VALID.items():
            server.post(path, body)  # fails unless the status is 200

        sizes, statuses = [], {operation.label: set() for operation in operations}
        for seed, part in enumerate(PARTS):
            send = partial(fuzz, server, count=int(part * count), seed=seed, expected=expected)
            with ThreadPoolExecutor(4) as pool:
                for found, of_part in zip(statuses.values(), pool.map(send, operations, cases), strict=True):
                    found |= of_part
            sizes.append(resident(server))
        mib = ", ".join(f"{size / MIB:.0f}" for size in sizes)
        print(f"{count} requests to each of {len(operations)} operations; {mib} MiB resident; {statuses}")
        assert not measured or sizes[-1] - sizes[0] < 48 * MIB
        for label, found in statuses.items():
            if label.startswith("POST"):
                assert {400, 422} & found, label
            else:
                assert 200 in found or label == "GET /v1/models/{name}", label
        assert server.metric("unpadded_queued_tokens") == 0
        assert server.request("GET", "/health")[0] == 200 and server.stop() == 0


HEAD_LINES = (
    b"Connection: close|Connection: keep-alive|Connection: Upgrade\r\nUpgrade: h2c|Upgrade: websocket|Expect: 1|Host:|"
    b"Connection: upgrade\r\nUpgrade: websocket|Expect: 100-continue|Host: b|Transfer-Encoding: chunked|Origin: a|"
    b"Transfer-Encoding: gzip, chunked|Transfer-Encoding: identity|Content-Length: 3|Content-Length: 00|x| x: y|"
    b"Content-Length: -1|Content-Length: 9999999999|x: \xff\x01|: x|\r\nx|Accept: application/octet-stream|"
    b"Content-Encoding: gzip|x-request-id: \xe9|x: " + b"v" * 9000 + b"|x: " + b"v" * 90_000
).split(b"|")
RAW_STATUSES = STATUSES | {405, 408, 429, 431, 501}


def raw_request(draw):
    """Return a request that is valid, or almost."""
    body = draw.choice([b"", b'{"inputs": "a"}', b'{"inputs": ["a b", "c"]}', b"{", b"x" * 70_000, b" " * 500_000])
    path = draw.choice([b"/embed", b"/embed", b"/info", b"/", b"/nowhere", b"/v1/embeddings", b"*", b"a:1", b"//?#"])
    head = [b"%s %s HTTP/%s" % (draw.choice([b"POST", b"POST", b"GET", b"HEAD", b"CONNECT"]), path, b"1.1"), b"Host: a"]
    head += draw.sample(HEAD_LINES, draw.choice([0, 0, 1, 1, 2, 3]))
    if draw.random() < 0.2:
        size = draw.choice([1, 7, 5000])
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(body[i : i + size]), body[i : i + size]) for i in range(0, 9000, size))
        head, body = (
            [*head, b"Transfer-Encoding: chunked"],
            chunks + draw.choice([b"0\r\n\r\n", b"0\r\na: b\r\n\r\n", b""]),
        )
    elif draw.random() < 0.9:
        head.append(b"Content-Length: %d" % len(body))
    data = b"\r\n".join([*head, b"", body])
    if draw.random() < 0.2:
        place = draw.randrange(len(data))
        data = (
            data[:place] + draw.choice([b"", b"\r\n", b"\0", draw.randbytes(20)]) + data[place + draw.randrange(20) :]
        )
    return data


def fuzz_connection(server, seed):
    """Send requests in pieces, then read, half-close, leave or reset. Return the statuses that were received."""
    draw = random.Random(seed)
    data, received = b"".join(raw_request(draw) for _ in range(draw.choice([1, 1, 2, 5]))), []
    with socket.create_connection(("127.0.0.1", server.port), timeout=HANG_SECONDS) as client:
        try:
            converse(client, draw, data, received)
        except TimeoutError as error:
            raise AssertionError(f"seed {seed}: the connection stays open after {b''.join(received)}") from error
        except OSError:  # the server closed the connection
            pass
    statuses = [int(status) for status in re.findall(rb"HTTP/1.1 (\d{3}) ", b"".join(received))]
    assert RAW_STATUSES.union([100]).issuperset(statuses), (seed, statuses)
    return statuses


def converse(client, draw, data, received):
    while data:
        size = draw.choice([1, 10, 1000, 100_000, len(data)])
        client.sendall(data[:size])
        data = data[size:] if size >= 1000 or len(data) < 5000 else data[-5000:]
        data = data if draw.random() < 0.95 else b""
    end = draw.choice(["read", "read", "half-close", "leave", "reset"])
    if end == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if end in ("leave", "reset"):
        return
    if end == "read":
        client.settimeout(1)
        with contextlib.suppress(TimeoutError):  # of an idle connection
            while part := client.recv(draw.choice([10, 65_536])):
                received.append(part)
        client.settimeout(HANG_SECONDS)
    client.shutdown(socket.SHUT_WR)
    while part := client.recv(65_536):
        received.append(part)


def open_sockets(server):
    links = []
    for path in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            links.append(os.readlink(path))
    return sum(link.startswith("socket:") for link in links)


def test_fuzzed_connections_never_break_the_server(tmp_path, request):
    """No 500, no connection that stays open, no error in the log, no memory growth, and the same vectors as before."""
    count = request.config.getoption("fuzz")
    folder = add_sentence_transformers_files(write_nomic(tmp_path / "model"))
    expected = unpadded.load(folder, device="cpu").encode(CANARY, prompt="")
    flags = "--max-body 400000 --read-timeout 0.5 --send-timeout 0.5 --deadline 5"
    with serving(folder, *flags.split()) as server, ThreadPoolExecutor(8) as pool:
        found, sizes = set(), []
        for start in range(0, count, -(-count // 4)):
            for statuses in pool.map(partial(fuzz_connection, server), range(start, start + -(-count // 4))):
                found.update(statuses)
            assert np.array_equal(np.array(server.post("/embed", {"inputs": CANARY}), np.float32), expected)
            sizes.append(resident(server))
        wait_until(lambda: server.metric("unpadded_active_requests") == 1 and server.metric("unpadded_body_bytes") == 0)
        sockets = open_sockets(server)
        print(f"{count} connections: statuses {found}, {[size // MIB for size in sizes]} MiB resident")
        assert {200, 400, 501} <= found and sizes[-1] - sizes[1] < 48 * MIB
        assert sockets < 20
        assert not [line for line in server.log if line["level"] == "error"]
        assert server.stop() == 0
