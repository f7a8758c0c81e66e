"""Compare unpadded on a CPU with OpenVINO, ONNX Runtime, CTranslate2 and sentence-transformers, in every precision.

    PYTHONPATH=tests python bench/cpu_peers.py [--threads 1 2] [--rounds 3] [--out bench/results/cpu_peers.json]

Models: all-MiniLM-L6-v2 (real weights) on queries, paragraphs and passages; a NomicBERT of real width with 4 layers and
seeded weights on documents of up to 8192 tokens. Each library runs in a virtual environment of its own, which the
first run creates from bench/peers/*.txt under --environments, and on a model exported there; delete that folder to
start over. One process runs at a time, the rounds are interleaved, and medians are reported. The best number of texts
per batch of each library is found beforehand, with the last number of threads. Vectors are compared with those of
sentence-transformers in float32: the cosine of 2,000 paragraphs (of the documents for NomicBERT), and how many of the
ten paragraphs nearest to a query are the same, for 1,000 queries and 750 paragraphs. A provider that cannot run is
listed with the reason. The last line on stdout is JSON, even if the run is interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
from report_peers import table
from support import checkpoints

import unpadded
from unpadded.cli.benchmark.workloads import DOCUMENTS, TextSampler

PEERS = harness.ROOT / "bench" / "peers"
OWN = ("unpadded", "sentence-transformers")  # run in this environment, on the checkpoint itself
REFERENCE = "sentence-transformers, float32"
# Export formats: the environment that writes them, and the format they are written from.
FORMATS = {
    "onnx": ("export", "checkpoint"),
    "onnx-int8": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "onnx"),
    "openvino-int8": ("openvino", "openvino"),
    "ctranslate2": ("export", "checkpoint"),
}
NEAREST, PARAGRAPHS, QUERIES = 10, 750, 1000  # of the overlap
CANDIDATES = {"queries": (8, 32, 128), "paragraphs": (4, 8, 32), "passages": (1, 2, 8), "documents": (1, 2)}
QUERY = 16  # tokens
MEMORY = 0.75  # of the available memory, for one process


@dataclass(frozen=True)
class Provider:
    library: str
    precision: str
    model: str = "checkpoint"  # or an export format
    environment: str | None = None  # None: this one

    @property
    def name(self) -> str:
        return f"{self.library}, {self.precision}"


PROVIDERS = (
    Provider("unpadded", "float32"),
    Provider("unpadded", "bfloat16"),
    Provider("unpadded", "int8"),
    Provider("sentence-transformers", "float32"),
    Provider("OpenVINO", "float32", "openvino", "openvino"),
    Provider("OpenVINO", "bfloat16", "openvino", "openvino"),
    Provider("OpenVINO", "int8", "openvino-int8", "openvino"),
    Provider("ONNX Runtime", "float32", "onnx", "onnxruntime"),
    Provider("ONNX Runtime", "int8", "onnx-int8", "onnxruntime"),
    Provider("CTranslate2", "float32", "ctranslate2", "ctranslate2"),
    Provider("CTranslate2", "int8", "ctranslate2", "ctranslate2"),
)


@dataclass(frozen=True)
class Model:
    name: str
    folder: Path  # of its formats
    max_length: int
    streams: bool  # as many batches in parallel as threads; long texts run one after the other with all threads
    tokens: dict[str, int]  # in the texts of each workload
    texts: dict[str, list[str]]
    warm_up: dict[str, list[str]]  # other texts of the same workloads
    queries: list[str]  # of 16 tokens, for the latency
    accuracy: dict[str, list[str]]  # queries and paragraphs; empty to compare the vectors of the workloads
    calibration: list[str]  # for the ranges of int8


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=("MiniLM", "NomicBERT"), default=("MiniLM", "NomicBERT"))
    parser.add_argument("--libraries", nargs="*", default=list(dict.fromkeys(p.library for p in PROVIDERS)))
    parser.add_argument("--environments", type=Path, default=harness.ROOT / ".cache" / "cpu_peers")
    parser.add_argument(
        "--busy",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also measure paragraphs while another process keeps one processor busy, with 2 threads or more",
    )
    parser.add_argument("--small", action="store_true", help="a tiny model in float32, to test this script")
    args = parser.parse_args()
    providers = [p for p in PROVIDERS if p.library in args.libraries or p.name == REFERENCE]
    if args.small:
        providers = [p for p in providers if p.library in OWN and p.precision == "float32"]
    with harness.reporting(args.out) as result, tempfile.TemporaryDirectory() as folder:
        environments = Path(folder) if args.small else args.environments.absolute()
        result["models"] = []
        for name in args.models[: 1 if args.small else None]:
            model = prepare(name, environments / "models" / name, args.small)
            result["models"].append(found := {"model": model.name, "tokens": model.tokens})
            measure(model, providers, environments, args.threads, args.rounds, args.busy, found)


def prepare(name: str, folder: Path, small: bool) -> Model:
    """Write a model's checkpoint if it does not exist, and sample its texts."""
    checkpoint, scale = folder / "checkpoint", 1 / 16 if small else 1
    if not checkpoint.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_model(name, checkpoint, small)
    engine = unpadded.load(checkpoint, device="cpu", max_length=512 if name == "MiniLM" else 8192)
    sampler, draw = TextSampler(engine), np.random.default_rng(0)

    def count(texts: list[str]) -> int:
        return sum(len(found.ids) for found in engine.tokenizer.encode(texts, max_length=engine.checkpoint.max_length))

    def sample(scale: float) -> dict[str, list[str]]:
        if name == "NomicBERT":
            return {"documents": sampler.sample(DOCUMENTS[1::2] if scale == 1 else DOCUMENTS[:3:2])}
        return {
            "queries": sampler.workload("queries", int(640 * scale)),
            "paragraphs": sampler.workload("paragraphs", int(320 * scale)),
            "passages": sampler.sample(draw.integers(256, 513, int(48 * scale))),
        }

    texts = sample(scale)
    accuracy = {"queries": int(QUERIES * scale), "paragraphs": int(2000 * scale)} if name == "MiniLM" else {}
    return Model(
        name={"MiniLM": "all-MiniLM-L6-v2", "NomicBERT": "NomicBERT, 4 layers"}[name],
        folder=folder,
        max_length=engine.checkpoint.max_length,
        streams=name == "MiniLM",
        tokens={workload: count(found) for workload, found in texts.items()},
        texts=texts,
        warm_up=sample(scale / 2),
        queries=[text for text in sampler.sample([QUERY] * 200) if count([text]) == QUERY][:20],
        accuracy={workload: sampler.workload(workload, number) for workload, number in accuracy.items()},
        calibration=[text for some in sample(scale / 8).values() for text in some]
        + sampler.sample([64, 128, 256, 512] * 8),
    )


