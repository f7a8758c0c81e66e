"""Prometheus metrics."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from unpadded.execution.batcher import Timing

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
COUNT_BUCKETS = tuple(2**power for power in range(4, 18))


@dataclass
class Usage(Timing):
    """Counts and seconds of one request, for its response, the metrics and the log. `Service` adds to them."""

    texts: int = 0
    characters: int = 0
    tokens: int = 0
    truncated: int = 0
    encode: float = 0.0  # seconds

    def as_json(self) -> dict[str, int]:
        """Return OpenAI's `usage`, and the number of texts that were truncated, which OpenAI's API does not have."""
        return {"prompt_tokens": self.tokens, "total_tokens": self.tokens, "truncated_texts": self.truncated}


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter = partial(Counter, namespace="unpadded", registry=self._registry)
        histogram = partial(Histogram, namespace="unpadded", registry=self._registry)
        self.requests = counter("requests", "requests answered", ["path", "status"])
        self.errors = counter("errors", "requests answered with an error", ["kind"])
        self.disconnects = counter("disconnects", "clients that disconnected before the response")
        self.texts = counter("texts", "texts embedded, and pairs scored", ["model"])
        self.tokens = counter("tokens", "tokens of texts and pairs", ["model"])
        self.truncated = counter("truncated_texts", "texts that were truncated", ["model"])
        self.seconds = histogram("request_seconds", "seconds per stage", ["stage"], buckets=SECONDS_BUCKETS)
        self.batch_seconds = histogram("batch_seconds", "seconds per batch", buckets=SECONDS_BUCKETS)
        self.batch_tokens = histogram("batch_tokens", "tokens per batch", buckets=COUNT_BUCKETS)
        self.batch_texts = histogram("batch_texts", "texts per batch", buckets=COUNT_BUCKETS)

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Report a value that is read at every scrape."""
        Gauge(name, text, namespace="unpadded", registry=self._registry).set_function(read)

    def observe_batch(self, texts: int, tokens: int, seconds: float) -> None:
        self.batch_texts.observe(texts)
        self.batch_tokens.observe(tokens)
        self.batch_seconds.observe(seconds)

    def observe_request(self, path: str, status: int, model: str, usage: Usage, seconds: float) -> None:
        self.requests.labels(path, status).inc()
        if status == 200:
            self.texts.labels(model).inc(usage.texts)
            self.tokens.labels(model).inc(usage.tokens)
            self.truncated.labels(model).inc(usage.truncated)
            stages = {"tokenize": usage.tokenize, "queue": usage.queue, "inference": usage.inference}
            for stage, taken in (stages | {"serialize": usage.encode, "total": seconds}).items():
                self.seconds.labels(stage).observe(taken)

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
