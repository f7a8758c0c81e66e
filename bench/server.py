"""Measure the server under load, compare every vector that it returns, and optionally compare it with infinity.

    PYTHONPATH=tests python bench/server.py [--model FOLDER] [--seconds 60] [--infinity /path/to/infinity_emb]

The clients run on the same machine. In the mixed load each client sends the next request as soon as it has a response,
so 64 requests wait at any time and latency depends on the size of a request; it is reported per size. The throughput is
compared with that of `engine.encode` on the same texts before and after. The overload sends 1.25 and 4 times the texts
per second that `engine.encode` processes, and a few queries: only the statuses 200 and 429 are correct, the tokens
answered must stay at 85 % of what `engine.encode` processes, memory must stay constant, and queries must be answered
during and after it. --infinity is the program of infinity-emb in an
environment of its own; both servers get the same load alternately. Exits with an error if a vector is wrong or a status
is another. The last line on stdout is JSON.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import random
import re
import socket
import statistics
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import harness
import numpy as np
from support import checkpoints
from support.serving import Server, serving

import unpadded
from unpadded.cli.benchmark.workloads import TextSampler

SIZES = [1] * 14 + [8] * 4 + [64] * 2  # texts per request; most are queries
LARGE = 64
OVERLOADS = (1.25, 4)  # times the throughput of engine.encode
OVERLOAD_DEADLINE = 8  # seconds
OVERLOAD_QUERIES = 2  # per second
MIN_GOODPUT = 0.85  # tokens answered in time, relative to engine.encode
PARAGRAPHS, CLIENTS = 8, 16  # paragraphs per request and clients, in the comparison with infinity
START_TIMEOUT = 120  # seconds, of infinity
MEBIBYTE = 2**20


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--model", type=Path, default=checkpoints.MINILM, help="default: all-MiniLM-L6-v2")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--texts", type=int, default=2000, help="number of different texts")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--responses", choices=["octets", "float", "base64"], default="octets")
    parser.add_argument("--infinity", type=Path, help="the program infinity_emb, to compare with")
    args = parser.parse_args()

    engine = unpadded.load(args.model, device="cpu")
    texts = TextSampler(engine).workload("paragraphs", args.texts)
    found = engine.embed(texts)
    load = Load(texts, found.vectors, found.token_counts, args.responses)
    with harness.reporting(args.out) as result:
        loads = result["loads"] = {}
        loads[f"{args.clients} clients, mixed sizes"], rate = steady(load, engine, args)
        for times in OVERLOADS:
            loads[f"{times} x capacity"] = overload(load, rate, times, args)
        if args.infinity:
            both = side_by_side(load, args)
            own, other = both.values()
            loads |= both
            result["relative to infinity"] = {
                name: round(own[name] / other[name], 3) for name in ("texts/s", "p99, ms")
            }
            print(f"relative to infinity: {result['relative to infinity']}")
        for name, row in loads.items():
            print(f"{name}: {row}")
    rows = loads | {f"queries at {name}": row["queries"] for name, row in loads.items() if "queries" in row}
    wrong = {name: row for name, row in rows.items() if row["wrong vectors"] or set(row["statuses"]) - {200, 429}}
    if wrong:
        raise SystemExit(f"wrong vectors or statuses: {wrong}")
    for name, row in loads.items():
        if row.get("goodput relative to engine.encode", 1) < MIN_GOODPUT:
            raise SystemExit(f"{name}: fewer tokens are answered in time than {MIN_GOODPUT} of engine.encode: {row}")


def steady(load: Load, engine: unpadded.Engine, args: Any) -> tuple[dict[str, Any], float]:
    """Return the row of the mixed load, and tokens/s of `engine.encode` on the same texts."""
    before = encode_rate(engine, load)
    with serving(args.model) as server:
        row = load.run(server, args.clients, args.seconds, SIZES)
        writing = server.metric('unpadded_request_seconds_sum{stage="serialize"}') / processor_seconds(server)
    rate = statistics.mean([before, encode_rate(engine, load)])
    compared = {"engine.encode, tokens/s": round(rate), "share of engine.encode": round(row["tokens/s"] / rate, 3)}
    return row | {"share of CPU time in responses": round(writing, 4)} | compared, rate


def overload(load: Load, rate: float, times: float, args: Any) -> dict[str, Any]:
    """Send large requests at `times` the rate, the tokens/s of `engine.encode`, and queries at the same time."""
    requests = times * rate / (LARGE * float(load.lengths.mean()))
    seconds = max(args.seconds / 2, OVERLOAD_DEADLINE / 4)
    with serving(args.model, "--deadline", str(OVERLOAD_DEADLINE)) as server:
        load.run(server, 4, 2, [LARGE])
        with sampled_memory(server) as samples, ThreadPoolExecutor(1) as pool:
            queries = pool.submit(load.run, server, 4, seconds, [1], OVERLOAD_QUERIES)
            row = load.run(server, int(times * args.clients), seconds, [LARGE], requests)
        start = time.perf_counter()
        server.post("/embed", {"inputs": "after"})
        after = time.perf_counter() - start
    half = len(samples) // 2
    increase = max(samples[half:]) - max(samples[: half or 1])
    found = queries.result()
    return row | {
        "requests sent per second": round(requests, 1),
        "goodput relative to engine.encode": round(row["tokens/s"] / rate, 3),
        "queries": {name: found[name] for name in ("statuses", "wrong vectors", "p50, ms", "p99, ms")},
        "memory increase in the second half, MiB": round(increase / MEBIBYTE, 1),
        "memory, MiB": [round(sample / MEBIBYTE, 1) for sample in samples],
        "next query, s": round(after, 3),
    }


def side_by_side(load: Load, args: Any) -> dict[str, dict[str, Any]]:
    """Send paragraphs to the OpenAI interface of unpadded and infinity, alternately, two rounds each."""
    load = Load(load.texts, load.expected, load.lengths, "base64")
    with serving(args.model) as own, Infinity(args.infinity, args.model) as infinity:
        servers: dict[str, Target] = {"unpadded": own, "infinity": infinity}
        for server in servers.values():
            load.run(server, CLIENTS, min(3, args.seconds / 4), [PARAGRAPHS])
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
        for _ in range(2):
            for name, server in servers.items():
                rounds[name].append(load.run(server, CLIENTS, args.seconds / 4, [PARAGRAPHS]))
    return {
        f"{CLIENTS} clients, {PARAGRAPHS} paragraphs per request, {name}": both[0]
        | {key: round(statistics.mean(row[key] for row in both), 1) for key in ("texts/s", "tokens/s")}
        | {key: max(row[key] for row in both) for key in ("p50, ms", "p99, ms")}
        | {"wrong vectors": sum(row["wrong vectors"] for row in both), "by size": {}, "rounds": both}
        for name, both in rounds.items()
    }


class Target(Protocol):
    def connection(self) -> http.client.HTTPConnection: ...


class Load:
    """Clients, one thread each, that request slices of the texts and compare the vectors returned."""

    def __init__(self, texts: list[str], expected: np.ndarray, lengths: np.ndarray, responses: str) -> None:
        self.texts = texts
        self.expected = expected
        self.lengths = lengths
        self.responses = responses

    def run(
        self, server: Target, clients: int, seconds: float, sizes: list[int], per_second: float | None = None
    ) -> dict[str, Any]:
        """Run the clients. per_second: requests sent per second; None: each client waits only for its responses."""
        statuses: Counter[int] = Counter()
        latencies: dict[int, list[float]] = {}
        texts = tokens = wrong = 0
        lock = threading.Lock()
        begin = time.perf_counter()

        def client(seed: int) -> None:
            nonlocal texts, tokens, wrong
            draw = random.Random(seed)
            due = begin + (seed / per_second if per_second else 0)
            with contextlib.closing(server.connection()) as connection:
                while max(due, time.perf_counter()) < begin + seconds:
                    time.sleep(max(0, due - time.perf_counter()))
                    due += clients / per_second if per_second else 0
                    size = draw.choice(sizes)
                    place = draw.randrange(len(self.texts) - size)
                    start = time.perf_counter()
                    status, rows = self._request(connection, self.texts[place : place + size])
                    elapsed = time.perf_counter() - start
                    with lock:
                        statuses[status] += 1
                        if rows is not None:
                            latencies.setdefault(size, []).append(elapsed)
                            texts += size
                            tokens += int(self.lengths[place : place + size].sum())
                            wrong += not self._is_correct(server, rows, self.expected[place : place + size])

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.perf_counter() - begin
        return {
            "clients": clients,
            "statuses": dict(statuses),
            "wrong vectors": wrong,
            **percentiles([latency for some in latencies.values() for latency in some]),
            "texts/s": round(texts / elapsed, 1),
            "tokens/s": round(tokens / elapsed),
            "by size": {
                size: {"requests": len(latencies[size])} | percentiles(latencies[size]) for size in sorted(latencies)
            },
        }

    def _is_correct(self, server: Target, rows: np.ndarray, expected: np.ndarray) -> bool:
        """Compare bit for bit; within 1e-5 for infinity, whose matmuls sum in another order."""
        if isinstance(server, Server):
            return np.array_equal(rows, expected)
        return rows.shape == expected.shape and bool(np.allclose(rows, expected, atol=1e-5))

    def _request(self, connection: Any, texts: list[str]) -> tuple[int, np.ndarray | None]:
        accept = "application/octet-stream" if self.responses == "octets" else "application/json"
        request = {"input": texts, "encoding_format": "base64" if self.responses == "base64" else "float"}
        headers = {"Accept": accept, "Content-Type": "application/json"}
        connection.request("POST", "/v1/embeddings", json.dumps(request).encode(), headers)
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            return response.status, None
        if self.responses == "octets":
            return 200, np.frombuffer(body, "<f4").reshape(len(texts), -1)
        rows = [item["embedding"] for item in json.loads(body)["data"]]
        if self.responses == "base64":
            rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
        return 200, np.array(rows, np.float32)


class Infinity:
    """A context in which infinity serves a model, started as its documentation shows."""

    def __init__(self, program: Path, model: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        flags = ["--engine", "torch", "--no-bettertransformer", "--device", "cpu", "--url-prefix", "/v1"]
        where = ["--model-id", str(model), "--served-model-name", "default", "--port", str(self.port)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [program, "v2", *where, *flags],
            env=environment | {"INFINITY_ANONYMOUS_USAGE_STATS": "0", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> Infinity:
        deadline = time.perf_counter() + START_TIMEOUT
        while self.process.poll() is None and time.perf_counter() < deadline:
            with contextlib.suppress(OSError), contextlib.closing(self.connection()) as connection:
                connection.request("GET", "/v1/models")
                if connection.getresponse().status == 200:
                    return self
            time.sleep(0.5)
        self.__exit__()
        raise SystemExit(
            f"infinity did not start within {START_TIMEOUT} s: {self.process.args}; run it by hand to see why"
        )

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)


def percentiles(latencies: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile in ms; NaN without latencies."""
    cuts = np.percentile(latencies, [50, 99]) if latencies else [float("nan")] * 2
    return {"p50, ms": round(1000 * float(cuts[0]), 1), "p99, ms": round(1000 * float(cuts[1]), 1)}


def encode_rate(engine: unpadded.Engine, load: Load) -> float:
    """Return tokens/s of `engine.encode` for all texts in one call."""
    start = time.perf_counter()
    engine.encode(load.texts)
    return float(load.lengths.sum()) / (time.perf_counter() - start)


@contextlib.contextmanager
def sampled_memory(server: Server) -> Iterator[list[int]]:
    """Yield a list to which the server's resident bytes are added every half second."""
    samples = [resident(server)]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.5):
            samples.append(resident(server))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def resident(server: Server) -> int:
    """Return the server's resident bytes."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def processor_seconds(server: Server) -> float:
    """Return the CPU seconds that the server has used."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
