"""Request ids on log lines, and spans."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serve import logs
from serve.settings import TracingSettings
from serve.tracing import NoTracer, SpanTracer, make_tracer
from serve.wire import EngineRequest, Report, WireSampling


@pytest.fixture
def stamped(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    make, core = logging.getLogRecordFactory(), logging.getLogger("kvlink_core")
    handlers, propagate = list(core.handlers), core.propagate
    logs.install()
    logs.install()
    core.handlers, core.propagate = [], True
    yield caplog
    logging.setLogRecordFactory(make)
    core.handlers, core.propagate = handlers, propagate


def test_lines_of_a_request_have_its_id_and_others_are_left_alone(stamped: pytest.LogCaptureFixture) -> None:
    token = logs.REQUEST_ID.set("abc-1")
    logging.getLogger("kvlink_core.store.resolver").warning("payload %r refused", "x")
    logging.getLogger("somebody.else").warning("100 % of it")
    logging.getLogger("ray.serve").warning("answered")
    logs.REQUEST_ID.reset(token)
    logging.getLogger("kvlink_core").warning("no request")
    found = [(r.name, getattr(r, "request_id", None)) for r in stamped.records]
    assert [f for f in found if f[0] != "ray.serve"] == [
        ("kvlink_core.store.resolver", "abc-1"),
        ("somebody.else", None),
        ("kvlink_core", None),
    ]
    assert [f[1] for f in found if f[0] == "ray.serve"] in ([], ["abc-1"])  # propagates, unless Serve has set it up


def test_core_lines_go_where_serve_s_go(stamped: pytest.LogCaptureFixture) -> None:
    serve, core = logging.getLogger("ray.serve"), logging.getLogger("kvlink_core")
    handler = logging.NullHandler()
    serve.addHandler(handler)
    try:
        logs.install()
        assert handler in core.handlers
        assert core.handlers.count(handler) == 1
    finally:
        serve.removeHandler(handler)


def test_spans_of_a_request() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    sampling = WireSampling(temperature=0.0, top_p=1.0, top_k=0, seed=None, max_tokens=4, stop=())
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    request = EngineRequest("r", (), (), None, sampling, True, traceparent=f"00-{trace}-{parent}-01")
    phases = (("lookup", 0.01), ("load", 0.02), ("link", 0.03), ("prefill", 0.04))
    report = Report("full", 9, 3, 5, 4, 0.15, phases, ())
    SpanTracer(provider).answered(request, report, 0.4)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"kvlink.request", "lookup", "load", "link", "prefill", "decode"}
    root = spans["kvlink.request"]
    assert f"{root.context.trace_id:032x}" == trace
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == parent
    assert root.attributes is not None
    assert root.attributes["kvlink.request_id"] == "r"

    def between(name: str) -> tuple[float, float]:
        start, end = spans[name].start_time, spans[name].end_time
        assert start is not None
        assert end is not None
        assert root.start_time is not None
        return (start - root.start_time) / 1e9, (end - root.start_time) / 1e9

    # 0.05 s of waiting, then the phases, the first token at 0.15 s, and the rest of the answer.
    for name, times in {"lookup": (0.05, 0.06), "prefill": (0.11, 0.15), "decode": (0.15, 0.4)}.items():
        assert between(name) == pytest.approx(times, abs=1e-6)
    assert {span.parent.span_id for name, span in spans.items() if span.parent and name != root.name} == {
        root.context.span_id
    }


def test_tracing_is_off_unless_an_endpoint_is_set() -> None:
    assert isinstance(make_tracer(TracingSettings()), NoTracer)
    assert isinstance(make_tracer(TracingSettings(endpoint="http://127.0.0.1:1/v1/traces", sample=0.0)), SpanTracer)
