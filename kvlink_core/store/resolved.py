"""The documents of a request: looked up, loaded, and counted."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Literal

from kvlink_core.store.rows import CatalogRow
from kvlink_core.store.tiers import TIERS, Tier

#: Where a cache came from.
Origin = Tier | Literal["encoded", "reencoded-corrupt"]


@dataclass(frozen=True, slots=True)
class ResolvedDocument:
    """Where a document's cache came from. ``origin`` is None while nothing was loaded for it (linker ``full``)."""

    id: str | None
    tokens: int
    origin: Origin | None

    @property
    def hit(self) -> bool:
        """Whether it was there, in whichever tier, and had not to be computed."""
        return self.origin in TIERS


@dataclass(slots=True)
class Lookup:
    """The documents of one request, found but not yet loaded.

    ``token_ids`` is known for documents sent as text and filled in for the others when they are loaded.
    """

    ids: list[str | None]
    rows: list[CatalogRow | None]
    token_ids: list[list[int] | None]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        pairs = zip(self.rows, self.token_ids, strict=True)
        return [len(t) if t is not None else row.tokens if row else 0 for row, t in pairs]


@dataclass(slots=True)
class Counters:
    """What happened since start. Read at any time; changed under a lock."""

    documents_hit: int = 0
    documents_encoded: int = 0
    corrupt_payloads: int = 0
    requested_tokens: int = 0
    hit_tokens: int = 0
    hit_tokens_device: int = 0
    hit_tokens_host: int = 0
    hit_tokens_disk: int = 0
    hit_tokens_store: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **amounts: int) -> None:
        """Add to several counters at once."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def as_dict(self) -> dict[str, int]:
        """A consistent copy."""
        with self._lock:
            return {n: getattr(self, n) for n in self.__slots__ if not n.startswith("_")}
