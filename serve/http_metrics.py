"""What the ingress counts: times as a client sees them, requests by route and status."""

from __future__ import annotations

from typing import Protocol

from ray.serve.metrics import Counter, Gauge, Histogram

#: Seconds; fine below 100 ms, where a hot request lives.
LATENCY_BUCKETS = [0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 3, 5, 10, 20, 60]


class HttpMetrics(Protocol):
    """Where an ingress reports what happens."""

    def waiting(self, change: int) -> None:
        """One more, or one fewer, waits for its first token."""
        ...

    def first_token(self, seconds: float) -> None:
        """A request got its first token, so long after it came."""
        ...

    def between_tokens(self, seconds: float) -> None:
        """A stream got its next piece."""
        ...

    def broken(self, code: str) -> None:
        """A stream ended with an error event."""
        ...

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request has its response; a streamed one to its end."""
        ...


class NoHttpMetrics:
    """Counts nothing."""

    def waiting(self, change: int) -> None:
        """Nothing."""

    def first_token(self, seconds: float) -> None:
        """Nothing."""

    def between_tokens(self, seconds: float) -> None:
        """Nothing."""

    def broken(self, code: str) -> None:
        """Nothing."""

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Nothing."""


class PrometheusHttpMetrics:
    """``HttpMetrics`` over Ray's exporter. Must be made inside a replica."""

    def __init__(self) -> None:
        self._count = 0
        self._waiting = Gauge("kvlink_requests_waiting", description="Requests without a first token yet.")
        self._ttft = Histogram(
            "kvlink_http_time_to_first_token_seconds",
            description="From a request's arrival at the ingress to its first token there.",
            boundaries=LATENCY_BUCKETS,
        )
        self._itl = Histogram(
            "kvlink_inter_token_latency_seconds",
            description="Between two pieces of a stream at the ingress.",
            boundaries=[0.001, 0.002, *LATENCY_BUCKETS],
        )
        self._latency = Histogram(
            "kvlink_http_request_latency_seconds",
            description="From a request's arrival at the ingress to the end of its response.",
            boundaries=LATENCY_BUCKETS,
            tag_keys=("route",),
        )
        self._requests = Counter(
            "kvlink_http_requests_total", description="Requests answered.", tag_keys=("route", "status")
        )
        self._broken = Counter(
            "kvlink_streams_broken_total", description="Streams that ended with an error event.", tag_keys=("code",)
        )

    def waiting(self, change: int) -> None:
        """One more, or one fewer, waits for its first token."""
        self._count += change
        self._waiting.set(self._count)

    def first_token(self, seconds: float) -> None:
        """A request got its first token, so long after it came."""
        self._ttft.observe(seconds)

    def between_tokens(self, seconds: float) -> None:
        """A stream got its next piece."""
        self._itl.observe(seconds)

    def broken(self, code: str) -> None:
        """A stream ended with an error event."""
        self._broken.inc(1, tags={"code": code})

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request has its response; a streamed one to its end."""
        self._requests.inc(1, tags={"route": route, "status": str(status)})
        self._latency.observe(seconds, tags={"route": route})