def write_model(name: str, checkpoint: Path, small: bool) -> None:
    if name == "MiniLM" and not small:
        checkpoint.symlink_to(checkpoints.MINILM)
        return
    checkpoint.mkdir()
    if small:
        checkpoints.write_bert(checkpoint, layers=1, hidden=64, heads=2, intermediate=128)
    else:
        checkpoints.write_nomic(checkpoint, names="transformers", **checkpoints.REAL | {"layers": 4})
    checkpoints.add_sentence_transformers_files(checkpoint)


def measure(
    model: Model,
    providers: list[Provider],
    environments: Path,
    threads: list[int],
    rounds: int,
    busy: bool,
    found: dict[str, Any],
) -> None:
    """Fill `found` with the rows of every number of threads and with the providers that cannot run."""
    found |= {"not run": {}, "batches": {}, "accuracy": {}, "packages": {}, "runs": []}
    running = []
    for provider in providers:
        try:
            if provider.environment:
                export(provider.model, model, environments)
                job = {"candidates": {workload: CANDIDATES[workload] for workload in model.texts}}
                found["batches"][provider.name] = work(provider, model, environments, threads[-1], job)["batches"]
                print(f"{model.name}: {provider.name}, texts per batch: {found['batches'][provider.name]}", flush=True)
            running.append(provider)
        except Failed as error:
            not_run(found, provider, error)
    vectors: dict[str, dict[str, np.ndarray]] = {}
    for number in threads:
        found["runs"].append(run := {"threads": number, "rows": []})
        results: dict[str, list[dict[str, Any]]] = {}
        for index in range(rounds):
            for provider in list(running):
                job = {
                    "batches": found["batches"].get(provider.name, {}),
                    "queries": model.queries,
                    "busy": "paragraphs" if busy and number > 1 and "paragraphs" in model.texts else "",
                    "accuracy": {} if provider.name in vectors else model.accuracy,
                }
                try:
                    with tempfile.TemporaryDirectory() as folder:
                        result = work(provider, model, environments, number, job | {"vectors": folder})
                        saved = {path.stem: np.load(path) for path in Path(folder).glob("*.npy")}
                except Failed as error:
                    not_run(found, provider, error)
                    running.remove(provider)
                    continue
                vectors.setdefault(provider.name, saved)
                found["packages"] |= result.pop("packages")
                results.setdefault(provider.name, []).append(result)
                print(f"{model.name}, {number} threads, round {index + 1}: {provider.name}", flush=True)
        found["accuracy"] = {name: accuracy(rows, vectors[REFERENCE]) for name, rows in vectors.items()}
        run["rows"] = [row(p, model, results[p.name]) for p in running]
        print(table(found, run), flush=True)


class Failed(Exception):
    """A process that did not exit with 0."""


def not_run(found: dict[str, Any], provider: Provider, error: Failed) -> None:
    if provider.name == REFERENCE:
        raise error
    found["not run"][provider.name] = str(error)
    print(f"{provider.name}: {error}", flush=True)


