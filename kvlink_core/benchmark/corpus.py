"""Random documents, encoded and stored as cases ask for them. Attention costs the same whatever the text says."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from kvlink_core.benchmark.results import Case
from kvlink_core.compress import EncodedDocument, get_codec, pruning_of
from kvlink_core.encode import DocumentEncoder
from kvlink_core.errors import ConfigError
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Prompt, Segment, SegmentKind
from kvlink_core.store import DocumentStore
from kvlink_core.template import LinkTokens
from kvlink_core.types import DocumentCache


class Corpus:
    """The documents of all cases of a run: a longer context begins with the documents of a shorter one.

    Args:
        model: encodes them.
        directory: where to keep a store, or ``None`` for none.
        codec: the store's.
    """

    def __init__(self, model: LoadedModel, directory: Path | None, codec: str) -> None:
        self._model = model
        self._codec = get_codec(codec)
        self._encoder = DocumentEncoder(model, prune=pruning_of(self._codec))
        self._caches: dict[tuple[int, int], DocumentCache] = {}
        self._rows: dict[tuple[int, int], Any] = {}
        self._store = (
            DocumentStore.open(str(directory), fingerprint=model.fingerprint, create=True, codec=codec)
            if directory is not None
            else None
        )

    def close(self) -> None:
        """Close the store."""
        if self._store is not None:
            self._store.close()

    @property
    def stored(self) -> bool:
        """Whether there is a store to load from."""
        return self._store is not None

    def prompt(self, case: Case, links: LinkTokens | None) -> Prompt:
        """A prompt of ``case``: its documents, each followed by its link tokens, and a query."""
        runs: list[tuple[SegmentKind, Sequence[int], int | None]] = []
        for place, tokens in enumerate(case.document_lengths):
            runs.append(("document", self._tokens(place, tokens), place))
            if links is not None:
                runs.append(("link", links.after(place), place))
        runs.append(("suffix", self._tokens(-1, case.query_tokens), None))
        segments: list[Segment] = []
        for kind, token_ids, document in runs:
            start = segments[-1].end if segments else 0
            segments.append(Segment(kind, tuple(token_ids), start, document))
        return Prompt(tuple(segments))

    def caches(self, case: Case) -> list[DocumentCache]:
        """The documents' caches, encoded alone, in memory."""
        keys = list(enumerate(case.document_lengths))
        new = [key for key in keys if key not in self._caches]
        encoded = self._encoder.encode([self._tokens(*key) for key in new])
        self._caches.update(zip(new, encoded, strict=True))
        return [self._caches[key] for key in keys]

    def load(self, case: Case) -> list[DocumentCache]:
        """The same caches read from the store, checksums verified.

        Raises:
            ConfigError: the store, which is the benchmark's own, cannot be read back.
        """
        assert self._store is not None
        rows = [self._rows[key] for key in enumerate(case.document_lengths)]
        loaded = self._store.load(rows)
        caches = [c for c in loaded if isinstance(c, DocumentCache)]
        if len(caches) != len(loaded):
            raise ConfigError("the benchmark's own store could not be read back; is its disk sound?")
        return caches

    def store(self, case: Case) -> None:
        """Write what the store lacks of ``case``: a shard of the documents that no case before it had."""
        assert self._store is not None
        keys = list(enumerate(case.document_lengths))
        caches = dict(zip(keys, self.caches(case), strict=True))
        new = [key for key in keys if key not in self._rows]
        rows = self._store.write_shard([(f"document-{place}-{tokens}", caches[place, tokens]) for place, tokens in new])
        self._store.commit(rows)
        self._rows.update(zip(new, rows, strict=True))

    def encoded(self, case: Case) -> list[EncodedDocument]:
        """What the codec makes of the caches, in memory."""
        return [self._codec.encode(cache) for cache in self.caches(case)]

    def decode(self, encoded: Sequence[EncodedDocument], pool: ThreadPoolExecutor) -> None:
        """Decode all of it and drop the result."""
        for _ in pool.map(self._codec.decode, encoded):
            pass

    def _tokens(self, place: int, tokens: int) -> list[int]:
        draw = torch.Generator().manual_seed(place + 1)
        return torch.randint(0, self._model.spec.vocab_size, (tokens,), generator=draw).tolist()
