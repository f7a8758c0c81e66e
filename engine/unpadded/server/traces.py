"""OpenTelemetry spans of requests, sent to a collector where one was named."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from unpadded.errors import OptionError


class Traces:
    """Turns what is known of an answered request into a span. Without an endpoint it does nothing."""

    def __init__(self, endpoint: str | None) -> None:
        self._provider: Any = None
        if endpoint is None:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError as error:
            raise OptionError(f"traces need more packages: {error}; pip install 'unpadded[traces]'") from error
        exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces")
        self._provider = TracerProvider(resource=Resource.create({"service.name": "unpadded"}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("unpadded")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, name: str, headers: Mapping[str, str], seconds: float, attributes: Mapping[str, Any]) -> None:
        """A span that ends now, under the caller's where a traceparent header names one."""
        if self._provider is None:
            return
        end = time.time_ns()
        context = self._propagator.extract(headers)
        span = self._tracer.start_span(
            name, context=context, start_time=end - int(seconds * 1e9), attributes=dict(attributes)
        )
        span.end(end_time=end)

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()
