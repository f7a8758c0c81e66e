"""Measure the share of time for which devices compute, with stand-ins for GPUs that have a fixed speed and use no core.

    PYTHONPATH=tests python bench/busy.py [--out bench/results/busy.json]

A stand-in takes 16.4 ms for 32,768 tokens and computes one batch after another. Launching returns at once, and waiting
sleeps. Texts, tokenizer, windows, batches and worker processes are real. The work is `Engine.stream` with one device
and with several, and `Engine.aembed` from 64 clients, as in the server. Every vector is checked to be that of its
text. Three measurements differ in what limits them:

- `this machine`: such a device computes more tokens per second than a few cores tokenize. The row has the share of its
  time that the cores of this machine can fill at most.
- `slower devices`: together they compute half as many tokens per second as this machine tokenizes. What their share
  lacks is due to the order of the work, not to the number of cores.
- `16 cores, simulated`: the texts are tokenized in advance, and tokenizing sleeps as long as 16 idle cores per device
  would take, by the CPU time measured here. Devices and tokenizers in N processes are slower by a factor of N, since
  the rest of the work runs on the cores of this machine.

The last line on stdout is JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import wordpiece
from support import checkpoints

import unpadded
from unpadded.cli.benchmark.workloads import TextSampler
from unpadded.execution.pipeline import EmbeddingPipeline
from unpadded.execution.runner import DEPTH
from unpadded.execution.worker_pool import WorkerPool
from unpadded.tokenization.tokenizer import Tokenizer, Tokens

BUDGET = 32768
SPEED = 2e6  # tokens per second of a device
CORES = 16  # per device, in the simulation
DISTINCT = {50: 8192, 512: 1024, 8192: 64}  # texts by their tokens; more than a window has
DEVICE, START, END, LENGTH, CHECKSUM = range(5)  # columns of a stand-in's vectors
CHECKSUMS = 2**20
PLAN = {"prompt": "", "normalize": False}
# What this process tells all: the tokens per second of a device, the time.perf_counter() from which batches are timed,
# and the cores of a simulated tokenizer and how much slower than idle ones they are; 0 cores: the tokenizer is real.
CLOCK = np.dtype([("speed", float), ("origin", float), ("cores", float), ("slower", float)])


class StandIn:
    """A device of fixed speed. Its vectors hold when their batch ran, and the length and a checksum of their ids.

    clock: a file of one CLOCK.
    """

    devices = ready_devices = 1
    depth = DEPTH
    dimensions = 128

    def __init__(self, clock: Path, device: torch.device) -> None:
        self.device = device
        self._clock = np.memmap(clock, CLOCK, "r", shape=())
        self._end = 0.0
        self._lock = threading.Lock()

    def launch(self, sequences: Sequence[np.ndarray], options: Any) -> Any:
        rows = np.zeros((len(sequences), self.dimensions), np.float32)
        rows[:, LENGTH] = lengths = [len(ids) for ids in sequences]
        rows[:, CHECKSUM] = np.add.reduceat(np.concatenate(sequences), np.cumsum([0, *lengths[:-1]])) % CHECKSUMS
        speed, origin = float(self._clock["speed"]), float(self._clock["origin"])
        with self._lock:
            start = max(self._end, time.perf_counter())
            self._end = end = start + sum(lengths) / speed
        rows[:, [DEVICE, START, END]] = self.device.index, start - origin, end - origin

        def wait() -> np.ndarray:
            time.sleep(max(0, end - time.perf_counter()))
            return rows

        return wait

    def describe(self) -> dict[str, str]:
        return {"device": str(self.device), "dtype": "float32", "attention": "none"}

    def max_batch_tokens(self) -> None:
        return None

    def close(self) -> None:
        pass


class IdleCores(Tokenizer):
    """A tokenizer that can return known ids instead, after the time that idle cores would take for them.

    known: tokens of texts, and the seconds of a core per token in Python, of one core only, and in the library.
    """

    def __init__(self, tokenizer: Tokenizer, known: dict[str, tuple[Tokens, float, float]], clock: Path) -> None:
        self.real, self._known, self._file = tokenizer, known, clock
        self._clock = np.memmap(clock, CLOCK, "r", shape=())

    def __reduce__(self) -> tuple[Any, ...]:
        return IdleCores, (self.real, self._known, self._file)

    def encode(self, texts: Sequence[str], **options: Any) -> list[Tokens]:
        cores, slower = float(self._clock["cores"]), float(self._clock["slower"])
        if not cores:
            return self.real.encode(texts, **options)
        rows = [self._known[text] for text in texts]
        time.sleep(slower * sum(len(row.ids) * (python + library / cores) for row, python, library in rows))
        return [row for row, _, _ in rows]


def make_worker(clock: Path, checkpoint: Any, tokenizer: Tokenizer, device: torch.device) -> Any:
    """Return what a worker process runs."""
    return EmbeddingPipeline(checkpoint, tokenizer, StandIn(clock, device), BUDGET)


class Bench:
    """A model's tokenizer, texts and ids, and measurements with stand-ins."""

    def __init__(self, folder: Path, distinct: dict[int, int], budget: int, seconds: float) -> None:
        shape = {"layers": 1, "hidden": 64, "heads": 1, "intermediate": 256}
        checkpoints.write_nomic(folder, tokenizer=checkpoints.PACKAGE is not None, trained_length=8192, **shape)
        if not checkpoints.PACKAGE:
            wordpiece.write_tokenizer(folder, 8192)
        engine = unpadded.load(folder, device="cpu", max_length=8192)
        self.checkpoint, self.budget, self.seconds = engine.checkpoint, budget, seconds
        self.clock = folder / "clock"
        np.memmap(self.clock, CLOCK, "w+", shape=())
        real = Tokenizer.from_folder(folder, lower_case=engine.checkpoint.lower_case)  # on all cores
        sampler = TextSampler(engine)
        self.texts = {length: sampler.sample([length] * count) for length, count in distinct.items()}
        self.tokens: dict[str, Tokens] = {}
        self.costs: dict[int, dict[str, float]] = {}
        known = {}
        for length, texts in self.texts.items():
            tokens = dict(zip(texts, real.encode(texts, max_length=8192), strict=True))
            cost = self.costs[length] = self._cost(texts, sum(len(row.ids) for row in tokens.values()), real)
            self.tokens |= tokens
            known |= {text: (row, cost["python"], cost["library"]) for text, row in tokens.items()}
        self.tokenizer = IdleCores(real, known, self.clock)

    def _cost(self, texts: list[str], tokens: int, tokenizer: Tokenizer) -> dict[str, float]:
        """Return seconds per token to tokenize: of this machine, and CPU seconds in Python and in the library.

        Each is the least of three measurements.
        """

        def in_library() -> None:
            for start in range(0, len(texts), 256):
                tokenizer.backend.encode_batch_fast(texts[start : start + 256], add_special_tokens=False)

        found = []
        for run in (partial(tokenizer.encode, texts, max_length=8192), in_library) * 3:
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            found.append((time.perf_counter() - wall, time.process_time() - cpu))
        wall, cpu = map(min, zip(*found[::2], strict=True))
        library = min(cpu, min(cpu for _, cpu in found[1::2]))
        return {"machine": wall / tokens, "python": (cpu - library) / tokens, "library": library / tokens}

    def stand_in(self) -> StandIn:
        return StandIn(self.clock, torch.device("cpu", 0))

    def engine(self, runner: Any) -> unpadded.Engine:
        return unpadded.Engine(EmbeddingPipeline(self.checkpoint, self.tokenizer, runner, self.budget))

    def start(self, speed: float, cores: float = 0, slower: float = 1) -> None:
        """Set the speed of all devices and simulated tokenizers, and start the clock."""
        self.speed, self.cpu = speed, time.process_time()
        np.memmap(self.clock, CLOCK, "r+", shape=())[()] = (speed, time.perf_counter(), cores, slower)

    def stream(self, runner: Any, length: int, tokens: float, devices: int = 1) -> dict[str, Any]:
        """Stream texts of about so many tokens."""
        texts = list(itertools.islice(itertools.cycle(self.texts[length]), max(1, round(tokens / length))))
        blocks = list(self.engine(runner).stream(iter(texts), **PLAN))
        return self.result(texts, [block.vectors for block in blocks], devices, 0.0)

    def clients(self, length: int) -> dict[str, Any]:
        """Embed 64 texts per call from 64 clients, for `seconds`."""
        engine, called, vectors = self.engine(self.stand_in()), [], []
        end = time.perf_counter() + self.seconds

        async def client(number: int) -> None:
            for call in itertools.count():
                if time.perf_counter() > end:
                    return
                start = (64 * call + 997 * number) % (len(self.texts[length]) - 64)
                texts = self.texts[length][start : start + 64]
                vectors.append((await engine.aembed(texts, **PLAN)).vectors)
                called.append(texts)

        async def all_clients() -> None:
            await asyncio.gather(*map(client, range(64)))

        asyncio.run(all_clients())
        engine.close()
        return self.result(itertools.chain(*called), vectors, 1, None)

    def result(
        self, texts: Iterable[str], blocks: list[np.ndarray], devices: int, start: float | None
    ) -> dict[str, Any]:
        """Check the vectors; return the share of time from `start` (None: the first batch) in which devices compute."""
        cpu, vectors = time.process_time() - self.cpu, np.concatenate(blocks)
        expected = [(len(ids := self.tokens[text].ids), int(ids.sum()) % CHECKSUMS) for text in texts]
        if not np.array_equal(vectors[:, [LENGTH, CHECKSUM]], np.array(expected, np.float32)):
            raise SystemExit("a text has the vector of another one")
        batches = np.unique(vectors[:, [DEVICE, START, END]].astype(np.float64), axis=0)
        seconds = batches[:, END].max() - (batches[:, START].min() if start is None else start)
        of_devices = [batches[batches[:, DEVICE] == device] for device in range(devices)]
        shares = [float((rows[:, END] - rows[:, START]).sum() / seconds) for rows in of_devices]
        return {
            "busy": round(sum(shares) / devices, 3),
            "least busy device": round(min(shares), 3),
            "tokens/s": round(sum(shares) * self.speed),
            "batches": len(batches),
            "CPU seconds of this process per million tokens": round(cpu / sum(shares) / seconds / self.speed * 1e6, 2),
        }


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--devices", type=int, nargs="*", default=[1, 2, 4, 8], help="numbers of worker processes")
    parser.add_argument("--small", action="store_true", help="few texts and small batches, to test this script")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, harness.reporting(args.out) as result:
        distinct = {50: 200, 512: 40} if args.small else DISTINCT
        bench = Bench(Path(folder), distinct, *((1024, 0.2) if args.small else (BUDGET, 2.5)))
        result["CPU seconds to tokenize a million tokens"] = {
            length: {part: round(1e6 * cost[part], 3) for part in ("python", "library")}
            for length, cost in bench.costs.items()
        }
        print(f"CPU seconds to tokenize a million tokens: {result['CPU seconds to tokenize a million tokens']}")
        result["rows"] = []
        for length in distinct:
            runner = bench.stand_in()
            measure(bench, length, 1, "stream", partial(bench.stream, runner, length), result["rows"])
        measure(bench, 50, 1, "64 clients", lambda tokens: bench.clients(50), result["rows"])
        for devices in args.devices:
            make = partial(make_worker, bench.clock, bench.checkpoint, bench.tokenizer)
            pool = WorkerPool(make, [torch.device("cpu", index) for index in range(devices)])
            for length in (50, 512):
                run = partial(bench.stream, pool, length, devices=devices)
                measure(bench, length, devices, "stream to processes", run, result["rows"])
            pool.close()


def measure(
    bench: Bench, length: int, devices: int, path: str, run: Callable[[float], dict[str, Any]], rows: list[Any]
) -> None:
    """Measure with the three limits; add a row for each."""
    machine = 1 / bench.costs[length]["machine"]  # tokens per second
    slower = devices if path == "stream to processes" else 1
    for limits, speed, simulated in (
        ("this machine", SPEED, 0),
        ("slower devices", machine / 2 / devices, 0),
        (f"{CORES} cores, simulated", SPEED / slower, CORES),
    ):
        speeds = {"device, tokens/s": round(speed)}
        if limits == "this machine":
            speeds["busy at most, as cores tokenize"] = round(min(1.0, machine / (devices * speed)), 3)
        bench.start(speed, simulated, slower)
        rate = devices * speed if simulated else min(machine, devices * speed)
        tokens = max(bench.seconds * rate, 12 * devices * bench.budget)
        row = {"path": path, "devices": devices, "tokens per text": length, "limits": limits} | speeds | run(tokens)
        rows.append(row)
        print(", ".join(f"{name}: {value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    import busy  # worker processes import the classes of this module

    busy.main()
