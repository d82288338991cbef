"""What is asked of the tiers, and what comes back."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from kvlink_core.errors import PayloadError, StoreUnavailableError
from kvlink_core.store.rows import CatalogRow
from kvlink_core.store.tiers.key import CacheKey
from kvlink_core.store.tiers.planner import Source
from kvlink_core.types import DocumentCache

#: Where a cache was, the fastest first.
Tier = Literal["device", "host", "disk", "store"]
TIERS: tuple[Tier, ...] = ("device", "host", "disk", "store")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A document.

    Attributes:
        key: its row's; that of a computed cache for one that the store does not have.
        row: where the store has it, if it does.
        tokens: its length.
        computable: whether its token ids are known.
    """

    key: CacheKey
    row: CatalogRow | None
    tokens: int
    computable: bool


@dataclass(frozen=True, slots=True)
class Found:
    """A cache and where it was; or, without a cache, why it has to be computed.

    Attributes:
        cache: read-only; it must not be kept once the linker is done, since that would pin it.
        tier: where it was.
        refused: the stored payload must not be served.
        unavailable: the store did not answer, or not soon enough, or is not asked just now.

    With none of them it was chosen to be computed, or is not stored.
    """

    cache: DocumentCache | None = None
    tier: Tier | None = None
    refused: PayloadError | None = None
    unavailable: StoreUnavailableError | None = None


@dataclass(slots=True, eq=False)
class Round:
    """Documents that are read together.

    Attributes:
        started: when, on the clock of ``time.monotonic``.
        nbytes: of all of them, as stored.
        slow: whether nobody waits for it who can compute instead: because somebody has stopped waiting, or because it
            is only to see how fast the source is by now.
    """

    started: float
    nbytes: int
    slow: bool = False


@dataclass(slots=True, eq=False)
class Flight:
    """A document on its way here, for everybody who wants it.

    It lands in two steps: ``found`` is set as soon as the cache can be used, and the flight ends once it is kept.
    """

    wanted: Wanted
    row: CatalogRow
    source: Source
    round: Round
    found: Future[Found] = field(default_factory=Future)

    def land(self, found: Found) -> None:
        """Let those who wait go on. What comes later, from a read that had been given up, changes nothing."""
        with suppress(InvalidStateError):
            self.found.set_result(found)


@dataclass(slots=True)
class Trip:
    """What one request set in motion.

    Attributes:
        found: what is known already.
        flights: what is waited for.
        avoided: how many could be loaded, and are to be computed because that is faster.
    """

    found: dict[CacheKey, Found] = field(default_factory=dict)
    flights: dict[CacheKey, Flight] = field(default_factory=dict)
    avoided: int = 0
