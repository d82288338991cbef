"""What a job did, counted: a table for people, JSON for machines."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Failure:
    """A document, or a chunk of one, that is not in the store, and why.

    Attributes:
        place: ``url:line`` it came from.
        id: its id, where it has one.
        code: short stable name of the reason.
        reason: for people.
    """

    place: str
    id: str | None
    code: str
    reason: str


@dataclass(slots=True)
class Summary:
    """The counts of one job. Filled while it runs; each document read is counted once in ``documents``.

    Attributes:
        files, files_ignored, files_skipped: read; left out for their ending; unreadable and skipped on demand.
        documents: rows read, good or bad.
        repeated: documents that came again with the same id and text.
        chunks: units of reuse that the corpus has: whole documents, and the pieces of long ones.
        tokens: tokens of all chunks.
        already_there: chunks that the store had before.
        shared: chunks whose tokens another chunk has too: they name its payload, nothing is computed.
        replaced: chunks whose id the store had, with other tokens or (asked to replace) in any case.
        stale: ids that are in the store with a former text of a document of this corpus, and go on answering with it.
        encoded, encoded_tokens: chunks computed in this run.
        failed: what is not in the store now, with reasons.
        payload_bytes, shards, commits, version: what was written; the catalog's version after it.
        encode_s: seconds in which actors worked: from the first block taken to the last one done; loading the
            model is not in it.
        wall_s: seconds of the whole job.
    """

    store: str = ""
    model: str = ""
    fingerprint: str = ""
    files: int = 0
    files_ignored: list[str] = field(default_factory=list)
    files_skipped: list[Failure] = field(default_factory=list)
    documents: int = 0
    repeated: int = 0
    chunks: int = 0
    tokens: int = 0
    already_there: int = 0
    shared: int = 0
    replaced: int = 0
    stale: list[str] = field(default_factory=list)
    encoded: int = 0
    encoded_tokens: int = 0
    failed: list[Failure] = field(default_factory=list)
    payload_bytes: int = 0
    shards: int = 0
    commits: int = 0
    version: int | None = None
    encode_s: float = 0.0
    wall_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens computed per second of encoding; 0 when nothing was."""
        return self.encoded_tokens / self.encode_s if self.encode_s else 0.0

    def as_dict(self, *, most: int | None = None) -> dict[str, Any]:
        """All counts, JSON-ready; of lists at most ``most`` items, beside their number."""
        data = asdict(self)
        data["tokens_per_s"] = round(self.tokens_per_s, 1)
        for key in ("encode_s", "wall_s"):
            data[key] = round(data[key], 3)
        data["failed_count"] = len(self.failed)
        data["files_ignored_count"] = len(self.files_ignored)
        data["stale_count"] = len(self.stale)
        for key in ("failed", "files_ignored", "files_skipped", "stale"):
            data[key] = data[key][:most]
        return data

    def to_json(self, *, most: int | None = None, indent: int | None = None) -> str:
        """``as_dict`` as JSON."""
        return json.dumps(self.as_dict(most=most), indent=indent, ensure_ascii=False)

    def print(self, console: Console, *, most: int = 10) -> None:
        """The table, and below it the first ``most`` failures with their reasons."""
        table = Table(title="precompute", show_header=False)
        table.add_column("what")
        table.add_column("how much", justify="right")
        for name, value in self._lines():
            table.add_row(name, value)
        console.print(table)
        for name in self.files_ignored[:most]:
            console.print(f"ignored for its ending: {name}", markup=False, style="yellow", soft_wrap=True)
        for failure in [*self.files_skipped, *self.failed][:most]:
            what = f"{failure.id!r} at " if failure.id else ""
            line = f"failed ({failure.code}): {what}{failure.place}: {failure.reason}"
            console.print(line, markup=False, style="yellow", soft_wrap=True)
        for name in self.stale[:most]:
            line = f"stale: {name!r} is in the store with a former text of its document, and still answers with it"
            console.print(line, markup=False, style="yellow", soft_wrap=True)
        if len(self.stale) > most:
            more = f"... and {len(self.stale) - most} more stale ids; --summary-json PATH has them all"
            console.print(more, markup=False, style="yellow")
        if len(self.failed) > most:
            more = f"... and {len(self.failed) - most} more; --summary-json PATH has them all"
            console.print(more, markup=False, style="yellow")

    def _lines(self) -> list[tuple[str, str]]:
        reasons: dict[str, int] = {}
        for failure in self.failed:
            reasons[failure.code] = reasons.get(failure.code, 0) + 1
        why = ", ".join(f"{code} {count:,}" for code, count in sorted(reasons.items()))
        lines = [
            ("files", f"{self.files:,}"),
            ("files ignored", f"{len(self.files_ignored):,}"),
            ("files skipped as unreadable", f"{len(self.files_skipped):,}"),
            ("documents", f"{self.documents:,}"),
            ("documents repeated", f"{self.repeated:,}"),
            ("chunks", f"{self.chunks:,}"),
            ("tokens", f"{self.tokens:,}"),
            ("skipped as already there", f"{self.already_there:,}"),
            ("shared with the same text elsewhere", f"{self.shared:,}"),
            ("replaced (the store had the id)", f"{self.replaced:,}"),
            ("stale: ids left with a former text", f"{len(self.stale):,}"),
            ("encoded", f"{self.encoded:,}"),
            ("failed", f"{len(self.failed):,}" + (f" ({why})" if why else "")),
            ("bytes written", f"{self.payload_bytes:,}"),
            ("shards / commits", f"{self.shards:,} / {self.commits:,}"),
            ("tokens/s", f"{self.tokens_per_s:,.0f}"),
            ("seconds: encoding / all", f"{self.encode_s:,.1f} / {self.wall_s:,.1f}"),
        ]
        optional = (
            "files ignored",
            "files skipped as unreadable",
            "documents repeated",
            "replaced (the store had the id)",
            "stale: ids left with a former text",
        )
        return [(n, v) for n, v in lines if v != "0" or n not in optional]
