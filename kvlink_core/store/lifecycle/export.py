"""Documents as plain files that anything can read: safetensors for the numbers, JSON for what they are."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from kvlink_core.errors import ConfigError, PayloadError, UnknownDocumentError
from kvlink_core.fingerprint import Fingerprint
from kvlink_core.store import layout
from kvlink_core.store.lifecycle.documents import one_namespace
from kvlink_core.store.lifecycle.keeper import Progress, StoreKeeper, silent
from kvlink_core.store.lifecycle.table import Scope
from kvlink_core.store.rows import CatalogRow
from kvlink_core.types import DocumentCache

#: Written first; marks a directory as an export, so that doing it again may replace files there.
MARKER = "kvlink-export.json"

_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Export:
    """How many documents were written, and which could not be read, by id, and why."""

    documents: int
    nbytes: int
    failures: dict[str, str]


def export(
    keeper: StoreKeeper,
    scope: Scope,
    directory: Path,
    *,
    document_ids: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Export:
    """Write documents of one namespace to ``directory``, decoded: what a linker would get.

    For each document two files of one name: ``<name>.safetensors`` with ``token_ids``, ``keys`` (before RoPE),
    ``values`` and, of a pruned document, ``kept``, shaped as in ``DocumentCache``, and ``<name>.json`` with its id,
    model, codec and times. The JSON comes last: where it is, the numbers are whole.

    Args:
        keeper: of the store.
        scope: must name the namespace.
        directory: empty, new, or an earlier export, whose files are replaced.
        document_ids: ``None`` for all.
        progress: is told of documents.

    Raises:
        ConfigError: the directory holds something else or cannot be written; no namespace.
        UnknownDocumentError: an id that is not there; nothing was written.
        StoreNotFoundError, StoreUnavailableError: the store cannot be read.
    """
    rows = keeper.catalog.read(one_namespace(scope))
    wanted = rows.counting if document_ids is None else rows.counting & rows.of_ids(document_ids)
    found = list(rows.to_rows(np.flatnonzero(wanted)))
    if unknown := sorted(set(document_ids or ()) - {r.document_id for r in found}):
        raise UnknownDocumentError(unknown)
    found.sort(key=lambda r: (r.shard, r.row_group, r.document_id))
    fingerprints = {d: layout.read_fingerprint(keeper.storage, d) for d in {r.fingerprint for r in found}}
    failures: dict[str, str] = {}
    nbytes = done = 0
    try:
        _prepare(directory)
        while done < len(found):
            part = [found[done]]
            while done + len(part) < len(found) and sum(r.nbytes for r in part) < _CHUNK_BYTES:
                part.append(found[done + len(part)])
            for row, cache in zip(part, keeper.reader.load(part), strict=True):
                if isinstance(cache, PayloadError):
                    failures[row.document_id] = str(cache)
                else:
                    _write(directory, row, fingerprints[row.fingerprint], cache)
                    nbytes += cache.nbytes
            done += len(part)
            progress("exporting", done, len(found))
    except OSError as error:
        raise ConfigError(
            f"cannot write to {str(directory)!r}: {error.strerror or error}.", param="directory"
        ) from error
    return Export(len(found) - len(failures), nbytes, failures)


def file_name(row: CatalogRow) -> str:
    """The name of a document's files, without extension: what of its id a file name can hold, and a hash of its key."""
    key = json.dumps([row.namespace, row.fingerprint, row.codec, row.document_id])
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", row.document_id)[:60].strip("-")
    return f"{readable or 'document'}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _prepare(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    names = [n for n in os.listdir(directory) if not n.startswith(".tmp-")]
    if names and MARKER not in names:
        raise ConfigError(
            f"{str(directory)!r} is not empty and no earlier export; give a new or an empty directory.",
            param="directory",
        )
    _put(directory, MARKER, json.dumps({"format": "kvlink-export", "version": 1}))


def _write(directory: Path, row: CatalogRow, fingerprint: Fingerprint | None, cache: DocumentCache) -> None:
    name = file_name(row)
    tensors = {f.name: getattr(cache, f.name) for f in fields(cache)}
    tensors = {n: t.contiguous() for n, t in tensors.items() if isinstance(t, torch.Tensor)}
    temporary = directory / f".tmp-{name}"
    save_file(tensors, temporary, metadata={"format": "kvlink-export", "document_id": row.document_id})
    os.replace(temporary, directory / f"{name}.safetensors")
    described = {
        **asdict(row),
        "created_at": row.created_at.isoformat(),
        "fingerprint_fields": asdict(fingerprint) if fingerprint else None,
        "tensors": {
            n: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)} for n, t in tensors.items()
        },
        "file": f"{name}.safetensors",
    }
    _put(directory, f"{name}.json", json.dumps(described, indent=1, sort_keys=True))


def _put(directory: Path, name: str, text: str) -> None:
    temporary = directory / f".tmp-{name}"
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, directory / name)
