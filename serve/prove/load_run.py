"""Load at parts of what the service can do, for minutes each: latencies, statuses, and whether memory stays flat."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from serve.prove.clients import Askers, Outcome, judge
from serve.prove.material import make_documents, make_model, make_questions, store_documents
from serve.prove.service import Service, running

_MAX_RUNNING, _MAX_TOKENS = 8, 32

#: The most by which memory may grow from a fifth of a run to its end, as the issue of these proofs has it.
MOST_DRIFT = 0.02

_SETTINGS = {"engine.num_cpus": 1, "engine.torch_threads": 1, "engine.max_running": _MAX_RUNNING}


@dataclass(frozen=True, slots=True)
class Memory:
    """What one process held, in bytes: the mean of the second fifth of a run, and of its last tenth."""

    process: str
    begin: float
    end: float

    @property
    def drift(self) -> float:
        """By how much of itself it grew."""
        return self.end / self.begin - 1


@dataclass(slots=True)
class LoadResult:
    """What one rate did.

    Attributes:
        share: of capacity.
        rate: requests a second, on average.
        seconds: for so long.
        sent, right, wrong: requests, and of these those answered with the oracle's tokens, or others.
        errors, lost: clear errors and what is none, by code.
        ttft_ms: p50, p95, p99 of the time to first token.
        itl_ms: p50, p99 of the time between pieces of text.
        e2e_ms: p50, p95, p99 of whole answers.
        goodput: right answers a second that kept both promises (see ``prove_load``).
        memory: of each process.
        faults: conditions that do not hold, in words.
    """

    share: float
    rate: float
    seconds: float
    sent: int = 0
    right: int = 0
    wrong: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    ttft_ms: list[float] = field(default_factory=list)
    itl_ms: list[float] = field(default_factory=list)
    e2e_ms: list[float] = field(default_factory=list)
    goodput: float = 0.0
    memory: list[Memory] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def prove_load(
    shares: Sequence[float],
    *,
    seconds: float,
    capacity_s: float,
    ttft_s: float,
    itl_s: float,
    seed: int,
    say: Callable[[str], None],
) -> tuple[float, list[LoadResult]]:
    """Start a service over a store of its own, measure its capacity, and load it. Returns both findings.

    Args:
        shares: of capacity, one run each.
        seconds: that each run takes.
        capacity_s: for how long capacity is measured, by a closed loop of twice as many clients as places.
        ttft_s, itl_s: promises: an answer counts for goodput if its first token and, on average, the others kept them.
        seed: of questions and arrivals.
        say: told what is done.

    Raises:
        ProofError: the service does not start.
    """
    with tempfile.TemporaryDirectory(prefix="kvlink-proof-") as name:
        folder = Path(name)
        say("the model, the documents, and the oracle's answers")
        model = make_model(folder / "model", small=False)
        documents = make_documents(100, sentences=12)
        store_documents(model, str(folder / "store"), documents, options=None, per_shard=10)
        questions = make_questions(
            model, documents, 60, per_request=3, zipf=1.1, max_tokens=(16, _MAX_TOKENS), seed=seed
        )
        say("the service")
        settings = {"model": str(folder / "model"), "store": str(folder / "store"), **_SETTINGS}
        with running(folder, settings, engines=1) as service:
            model_name = service.model()

            async def run() -> tuple[float, list[LoadResult]]:
                limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
                async with httpx.AsyncClient(base_url=service.url, limits=limits, timeout=None) as client:
                    askers = Askers(client, model_name, questions, seed=seed)
                    await askers.each_once()
                    capacity = await askers.closed_loop(2 * _MAX_RUNNING, capacity_s)
                    say(f"capacity: {capacity:.2f} answers a second")
                    results = []
                    for share in shares:
                        say(f"{share:g} of it for {seconds:g} s")
                        askers.outcomes = []
                        result = LoadResult(share, share * capacity, seconds)
                        samples = await _load(service, askers, result.rate, seconds)
                        sum_up(result, askers.outcomes, samples, ttft_s, itl_s)
                        say(f"   {'; '.join(result.faults) or 'holds'}")
                        results.append(result)
                    return capacity, results

            return asyncio.run(run())


async def _load(service: Service, askers: Askers, rate: float, seconds: float) -> list[dict[str, int]]:
    """Load for so long; what each process held, about once a second."""
    stop = asyncio.Event()
    load = asyncio.create_task(askers.open_loop(rate, stop))
    samples: list[dict[str, int]] = []
    ends = asyncio.get_running_loop().time() + seconds
    while (left := ends - asyncio.get_running_loop().time()) > 0:
        samples.append(await asyncio.to_thread(service.resident))
        await asyncio.sleep(min(1.0, left))
    stop.set()
    await load
    return samples


def sum_up(
    result: LoadResult, outcomes: Sequence[Outcome], samples: Sequence[dict[str, int]], ttft_s: float, itl_s: float
) -> None:
    """Fill in what was seen and which conditions do not hold."""
    right = [o for o in outcomes if o.kind == "right"]
    result.sent = len(outcomes)
    judge(result, outcomes)
    first = [o.ttft_s for o in right if o.ttft_s is not None]
    result.ttft_ms = percentiles(first, (50, 95, 99))
    result.itl_ms = percentiles([gap for o in right for gap in o.gaps_s], (50, 99))
    result.e2e_ms = percentiles([o.total_s for o in right], (50, 95, 99))
    kept = [o for o in right if (o.ttft_s or 0) <= ttft_s and (not o.gaps_s or statistics.mean(o.gaps_s) <= itl_s)]
    result.goodput = len(kept) / result.seconds
    result.memory = _memory(samples)
    if result.share < 1 and result.errors:
        result.faults.append(f"{sum(result.errors.values())} errors below capacity")
    if others := [code for code in result.errors if not code.startswith("503 ")]:
        result.faults.append(f"errors other than 503: {', '.join(others)}")
    result.faults += [f"{m.process} grew by {m.drift:.1%}" for m in result.memory if m.drift >= MOST_DRIFT]


def _memory(samples: Sequence[dict[str, int]]) -> list[Memory]:
    """Of the processes that were there all along."""
    found: list[Memory] = []
    count = len(samples)
    for process in samples[0] if samples else ():
        with suppress(KeyError, statistics.StatisticsError):
            begin = statistics.mean(sample[process] for sample in samples[count // 5 : max(1, 2 * count // 5)])
            end = statistics.mean(sample[process] for sample in samples[9 * count // 10 :])
            found.append(Memory(process, begin, end))
    return found


def percentiles(seconds: Sequence[float], which: Sequence[int]) -> list[float]:
    """In milliseconds, by nearest rank; none of nothing."""
    ordered = sorted(seconds)
    return [1000 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in which] if ordered else []
