"""Small JSON files by which maintenance tells others what it does: FORMAT.md section 7."""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Iterable
from typing import IO, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvlink_core.errors import StoreUnavailableError
from kvlink_core.store.rows import CatalogRow, to_micros
from kvlink_core.store.storage import Entry, Storage

logger = logging.getLogger(__name__)

COLLECTING = "collecting"
DELETED = "deleted"

#: Where a service keeps the jobs that it was given, and what their files are called: FORMAT.md section 9.
JOBS = "jobs"
JOB_FILE = re.compile(rf"{JOBS}/[A-Za-z0-9_-][A-Za-z0-9._-]{{0,63}}/[0-9a-f]{{32}}\.(texts|state)\.json")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = 1


class Collecting(_Record):
    """Shards that a collector may remove at any moment."""

    shards: list[Annotated[str, Field(pattern=r"^[0-9a-f]{64}\.parquet$")]]


class Deleted(_Record):
    """Documents that were deleted: of these ids, fingerprint and codec (``None``: of all), written up to ``until``."""

    namespace: str
    ids: list[str] | None
    fingerprint: str | None
    codec: str | None
    until: int


class Deletions:
    """Many records of deletions, to be asked about many rows."""

    def __init__(self, records: Iterable[Deleted]) -> None:
        self._of_all: dict[str, list[Deleted]] = {}
        self._of_id: dict[tuple[str, str], list[Deleted]] = {}
        for record in records:
            if record.ids is None:
                self._of_all.setdefault(record.namespace, []).append(record)
            for document_id in record.ids or ():
                self._of_id.setdefault((record.namespace, document_id), []).append(record)

    def cover(self, row: CatalogRow) -> bool:
        """Whether ``row`` was deleted by one of them."""
        records = (*self._of_all.get(row.namespace, ()), *self._of_id.get((row.namespace, row.document_id), ()))
        return any(
            r.fingerprint in (None, row.fingerprint)
            and r.codec in (None, row.codec)
            and to_micros(row.created_at) <= r.until
            for r in records
        )


def publish_record(storage: Storage, directory: str, record: Collecting | Deleted) -> str:
    """Write ``record`` under a new name in ``directory``, and return its path. Raises ``StoreUnavailableError``."""
    data = json.dumps(record.model_dump(), separators=(",", ":"), ensure_ascii=True).encode()

    def write(file: IO[bytes]) -> str:
        file.write(data)
        return f"{uuid.uuid4().hex}.json"

    return f"{directory}/{storage.publish(directory, write)}"


def entries_of(storage: Storage, directory: str) -> list[Entry]:
    """The records of ``directory``, not yet read."""
    return [e for e in storage.entries(directory) if e.path.endswith(".json") and e.path.count("/") == 1]


def being_collected(storage: Storage) -> frozenset[str]:
    """Shards that a collector may remove at any moment. Raises ``StoreUnavailableError``."""
    found: set[str] = set()
    for name in storage.names(COLLECTING):
        try:
            found.update(Collecting.model_validate_json(storage.read(f"{COLLECTING}/{name}")).shards)
        except FileNotFoundError:  # done meanwhile
            continue
        except ValidationError:  # a collector's record appears whole or not at all, so this is nobody's
            logger.warning("%s/%s/%s is not a record of this format; ignored", storage.url, COLLECTING, name)
    return frozenset(found)


def read_deleted(storage: Storage) -> list[Deleted]:
    """All records of deletions. Raises ``StoreUnavailableError``, also when one of them cannot be understood."""
    found: list[Deleted] = []
    for entry in entries_of(storage, DELETED):
        try:
            found.append(Deleted.model_validate_json(storage.read(entry.path)))
        except FileNotFoundError:
            continue
        except ValidationError as error:
            raise StoreUnavailableError(
                f"{storage.url}/{entry.path} is damaged: what it says was deleted would come back. "
                "Restore it, or remove it to accept that."
            ) from error
    return found
