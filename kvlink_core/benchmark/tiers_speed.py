"""Whether choosing between loading and computing is ever slower than always doing the one or the other."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from kvlink_core.compress import EncodedDocument
from kvlink_core.encode import DocumentEncoder
from kvlink_core.errors import PayloadError
from kvlink_core.models import LoadedModel
from kvlink_core.store import CatalogRow, DocumentStore
from kvlink_core.store.resolver import DocumentResolver
from kvlink_core.store.tiers import TierSettings
from kvlink_core.types import DocumentRef

T = TypeVar("T")

#: Bytes a second and seconds a round of the stores that are tried by default, from a distant one to a local disk.
LINKS = ((5e6, 0.1), (12e6, 0.05), (20e6, 0.05), (50e6, 0.02), (100e6, 0.02), (500e6, 0.005), (2e9, 0.001))


@dataclass(frozen=True, slots=True)
class SpeedSettings:
    """What is measured.

    Attributes:
        links: bandwidth in bytes a second, and latency in seconds, of each store.
        codec: of the stores.
        documents: in each store, their lengths spread between the two of ``tokens``.
        tokens: the shortest and the longest.
        each: documents of a request.
        warmup: the least requests that are not counted, in which ``auto`` learns; together they name each document.
        runs: requests that are counted, each made in all three ways, one after the other.
    """

    links: Sequence[tuple[float, float]] = LINKS
    codec: str = "raw"
    documents: int = 24
    tokens: tuple[int, int] = (60, 240)
    each: int = 4
    warmup: int = 5
    runs: int = 9


class SpeedRow(BaseModel):
    """One store.

    Attributes:
        bytes_per_s, latency_s: of the store.
        load_s, compute_s, auto_s: seconds of each run, until all caches of a request are there.
        loaded: part of the documents that ``auto`` loaded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes_per_s: float
    latency_s: float
    load_s: list[float]
    compute_s: list[float]
    auto_s: list[float]
    loaded: float

    @property
    def medians(self) -> tuple[float, float, float]:
        """Of always loading, always computing, and choosing."""
        return statistics.median(self.load_s), statistics.median(self.compute_s), statistics.median(self.auto_s)

    @property
    def ratio(self) -> float:
        """Choosing against the better of the other two, medians of both."""
        load, compute, auto = self.medians
        return auto / min(load, compute)


class ThrottledStore(DocumentStore):
    """A store behind a link of a given speed. A round takes at least the latency and what its bytes take."""

    def __init__(self, store: DocumentStore, bytes_per_s: float, latency_s: float) -> None:
        self.__dict__.update(store.__dict__)
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s

    def load_encoded(self, rows: Sequence[CatalogRow]) -> list[EncodedDocument | PayloadError]:
        """See ``DocumentStore``."""
        return self._throttled(sum(row.nbytes for row in rows), lambda: super(ThrottledStore, self).load_encoded(rows))

    def token_ids(self, rows: Sequence[CatalogRow]) -> list[list[int]]:
        """See ``DocumentStore``."""
        return self._throttled(4 * sum(row.tokens for row in rows), lambda: super(ThrottledStore, self).token_ids(rows))

    def _throttled(self, nbytes: int, work: Callable[[], T]) -> T:
        due = time.perf_counter() + self._latency_s + nbytes / self._bytes_per_s
        result = work()
        time.sleep(max(0.0, due - time.perf_counter()))
        return result


def measure_speed(
    model: LoadedModel,
    directory: Path,
    settings: SpeedSettings,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[SpeedRow]:
    """Ask for documents by id, nothing being kept between requests.

    Args:
        model: computes.
        directory: for the store; must not exist.
        settings: see there.
        progress: told what is being measured.
    """
    rng = random.Random(0)
    shortest, longest = settings.tokens
    lengths = [shortest + (longest - shortest) * i // max(1, settings.documents - 1) for i in range(settings.documents)]
    vocabulary = model.network.get_input_embeddings().num_embeddings
    texts = {f"d{i}": [rng.randrange(vocabulary) for _ in range(n)] for i, n in enumerate(lengths)}
    encoder = DocumentEncoder(model)
    rows: list[SpeedRow] = []
    with DocumentStore.open(str(directory), fingerprint=model.fingerprint, create=True, codec=settings.codec) as store:
        store.commit(store.write_shard(list(zip(texts, encoder.encode(list(texts.values())), strict=True))))
        for number, link in enumerate(settings.links):
            progress(f"{link[0] / 1e6:g} MB/s, {link[1] * 1e3:g} ms", number, len(settings.links))
            rows.append(_measure_link(model, encoder, ThrottledStore(store, *link), link, texts, settings, rng))
    return rows


def _measure_link(
    model: LoadedModel,
    encoder: DocumentEncoder,
    store: ThrottledStore,
    link: tuple[float, float],
    texts: dict[str, list[int]],
    settings: SpeedSettings,
    rng: random.Random,
) -> SpeedRow:
    # Without memory for caches, so that every request has to load or to compute.
    always = DocumentResolver(model, store, TierSettings(recompute="never", timeout_s=120.0), refresh_after=3600.0)
    auto = DocumentResolver(model, store, TierSettings(recompute="auto", timeout_s=120.0), refresh_after=3600.0)
    times: dict[str, list[float]] = {"load": [], "compute": [], "auto": []}
    with closing(always), closing(auto):
        auto.calibrate()
        before = auto.counters.as_dict()
        met = rng.sample(list(texts), len(texts))
        for run in range(-max(settings.warmup, -(-len(met) // settings.each)), settings.runs):
            first = -run * settings.each % len(met)
            names = rng.sample(met, settings.each) if run >= 0 else (met + met)[first : first + settings.each]
            refs = [DocumentRef(name) for name in names]
            ways: dict[str, Callable[[], object]] = {
                "load": lambda refs=refs: always.load(always.lookup(refs)),  # type: ignore[misc]
                "compute": lambda names=names: encoder.encode([texts[n] for n in names]),  # type: ignore[misc]
                "auto": lambda refs=refs: auto.load(auto.lookup(refs)),  # type: ignore[misc]
            }
            if run == 0:
                before = auto.counters.as_dict()
            for name in rng.sample(list(ways), len(ways)):
                started = time.perf_counter()
                ways[name]()
                if run >= 0:
                    times[name].append(time.perf_counter() - started)
        hits = auto.counters.as_dict()["documents_hit"] - before["documents_hit"]
    return SpeedRow(
        bytes_per_s=link[0],
        latency_s=link[1],
        load_s=times["load"],
        compute_s=times["compute"],
        auto_s=times["auto"],
        loaded=hits / max(1, settings.runs * settings.each),
    )
