"""Documents that questions name by their ids, as ``kvlink sample`` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kvlink_core.errors import CorpusError
from kvlink_core.evaluation.reading.entries import entries
from kvlink_core.evaluation.reading.fields import Fields
from kvlink_core.types import Document


def read_corpus(asking: Fields, path: Path) -> Mapping[str, Document]:
    """All documents of ``corpus.jsonl``: id, text and perhaps title.

    Raises:
        CorpusError: it is not there, which is said of the entry that asked for it, or cannot be read.
    """
    if not path.is_file():
        raise CorpusError(
            f"{asking.where}: documents must be objects with a text; or ids of documents in {path}, which is not there."
        )
    found: dict[str, Document] = {}
    for entry in entries(path):
        row = Fields.of(entry.value, entry.where)
        document = Document(row.text("id"), row.text("text"), row.maybe("title"))
        if document.id in found:
            raise CorpusError(f"{entry.where}: a second document {document.id[:60]!r}.")
        found[document.id] = document
    return found
