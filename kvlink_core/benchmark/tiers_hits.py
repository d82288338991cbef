"""How often a cache of some size has what is asked for, by policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from pydantic import BaseModel, ConfigDict

from kvlink_core.benchmark.tiers_policies import POLICIES
from kvlink_core.benchmark.tiers_traces import Trace


class HitRow(BaseModel):
    """One policy at one size over one trace.

    Attributes:
        trace: its name.
        share: size of the cache, as a part of all tokens that are asked for again.
        policy: its name.
        documents: requests that count.
        document_hits: of these, those that hit, as a part.
        token_hits: the same, each request counted with its tokens: what a cache saves is computing tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    trace: str
    share: float
    policy: str
    documents: int
    document_hits: float
    token_hits: float


def simulate(trace: Trace, share: float, policy: str) -> HitRow:
    """Ask one policy for a whole trace, beginning empty."""
    cache = POLICIES[policy](int(share * trace.total), trace.keys)
    hits = asked = hit_tokens = tokens = 0
    for key in trace.keys:
        size = trace.sizes[key]
        hit = cache.ask(key, size)
        if key < trace.once:
            asked += 1
            tokens += size
            hits += hit
            hit_tokens += size if hit else 0
    return HitRow(
        trace=trace.name,
        share=share,
        policy=policy,
        documents=asked,
        document_hits=hits / max(1, asked),
        token_hits=hit_tokens / max(1, tokens),
    )


def measure_hits(
    traces: Iterable[tuple[Trace, Sequence[float]]],
    policies: Sequence[str] = tuple(POLICIES),
    progress: Callable[[str, int], None] = lambda name, done: None,
) -> list[HitRow]:
    """Every policy over every trace at each of its sizes."""
    rows: list[HitRow] = []
    for trace, shares in traces:
        for share in shares:
            rows += [simulate(trace, share, policy) for policy in policies]
            progress(trace.name, len(rows))
    return rows
