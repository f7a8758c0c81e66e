"""What the server counts, for Prometheus."""

from __future__ import annotations

import time
from functools import partial

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from unpadded.execution.batcher import Batcher, Timing
from unpadded.execution.pipeline import EmbeddingPipeline

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKENS = tuple(2**power for power in range(4, 18))
RATE_MEMORY = 0.1  # weight of the latest batch in the running tokens per second


class Metrics:
    """One server's counters, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("unpadded_requests", "requests answered", ["path", "status"], registry=registry)
        self.errors = Counter("unpadded_errors", "requests answered with an error", ["kind"], registry=registry)
        self.disconnects = Counter("unpadded_disconnects", "clients that left before the answer", registry=registry)
        self.texts = Counter("unpadded_texts", "texts embedded", registry=registry)
        self.tokens = Counter("unpadded_tokens", "tokens embedded", registry=registry)
        self.truncated = Counter("unpadded_truncated_texts", "texts that had more tokens", registry=registry)
        self.active = Gauge("unpadded_active_requests", "requests under way", registry=registry)
        self.seconds = Histogram(
            "unpadded_request_seconds", "seconds by stage", ["stage"], buckets=SECONDS, registry=registry
        )
        self.batch_seconds = Histogram(
            "unpadded_batch_seconds", "seconds a batch takes", buckets=SECONDS, registry=registry
        )
        self.batch_tokens = Histogram("unpadded_batch_tokens", "tokens of a batch", buckets=TOKENS, registry=registry)
        self.batch_texts = Histogram("unpadded_batch_texts", "texts of a batch", buckets=TOKENS, registry=registry)
        self.tokens_per_second = 0.0  # of the model, lately

    def watch(self, pipeline: EmbeddingPipeline, batcher: Batcher) -> None:
        """Read an engine's devices and a batcher's queue whenever somebody asks."""
        devices = Gauge("unpadded_devices", "devices that take batches", registry=self._registry)
        devices.set_function(lambda: pipeline.backend.ready_devices)
        if (
            pipeline.backend.parallelism == 1 and pipeline.runner.device.type == "cuda"
        ):  # of several, other processes hold it
            memory = Gauge("unpadded_gpu_memory_bytes", "GPU memory held by tensors", registry=self._registry)
            memory.set_function(partial(torch.cuda.memory_allocated, pipeline.runner.device))
        calls = Gauge("unpadded_queued_requests", "requests that wait for a batch", registry=self._registry)
        calls.set_function(lambda: batcher.queued_calls)
        tokens = Gauge("unpadded_queued_tokens", "tokens that wait for a batch", registry=self._registry)
        tokens.set_function(lambda: batcher.queued_tokens)

    def observe_batch(self, texts: int, tokens: int, seconds: float) -> None:
        self.batch_texts.observe(texts)
        self.batch_tokens.observe(tokens)
        self.batch_seconds.observe(seconds)
        rate = tokens / max(seconds, 1e-6)
        self.tokens_per_second += RATE_MEMORY * (rate - self.tokens_per_second) if self.tokens_per_second else rate

    def observe_request(self, path: str, status: int, timing: Timing, serialize: float, start: float) -> None:
        self.requests.labels(path, status).inc()
        if status == 200:
            stages = {"tokenize": timing.tokenize, "queue": timing.queue, "inference": timing.inference}
            for stage, seconds in (stages | {"serialize": serialize, "total": time.perf_counter() - start}).items():
                self.seconds.labels(stage).observe(seconds)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)
