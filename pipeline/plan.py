"""What there is to do: the scanned corpus against the catalog. Pure, on the driver, small columns only.

The driver holds about 400 bytes for each chunk here (a million chunks of 512 tokens are 65 TB of caches of an 8B
model, so the driver is not what ends first).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, TypeVar

from kvlink_core.chunking import CHUNK_SEPARATOR
from kvlink_core.errors import CorpusError, DuplicateDocumentError, KVLinkError
from kvlink_core.template import id_at_place, without_place
from pipeline.summary import Failure, Summary

T = TypeVar("T")


class CatalogLike(Protocol):
    """The part of ``DocumentStore`` that planning asks."""

    def lookup(self, document_ids: Sequence[str]) -> Mapping[str, Any]:
        """Catalog rows by document id."""

    def lookup_tokens(self, token_digests: Sequence[str]) -> Mapping[str, Any]:
        """Catalog rows by token digest."""

    def alias(self, document_id: str, row: Any) -> Any:
        """A row that gives another id the same payload."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk as the scan saw it, its tokens left out. ``ticket`` names its row in the scan."""

    id: str
    document_id: str
    place: str
    digest: str
    tokens: int
    ticket: bytes


@dataclass(slots=True)
class Plan:
    """What to do, in three lots.

    Attributes:
        encode: the pieces to compute, by token digest: one for each distinct text.
        followers: ids of further chunks with the same tokens as one to be computed, by token digest.
        aliases: catalog rows that can be committed at once: ids whose tokens the store has under another id.
    """

    encode: dict[str, Piece] = field(default_factory=dict)
    followers: dict[str, list[str]] = field(default_factory=dict)
    aliases: list[Any] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens to compute."""
        return sum(p.tokens for p in self.encode.values())


class Planner:
    """Collects the scan, then compares it with the catalog.

    Args:
        summary: is filled with what the scan shows.
        places: for how many places of a prompt each chunk comes, where the document template names the place.
    """

    def __init__(self, summary: Summary, *, places: int | None = None) -> None:
        self._summary = summary
        self._places = places
        self._documents: dict[str, tuple[bytes, str]] = {}
        self._pieces: dict[str, Piece] = {}
        self._conflicts: list[str] = []
        self._titled = 0

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take rows of the scan (``tables.SCAN_SCHEMA`` without its tokens), in any order.

        Raises:
            KVLinkError: what a task says must stop the job.
        """
        for row in rows:
            if row["outcome"] == "fatal":
                raise KVLinkError(row["reason"])
            if row["outcome"] == "bad-file":
                self._summary.files_skipped.append(Failure(row["place"], None, row["code"], row["reason"]))
                continue
            first = row["part"] == 0
            self._summary.documents += first
            if row["outcome"] == "bad-row":
                self._summary.failed.append(Failure(row["place"], row["document_id"], row["code"], row["reason"]))
                continue
            self._titled += row["titled"]
            if first:
                self._see_document(row)
            self._see_piece(Piece(row["chunk_id"], *(row[k] for k in _PIECE_COLUMNS)))

    def _see_document(self, row: Mapping[str, Any]) -> None:
        digest, place = self._documents.setdefault(row["document_id"], (row["text_digest"], row["place"]))
        if place == row["place"]:
            return
        if digest == row["text_digest"]:
            self._summary.repeated += 1
        else:
            places = " and ".join(sorted((place, row["place"])))
            self._conflicts.append(f"document id {row['document_id']!r} has two different texts, at {places}")

    def _see_piece(self, piece: Piece) -> None:
        seen = self._pieces.setdefault(piece.id, piece)
        if seen.document_id != piece.document_id:
            names = " and ".join(repr(i) for i in sorted({seen.document_id, piece.document_id}))
            self._conflicts.append(f"the documents {names} both come to the chunk id {piece.id!r}")

    def check(self, *, bad_files: str, title_column: str | None) -> None:
        """Refuse a corpus that cannot be what its owner means, before anything is computed.

        Raises:
            CorpusError: unreadable files (unless ``bad_files`` is ``skip``), no document at all, none that can be
                used, or a title column, asked for by name, that no document has.
            DuplicateDocumentError: one id with two texts.
        """
        summary = self._summary
        for each in (summary.files_skipped, summary.failed):
            each.sort(key=lambda f: (f.place, f.id or ""))
        if summary.files_skipped and bad_files == "fail":
            more = _more(len(summary.files_skipped), "file")
            raise CorpusError(
                f"{summary.files_skipped[0].reason}{more} Nothing was computed. --bad-files skip goes on."
            )
        if self._conflicts:
            self._conflicts.sort()
            more = _more(len(self._conflicts), "id")
            raise DuplicateDocumentError(
                f"{self._conflicts[0]}.{more} Nothing was computed. Give each document its own id."
            )
        if not self._pieces:
            if not summary.failed:
                raise CorpusError("the corpus has no documents.", param="input")
            first = summary.failed[0]
            raise CorpusError(
                f"none of the {len(summary.failed)} documents can be used; the first, {first.place}: {first.reason}.",
                param="input",
            )
        if title_column is not None and not self._titled:
            raise CorpusError(f"no document has a title in {title_column!r}.", param="title_column")

    def plan(self, store: CatalogLike, *, codec: str, replace: bool = False) -> Plan:
        """Compare with the catalog: what it has is skipped, what it has under another id is named, the rest stays.

        With ``replace`` nothing that it has is relied upon: everything is computed.
        """
        plan, summary = Plan(), self._summary
        summary.chunks = len(self._pieces)
        summary.tokens = sum(p.tokens for p in self._pieces.values())
        for pieces in _batches(self._pieces.values(), 10_000):
            by_id = store.lookup([p.id for p in pieces])
            missing = []
            for piece in pieces:
                row = by_id.get(piece.id)
                if row is not None and row.token_digest == piece.digest and row.codec == codec and not replace:
                    summary.already_there += 1
                else:
                    missing.append(piece)
                    summary.replaced += row is not None
            by_tokens = {} if replace else store.lookup_tokens([p.digest for p in missing])
            for piece in missing:
                row = by_tokens.get(piece.digest)
                if row is not None:
                    plan.aliases.append(store.alias(piece.id, row))
                elif piece.digest in plan.encode:
                    plan.followers.setdefault(piece.digest, []).append(piece.id)
                else:
                    plan.encode[piece.digest] = piece
        summary.stale = sorted(self._stale(store))
        return plan

    def _stale(self, store: CatalogLike) -> Iterator[str]:
        """Ids that the store has and that go on answering with a former text of a document of this corpus.

        A document that has grown into chunks leaves the row of its own id; one that has shrunk leaves chunks.
        """
        places = self._places or 1
        chunks = Counter(p.document_id for p in self._pieces.values() if self._name(p.id) != p.document_id)
        for names in _batches(self._documents, 10_000):
            yield from store.lookup([i for n in names if n in chunks for i in self._stored(n)])
            ends = {n: chunks[n] // places for n in names}
            while ends:
                beyond = {
                    n: [i for c in range(e, e + _PROBE) for i in self._stored(f"{n}{CHUNK_SEPARATOR}{c}")]
                    for n, e in ends.items()
                }
                found = store.lookup([each for ids in beyond.values() for each in ids])
                yield from (each for each in found if each not in self._pieces)
                ends = {n: ends[n] + _PROBE for n, ids in beyond.items() if any(each in found for each in ids)}

    def _stored(self, name: str) -> list[str]:
        """The ids under which a document or chunk is stored."""
        return [name] if self._places is None else [id_at_place(name, p) for p in range(self._places)]

    def _name(self, stored: str) -> str:
        """The document or chunk that is stored under an id."""
        return stored if self._places is None else without_place(stored)


#: Former chunks are looked for this many at a time, until none of them is there: a run may have failed at some.
_PROBE = 4

_PIECE_COLUMNS = ("document_id", "place", "token_digest", "tokens", "ticket")


def _more(count: int, what: str) -> str:
    return f" ({count - 1} more such {what}{'s' if count > 2 else ''}.)" if count > 1 else ""


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
