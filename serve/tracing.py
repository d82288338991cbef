"""OpenTelemetry traces: one span for a request in the engine, and below it lookup, load, link, prefill and decode.

The spans are made when the answer is finished, from the times that were measured anyway, so tracing costs nothing
while tokens are computed. The extra ``otel`` brings what this needs.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

from kvlink_core.errors import ConfigError
from serve.settings import TracingSettings
from serve.wire import EngineRequest, Report


class Tracer(Protocol):
    """Where finished requests are traced."""

    def answered(self, request: EngineRequest, report: Report, seconds: float) -> None:
        """A request was answered, just now, after ``seconds`` in the engine."""
        ...


class NoTracer:
    """Traces nothing."""

    def answered(self, request: EngineRequest, report: Report, seconds: float) -> None:
        """Nothing."""


class SpanTracer:
    """Traces to an OpenTelemetry tracer provider.

    Args:
        provider: of ``opentelemetry.sdk.trace``.
    """

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("kvlink")
        self._child_of = set_span_in_context
        self._extract = TraceContextTextMapPropagator().extract

    def answered(self, request: EngineRequest, report: Report, seconds: float) -> None:
        """Make the spans of one request. Its trace is that of the caller, if the caller sent one."""
        parent = self._extract({"traceparent": request.traceparent}) if request.traceparent else None
        ended = time.time_ns()
        started = ended - _ns(seconds)
        span = self._tracer.start_span("kvlink.request", context=parent, start_time=started)
        span.set_attributes(
            {
                "kvlink.request_id": request.request_id,
                "kvlink.linker": report.linker,
                "kvlink.prompt_tokens": report.prompt_tokens,
                "kvlink.cached_tokens": report.cached_tokens,
                "kvlink.computed_tokens": report.computed_tokens,
                "kvlink.completion_tokens": report.completion_tokens,
                "kvlink.time_to_first_token_s": report.ttft_s,
            }
        )
        below = self._child_of(span)
        first_token = started + _ns(report.ttft_s)
        # What came before the first phase was waiting.
        at = first_token - _ns(sum(s for _, s in report.phases_s))
        for name, length in (*report.phases_s, ("decode", seconds - report.ttft_s)):
            self._tracer.start_span(name, context=below, start_time=at).end(at + _ns(length))
            at += _ns(length)
        span.end(ended)


def make_tracer(settings: TracingSettings) -> Tracer:
    """The tracer that the settings ask for.

    Raises:
        ConfigError: an endpoint is set and the extra ``otel`` is not installed.
    """
    if settings.endpoint is None:
        return NoTracer()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    except ImportError as error:
        raise ConfigError(
            "tracing.endpoint is set and OpenTelemetry is not installed: pip install 'kvlink[otel]'.",
            param="tracing.endpoint",
        ) from error
    provider = TracerProvider(
        resource=Resource.create({"service.name": "kvlink"}), sampler=ParentBased(TraceIdRatioBased(settings.sample))
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=settings.endpoint)))
    return SpanTracer(provider)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