def work(provider: Provider, model: Model, environments: Path, threads: int, job: dict[str, Any]) -> dict[str, Any]:
    """Run a worker process and return its result."""
    job = {
        "library": provider.library,
        "precision": provider.precision,
        "model": str(model.folder / provider.model),
        "tokenizer": str(model.folder / "checkpoint" / "tokenizer.json"),
        "max_length": model.max_length,
        "threads": threads,
        "streams": threads if model.streams else 1,
        "memory": int(MEMORY * available_memory()),
        "texts": model.texts,
        "warm_up": model.warm_up,
        "candidates": {},
    } | job
    path = os.pathsep.join(str(harness.ROOT / folder) for folder in ("engine", "kernels"))
    variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
    if provider.environment is None:
        variables["PYTHONPATH"] = path
    else:
        variables["OPENBLAS_NUM_THREADS"] = "1"  # NumPy only averages hidden states
    output = start(python(provider.environment, environments), PEERS / "worker.py", variables, json.dumps(job))
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def start(program: Path, script: Path, variables: dict[str, str], stdin: str, *arguments: str) -> str:
    """Run a script of bench/peers and return its output; raise Failed with the last line of its errors."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    command = [str(program), str(script), *arguments]
    run = subprocess.run(command, env=environment, input=stdin, text=True, capture_output=True)
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if line.strip()] or [f"exit status {run.returncode}"]
        raise Failed(lines[-1].partition(" (")[0][:200])
    return run.stdout


def python(environment: str | None, environments: Path) -> Path:
    """Return the interpreter of an environment, which is created if its requirements are not installed."""
    if environment is None:
        return Path(sys.executable)
    folder, requirements = environments / environment, PEERS / f"{environment}.txt"
    program, installed = folder / "bin" / "python", folder / "requirements.txt"
    if not installed.exists() or installed.read_text() != requirements.read_text():
        print(f"install: {folder}", flush=True)
        pip = [str(program), "-m", "pip", "install", "--quiet"]
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        if environment == "export":
            subprocess.run([*pip, "--no-deps", "-r", str(harness.ROOT / ".ci" / "requirements.txt")], check=True)
        subprocess.run([*pip, "-r", str(requirements)], check=True)
        installed.write_text(requirements.read_text())
    return program


def export(name: str, model: Model, environments: Path) -> None:
    """Write a model in a format, and first in the formats it is made from, unless it exists."""
    target = model.folder / name
    if target.exists():
        return
    environment, source = FORMATS[name]
    if source != "checkpoint":
        export(source, model, environments)
    print(f"export: {target}", flush=True)
    tokenizer = str(model.folder / "checkpoint" / "tokenizer.json")
    arguments = [name, str(model.folder / source), str(target), *([tokenizer] if name == "openvino-int8" else [])]
    start(python(environment, environments), PEERS / "export.py", {}, json.dumps(model.calibration), *arguments)


def available_memory() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def row(provider: Provider, model: Model, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of a provider's rounds."""

    def median(name: str) -> float:
        return statistics.median(result[name] for result in results)

    seconds = {workload: [result["seconds"][workload] for result in results] for workload in model.tokens}
    found = {"provider": provider.name, "library": provider.library, "precision": provider.precision}
    found["seconds"] = seconds
    found["tokens_per_second"] = {
        workload: model.tokens[workload] / statistics.median(times) for workload, times in seconds.items()
    }
    found |= {name: median(name) for name in ("latency_seconds", "load_seconds", "resident_bytes", "peak_bytes")}
    if "busy_seconds" in results[0]:
        shares = [result["seconds"]["paragraphs"] / result["busy_seconds"] for result in results]
        found["busy_share"] = statistics.median(shares)
    return found


def accuracy(found: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the mean and minimum cosine to the reference, and the share of equal nearest paragraphs."""
    names = ["accuracy_paragraphs"] if "accuracy_paragraphs" in reference else list(reference)
    cosines = np.concatenate([(unit(found[name]) * unit(reference[name])).sum(1) for name in names])
    result = {"mean_cosine": float(cosines.mean()), "min_cosine": float(cosines.min())}
    if "accuracy_queries" in reference:
        shared = [len(set(a) & set(b)) for a, b in zip(nearest(found), nearest(reference), strict=True)]
        result["overlap"] = float(np.mean(shared)) / NEAREST
    return result


def nearest(vectors: dict[str, np.ndarray]) -> np.ndarray:
    """Return the paragraphs nearest to each query."""
    scores = unit(vectors["accuracy_queries"]) @ unit(vectors["accuracy_paragraphs"])[:PARAGRAPHS].T
    return np.argsort(-scores, axis=1)[:, :NEAREST]


def unit(vectors: np.ndarray) -> np.ndarray:
    rows = np.asarray(vectors, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
