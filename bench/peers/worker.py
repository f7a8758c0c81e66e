"""Load a model with one library, measure it, and print the result as JSON; runs in that library's environment.

The job is a JSON object on stdin (see bench/cpu_peers.py). sentence-transformers and unpadded get the texts as they
are, with their default options. The other libraries compute a padded batch at a time: texts are sorted by length and
padded to the longest of the batch, hidden states are averaged over the mask and normalized. `streams` batches run in
parallel; a single query has all threads.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

Job = dict[str, Any]
Encode = Callable[[Any, int], np.ndarray]  # texts or one text, and the texts per batch -> vectors
Forward = Callable[[np.ndarray, np.ndarray], np.ndarray]  # ids and mask -> hidden states

WARM_UP, QUERIES = 20, 200  # single queries
PACKAGES = {
    "unpadded": ("torch",),
    "sentence-transformers": ("sentence-transformers", "transformers", "torch"),
    "OpenVINO": ("openvino", "nncf"),
    "ONNX Runtime": ("onnxruntime",),
    "CTranslate2": ("ctranslate2",),
}


def unpadded(job: Job, streams: int) -> Encode:
    from unpadded import load

    engine = load(job["model"], device="cpu", dtype=job["precision"], max_length=job["max_length"])
    return lambda texts, batch: engine.encode(texts, prompt="")


def sentence_transformers(job: Job, streams: int) -> Encode:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(job["model"], device="cpu")
    model.max_seq_length = job["max_length"]
    return lambda texts, batch: model.encode(texts, prompt="", show_progress_bar=False)


def openvino(job: Job, streams: int) -> Encode:
    import openvino

    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": job["threads"]}
    options |= {"PERFORMANCE_HINT": "LATENCY"} if streams == 1 else {"NUM_STREAMS": streams}
    if job["precision"] != "int8":  # which computes the rest in bf16 where the processor has it
        options["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16"}[job["precision"]]
    compiled = openvino.Core().compile_model(f"{job['model']}/model.xml", "CPU", options)
    local = threading.local()

    def forward(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        return local.request.infer([ids, mask], share_inputs=True, share_outputs=True)[0]

    return Padded(job, forward, streams)


def onnxruntime(job: Job, streams: int) -> Encode:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"] // streams
    session = onnxruntime.InferenceSession(f"{job['model']}/model.onnx", options, ["CPUExecutionProvider"])
    return Padded(job, lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0], streams)


def ctranslate2(job: Job, streams: int) -> Encode:
    import ctranslate2

    encoder = ctranslate2.Encoder(
        job["model"],
        compute_type=job["precision"],
        inter_threads=streams,
        intra_threads=job["threads"] // streams,
    )

    def forward(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        lengths = mask.sum(1)
        output = encoder.forward_batch([row[:length].tolist() for row, length in zip(ids, lengths, strict=True)])
        return np.array(output.last_hidden_state)

    return Padded(job, forward, streams)


LIBRARIES: dict[str, Callable[[Job, int], Encode]] = {
    "unpadded": unpadded,
    "sentence-transformers": sentence_transformers,
    "OpenVINO": openvino,
    "ONNX Runtime": onnxruntime,
    "CTranslate2": ctranslate2,
}


class Padded:
    """Vectors of texts by a function that computes a padded batch."""

    def __init__(self, job: Job, forward: Forward, streams: int) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(job["tokenizer"])
        self.tokenizer.enable_truncation(job["max_length"])
        self.tokenizer.no_padding()
        self.forward = forward
        self.map = ThreadPoolExecutor(streams).map if streams > 1 else map

    def __call__(self, texts: Any, batch: int) -> np.ndarray:
        if isinstance(texts, str):
            return self.vectors([self.tokenizer.encode(texts).ids])[0]
        ids = [found.ids for found in self.tokenizer.encode_batch_fast(texts)]
        order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
        chunks = [[ids[index] for index in order[start : start + batch]] for start in range(0, len(ids), batch)]
        found = np.concatenate(list(self.map(self.vectors, chunks)))
        vectors = np.empty_like(found)
        vectors[order] = found
        return vectors

    def vectors(self, ids: list[list[int]]) -> np.ndarray:
        """Return the vectors of one batch, longest text first."""
        padded = np.zeros((len(ids), len(ids[0])), np.int64)
        mask = np.zeros_like(padded)
        for row, text in enumerate(ids):
            padded[row, : len(text)] = text
            mask[row, : len(text)] = 1
        hidden = self.forward(padded, mask)
        mean = (mask[:, None].astype(np.float32) @ hidden)[:, 0]  # the sum, which normalizing makes equal to the mean
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def main() -> None:
    job = json.loads(sys.stdin.read())
    resource.setrlimit(resource.RLIMIT_DATA, (job["memory"], job["memory"]))  # raises instead of stopping the machine
    library, streams = LIBRARIES[job["library"]], job["streams"]
    started = time.perf_counter()
    encode = library(job, streams)
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - started}
    result["packages"] = {name: importlib.metadata.version(name) for name in PACKAGES[job["library"]]}
    if job["candidates"]:
        result["batches"] = best_batches(encode, job)
        print(json.dumps(result))
        return
    result["seconds"] = {}
    for name, texts in job["texts"].items():
        encode(job["warm_up"][name], job["batches"].get(name, 1))
        result["seconds"][name], vectors = timed(encode, texts, job["batches"].get(name, 1))
        np.save(Path(job["vectors"]) / f"{name}.npy", vectors)
    result |= {"resident_bytes": process_memory("VmRSS"), "peak_bytes": process_memory("VmHWM")}
    for name, texts in job["accuracy"].items():
        np.save(Path(job["vectors"]) / f"accuracy_{name}.npy", encode(texts, job["batches"].get(name, 1)))
    if job["busy"]:
        result["busy_seconds"] = seconds_with_busy_core(encode, job)
    if job["queries"]:
        if isinstance(encode, Padded) and streams > 1:
            encode = library(job, 1)
        result["latency_seconds"] = latency(encode, job["queries"])
    print(json.dumps(result))


def best_batches(encode: Encode, job: Job) -> dict[str, int]:
    """Return the fastest number of texts per batch, by workload."""
    best = {}
    for name, texts in job["warm_up"].items():
        seconds = {}
        for batch in job["candidates"][name]:
            encode(texts, batch)
            seconds[batch], _ = timed(encode, texts, batch)
        best[name] = min(seconds, key=seconds.__getitem__)
    return best


def timed(encode: Encode, texts: list[str], batch: int) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    vectors = encode(texts, batch)
    return time.perf_counter() - started, vectors


def seconds_with_busy_core(encode: Encode, job: Job) -> float:
    """Return the seconds of a workload while another process keeps the first processor busy."""
    name = job["busy"]
    cpu = min(os.sched_getaffinity(0))
    loop = f"import os; os.sched_setaffinity(0, [{cpu}])\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", loop]) as busy:
        try:
            return timed(encode, job["texts"][name], job["batches"].get(name, 1))[0]
        finally:
            busy.kill()


def latency(encode: Encode, queries: list[str]) -> float:
    """Return the median seconds from one text to its vector."""
    seconds = []
    for index in range(WARM_UP + QUERIES):
        started = time.perf_counter()
        encode(queries[index % len(queries)], 1)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP:])


def process_memory(field: str) -> int:
    """Return this process's resident bytes (VmRSS) or their peak (VmHWM)."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None, field
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
