"""What the engine replica counts. Names are the field's own; Ray exports them with the prefix ``ray_``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ray.serve.metrics import Counter, Gauge, Histogram

from kvlink_core.engine import EngineStats
from kvlink_core.store.tiers import CacheStats
from serve.tier_metrics import TierMetrics
from serve.wire import Report

#: Seconds; fine below 100 ms, where a hot request lives.
LATENCY_BUCKETS = [0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 3, 5, 10, 20, 60]


class Metrics(Protocol):
    """Where a replica reports what happens."""

    def running(self, count: int) -> None:
        """Requests in this replica now, whatever they wait for."""
        ...

    def first_token(self, linker: str, seconds: float) -> None:
        """A request got its first token."""
        ...

    def lookup(self, *, requested_tokens: int, hit_tokens: Mapping[str, int], corrupt_payloads: int) -> None:
        """The documents of a request were resolved; ``hit_tokens`` by tier."""
        ...

    def tiers(self, stats: CacheStats) -> None:
        """What the tiers hold now, and did since start."""
        ...

    def finished(self, report: Report, seconds: float) -> None:
        """A request was answered to its end."""
        ...

    def failed(self, code: str) -> None:
        """A request was answered with an error."""
        ...

    def engine(self, stats: EngineStats) -> None:
        """The engine made a step. Called in its thread."""
        ...


class PrometheusMetrics:
    """``Metrics`` over Ray's exporter. Must be made inside a replica."""

    def __init__(self) -> None:
        self._running = Gauge("kvlink_requests_running", description="Requests that are computed now.")
        self._in_replica = Gauge(
            "kvlink_requests_in_replica",
            description="Requests that this replica has: computed, waiting for their turn, fetching documents.",
        )
        self._ttft = Histogram(
            "kvlink_time_to_first_token_seconds",
            description="From a request's arrival at the engine to its first token.",
            boundaries=LATENCY_BUCKETS,
            tag_keys=("linker",),
        )
        self._latency = Histogram(
            "kvlink_e2e_request_latency_seconds",
            description="From a request's arrival at the engine to its last token.",
            boundaries=LATENCY_BUCKETS,
            tag_keys=("linker",),
        )
        self._requested = Counter(
            "kvlink_lookup_requested_tokens_total", description="Document tokens that requests asked for."
        )
        self._hit = Counter(
            "kvlink_lookup_hit_tokens_total",
            description="Of these, tokens that were found, by where: device, host, disk, store.",
            tag_keys=("tier",),
        )
        self._recomputed = Counter(
            "kvlink_recomputed_tokens_total", description="Document tokens encoded while a request waited."
        )
        self._corrupt = Counter(
            "kvlink_corrupt_payloads_total", description="Stored payloads that were refused and computed again."
        )
        self._generated = Counter("kvlink_generation_tokens_total", description="Tokens generated.")
        self._failed = Counter(
            "kvlink_request_failures_total", description="Requests answered with an error.", tag_keys=("code",)
        )
        self._tiers = TierMetrics()

        self._waiting = Gauge(
            "kvlink_engine_waiting_requests",
            description="Requests in the engine that wait for their turn, or for memory.",
        )
        self._kv_used = Gauge(
            "kvlink_kv_used_bytes", description="Keys and values in memory; idle: kept while nothing else needs it.",
            tag_keys=("state",),
        )  # fmt: skip
        self._kv_limit = Gauge("kvlink_kv_limit_bytes", description="The most that keys and values may take.")
        self._preempted = Counter(
            "kvlink_preemptions_total", description="Requests that gave up their memory for a while."
        )
        self._preemptions = 0

    def running(self, count: int) -> None:
        """Requests in this replica now, whatever they wait for."""
        self._in_replica.set(count)

    def first_token(self, linker: str, seconds: float) -> None:
        """A request got its first token."""
        self._ttft.observe(seconds, tags={"linker": linker})

    def lookup(self, *, requested_tokens: int, hit_tokens: Mapping[str, int], corrupt_payloads: int) -> None:
        """The documents of a request were resolved. Zeros are not reported."""
        if requested_tokens:
            self._requested.inc(requested_tokens)
        for tier, tokens in hit_tokens.items():
            if tokens:
                self._hit.inc(tokens, tags={"tier": tier})
        recomputed = requested_tokens - sum(hit_tokens.values())
        if recomputed > 0:
            self._recomputed.inc(recomputed)
        if corrupt_payloads:
            self._corrupt.inc(corrupt_payloads)

    def tiers(self, stats: CacheStats) -> None:
        """What the tiers hold now, and did since start."""
        self._tiers.show(stats)

    def finished(self, report: Report, seconds: float) -> None:
        """A request was answered to its end."""
        self._latency.observe(seconds, tags={"linker": report.linker})
        if report.completion_tokens:
            self._generated.inc(report.completion_tokens)

    def failed(self, code: str) -> None:
        """A request was answered with an error."""
        self._failed.inc(1, tags={"code": code})

    def engine(self, stats: EngineStats) -> None:
        """The engine made a step."""
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._kv_used.set(stats.kv_used - stats.kv_idle, tags={"state": "active"})
        self._kv_used.set(stats.kv_idle, tags={"state": "idle"})
        self._kv_limit.set(stats.kv_limit)
        if stats.preemptions > self._preemptions:
            self._preempted.inc(stats.preemptions - self._preemptions)
            self._preemptions = stats.preemptions
