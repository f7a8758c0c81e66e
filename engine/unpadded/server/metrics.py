"""Prometheus metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from unpadded.execution.batcher import Batcher, Timing
from unpadded.execution.pipeline import EmbeddingPipeline
from unpadded.execution.runner import Runner

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
COUNT_BUCKETS = tuple(2**power for power in range(4, 18))


@dataclass
class Usage:
    """Counts for one request. `Service` adds to them; headers, metrics and the log line are made from them."""

    texts: int = 0
    characters: int = 0
    tokens: int = 0
    truncated: int = 0
    timing: Timing = field(default_factory=Timing)

    def as_json(self) -> dict[str, int]:
        """Return OpenAI's `usage`, and the number of texts that were truncated, which OpenAI's API does not have."""
        return {"prompt_tokens": self.tokens, "total_tokens": self.tokens, "truncated_texts": self.truncated}


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("unpadded_requests", "requests answered", ["path", "status"], registry=registry)
        self.errors = Counter("unpadded_errors", "requests answered with an error", ["kind"], registry=registry)
        self.disconnects = Counter(
            "unpadded_disconnects", "clients that disconnected before the response", registry=registry
        )
        self.texts = Counter("unpadded_texts", "texts embedded", registry=registry)
        self.tokens = Counter("unpadded_tokens", "tokens embedded", registry=registry)
        self.truncated = Counter("unpadded_truncated_texts", "texts that were truncated", registry=registry)
        self.active = Gauge("unpadded_active_requests", "requests in progress", registry=registry)
        self.body_bytes = Gauge("unpadded_body_bytes", "bodies of the requests in progress", registry=registry)
        self.seconds = Histogram(
            "unpadded_request_seconds", "seconds per stage", ["stage"], buckets=SECONDS_BUCKETS, registry=registry
        )
        self.batch_seconds = Histogram(
            "unpadded_batch_seconds", "seconds per batch", buckets=SECONDS_BUCKETS, registry=registry
        )
        self.batch_tokens = Histogram(
            "unpadded_batch_tokens", "tokens per batch", buckets=COUNT_BUCKETS, registry=registry
        )
        self.batch_texts = Histogram(
            "unpadded_batch_texts", "texts per batch", buckets=COUNT_BUCKETS, registry=registry
        )

    def watch(self, pipeline: EmbeddingPipeline, batcher: Batcher) -> None:
        """Report the pipeline's devices and the batcher's queue at every scrape."""
        backend = pipeline.backend
        devices = Gauge("unpadded_devices", "devices that accept batches", registry=self._registry)
        devices.set_function(lambda: backend.ready_devices)
        if isinstance(backend, Runner) and backend.device.type == "cuda":  # worker processes hold their own memory
            memory = Gauge("unpadded_gpu_memory_bytes", "GPU memory held by tensors", registry=self._registry)
            memory.set_function(partial(torch.cuda.memory_allocated, backend.device))
        calls = Gauge("unpadded_queued_requests", "requests waiting for a batch", registry=self._registry)
        calls.set_function(lambda: batcher.queued_calls)
        tokens = Gauge("unpadded_queued_tokens", "tokens waiting for a batch", registry=self._registry)
        tokens.set_function(lambda: batcher.queued_tokens)

    def observe_batch(self, texts: int, tokens: int, seconds: float) -> None:
        self.batch_texts.observe(texts)
        self.batch_tokens.observe(tokens)
        self.batch_seconds.observe(seconds)

    def observe_usage(self, usage: Usage) -> None:
        self.texts.inc(usage.texts)
        self.tokens.inc(usage.tokens)
        self.truncated.inc(usage.truncated)

    def observe_request(self, path: str, status: int, timing: Timing, encode_seconds: float, seconds: float) -> None:
        self.requests.labels(path, status).inc()
        if status != 200:
            return
        self.seconds.labels("tokenize").observe(timing.tokenize)
        self.seconds.labels("queue").observe(timing.queue)
        self.seconds.labels("inference").observe(timing.inference)
        self.seconds.labels("serialize").observe(encode_seconds)
        self.seconds.labels("total").observe(seconds)

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
