"""What the tiers of an engine replica hold and did, for Prometheus."""

from __future__ import annotations

from ray.serve.metrics import Counter, Gauge

from kvlink_core.store.tiers import CacheStats

#: How the circuit breaker's state is drawn.
CIRCUIT = {"closed": 0.0, "half-open": 0.5, "open": 1.0}


class _Total:
    """A counter that is told totals, not steps."""

    def __init__(self, name: str, description: str, tag: str | None = None) -> None:
        self._counter = Counter(name, description=description, tag_keys=(tag,) if tag else ())
        self._tag = tag
        self._before: dict[str, int] = {}

    def rise_to(self, total: int, value: str = "") -> None:
        step = total - self._before.get(value, 0)
        if step > 0:
            self._counter.inc(step, tags={self._tag: value} if self._tag else {})
            self._before[value] = total


class TierMetrics:
    """Must be made inside a replica."""

    def __init__(self) -> None:
        self._capacity = Gauge("kvlink_tier_capacity_bytes", description="Size of a tier.", tag_keys=("tier",))
        self._nbytes = Gauge("kvlink_tier_bytes", description="Bytes in use of a tier.", tag_keys=("tier",))
        self._documents = Gauge("kvlink_tier_documents", description="Documents in a tier.", tag_keys=("tier",))
        self._evictions = _Total("kvlink_tier_evictions_total", "Documents that made room for others.", "tier")
        self._refused = _Total("kvlink_tier_refused_total", "Documents for which a tier had no room.", "tier")
        self._loaded = _Total("kvlink_loaded_bytes_total", "Bytes of K and V read, as stored.", "source")
        self._computed = _Total(
            "kvlink_computed_because_faster_total", "Stored documents computed because that was expected to be faster."
        )
        self._late = _Total(
            "kvlink_computed_because_late_total", "Stored documents computed because loading took longer than that."
        )
        self._failures = _Total("kvlink_store_failures_total", "Times that the store failed, or was too slow.")
        self._circuit = Gauge(
            "kvlink_store_circuit_open", description="1 while the store is left alone, 0.5 while it is tried, else 0."
        )

    def show(self, stats: CacheStats) -> None:
        """Show them as they are now."""
        for name, tier in stats.tiers.items():
            self._capacity.set(tier.capacity, tags={"tier": name})
            self._nbytes.set(tier.nbytes, tags={"tier": name})
            self._documents.set(tier.documents, tags={"tier": name})
            self._evictions.rise_to(tier.evictions, name)
            self._refused.rise_to(tier.refused, name)
        for source, read in stats.read.items():
            self._loaded.rise_to(read.nbytes, source)
        self._computed.rise_to(stats.computed)
        self._late.rise_to(stats.late)
        self._failures.rise_to(stats.failures)
        self._circuit.set(CIRCUIT[stats.circuit])
