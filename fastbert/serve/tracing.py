"""OpenTelemetry spans: one a request, with its stages as attributes, below the caller's `traceparent`. An extra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from fastbert.serve.call import Call


class Tracer:
    """Sends spans to an OTLP endpoint."""

    def __init__(self, service_name: str, exporter: SpanExporter) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("fastbert.serve")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str, service_name: str) -> Tracer:
        """Spans go to a collector that speaks OTLP over gRPC, such as `http://localhost:4317`."""
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return cls(service_name, OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https")))

    def begin(self, call: Call) -> Any:
        """Start a request's span."""
        parent = self._propagator.extract(call.sent)
        attributes = {"http.request.method": call.method, "url.path": call.path, "request.id": call.id}
        name = f"{call.method} {call.path}"
        return self._tracer.start_span(name, parent, kind=trace.SpanKind.SERVER, attributes=attributes)

    def end(self, span: Any, call: Call, status: int) -> None:
        """Finish it."""
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("fastbert.tokens", call.tokens)
        for stage, seconds in call.stages.items():
            span.set_attribute(f"fastbert.{stage}_ms", seconds * 1e3)
        if status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
