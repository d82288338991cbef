"""The documents that running requests read: each is held once, however many read it.

A document comes from a cache, whose keys are rotated once to the document's own positions, or is encoded here, a chunk
in each step, so that nobody waits for it but those who asked for it. One that nobody reads is kept until its memory is
needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from kvlink_core.engine.memory import Budget
from kvlink_core.errors import KVLinkError
from kvlink_core.fingerprint import digest_of_tokens
from kvlink_core.models import LoadedModel
from kvlink_core.models.flat_parts import Segment, Slots, Span
from kvlink_core.types import DocumentCache

#: Namespace, digest of the tokens, and how the document comes to be here.
Key = tuple[str, str, Literal["given", "encoded", "copied", "added"]]


class SharedDocument:
    """A document that is read by ``readers`` requests.

    Attributes:
        token_ids: its tokens.
        segment: its keys and values; complete when ``ready``.
        cache: of one that was encoded here for requests that copy it, or to be added, as the encoder makes it.
        number: of the request that asked for it first.
    """

    def __init__(self, key: Key, token_ids: Sequence[int], segment: Segment, number: int) -> None:
        self.key = key
        self.number = number
        self.nbytes = 0  # of the budget, now
        self.token_ids = token_ids
        self.segment = segment
        self.readers = 0
        self.cache: DocumentCache | None = None
        self.encoded = len(token_ids)  # how many of its tokens are there
        self._slots: Slots | None = None
        self._unrotated: torch.Tensor | None = None

    @property
    def ready(self) -> bool:
        """Whether it can be read."""
        return self.encoded == len(self.token_ids)

    def begin(self, model: LoadedModel) -> None:
        """Start to encode it."""
        self.encoded = 0
        segment, tokens = self.segment, len(self.token_ids)
        positions = torch.arange(tokens, device=model.device)[None]
        self._slots = Slots(segment.keys[:, None], segment.values[:, None], positions)
        self._unrotated = torch.empty_like(segment.keys)

    def span(self, count: int) -> Span:
        """The next ``count`` tokens of one that is being encoded: they see their own document only."""
        assert self._slots is not None
        at = range(self.encoded, self.encoded + count)
        return Span(
            token_ids=self.token_ids[at.start : at.stop],
            positions=at,
            slots=at,
            memory=self._slots,
            lane=0,
            wants_logits=False,
            unrotated=self._unrotated,
        )

    def advance(self, model: LoadedModel, count: int) -> DocumentCache | None:
        """``count`` more tokens were computed; returns its cache when these were the last."""
        self.encoded += count
        if not self.ready:
            return None
        assert self._unrotated is not None
        keys, values = self._unrotated, self.segment.values
        # The rotation of a document that is loaded: in float32, whatever the model's forward pass does.
        tables = model.rotary.tables(torch.arange(len(self.token_ids), device=model.device))
        model.rotary.place(keys, values, tables, self.segment.keys, values)
        self._slots = self._unrotated = None
        return DocumentCache(torch.tensor(self.token_ids, dtype=torch.int64), keys, values)


class SharedDocuments:
    """All documents in the memory of one engine. Not thread-safe.

    Args:
        model: the model of all of them.
        budget: what they may take.
    """

    def __init__(self, model: LoadedModel, budget: Budget) -> None:
        self._model = model
        self._budget = budget
        self._documents: dict[Key, SharedDocument] = {}
        (layers, heads, _, key_dim), (*_, value_dim) = model.recipes.shapes(1)
        self._key_bytes = layers * heads * key_dim * model.dtype.itemsize
        self._value_bytes = layers * heads * value_dim * model.dtype.itemsize

    def nbytes(self, tokens: int, cache: DocumentCache | None) -> int:
        """What a document takes of the budget: without a cache it is encoded, and its keys are there twice until then.

        What is left of a pruned one has its tokens' numbers beside it.
        """
        if cache is None:
            return tokens * (2 * self._key_bytes + self._value_bytes + 8)
        kept = 0 if cache.kept is None else cache.kept.nbytes
        return cache.slots * (self._key_bytes + self._value_bytes) + kept

    def encoding(self) -> list[SharedDocument]:
        """Those being encoded, the longest waiting first."""
        return [d for d in self._documents.values() if not d.ready]

    @property
    def readers(self) -> int:
        """References held by requests, over all documents."""
        return sum(d.readers for d in self._documents.values())

    @property
    def held_bytes(self) -> int:
        """Bytes that documents take of the budget, idle ones included."""
        return sum(document.nbytes for document in self._documents.values())

    @staticmethod
    def key(namespace: str, token_ids: Sequence[int], cache: DocumentCache | None, *, copied: bool = False) -> Key:
        """What tells documents apart. What was loaded may be of a codec that loses something, so it is another one."""
        digest = digest_of_tokens(token_ids)
        if cache is None:
            return namespace, digest, "copied" if copied else "encoded"
        return namespace, digest if cache.kept is None else f"{digest}/{cache.slots}", "given"

    def open(
        self, key: Key, token_ids: Sequence[int], cache: DocumentCache | None, number: int
    ) -> SharedDocument | None:
        """Read a document from now on; ``None`` where the budget has no room for it.

        Args:
            key: its ``key``.
            token_ids: its tokens.
            cache: to take it from, or ``None`` to encode it.
            number: of the request.

        Raises:
            UnsupportedModelError: a pruned cache, and a model that cannot rotate each head by itself.
        """
        document = self._documents.get(key)
        if document is None:
            document = self._make(key, token_ids, cache, number)
            if document is None:
                return None
        elif not document.readers:
            self._budget.wake(document)
        document.readers += 1
        return document

    def close(self, document: SharedDocument) -> None:
        """No longer read it."""
        document.readers -= 1
        assert document.readers >= 0
        if document.readers:
            return
        if document.ready and document.cache is None:
            self._budget.rest(document, document.nbytes, lambda: self._forget(document))
            return
        self._forget(document)  # half of it, or with unrotated keys that nobody else wants
        document.cache = None
        self._budget.give(document.nbytes)

    def advance(self, document: SharedDocument, count: int) -> DocumentCache | None:
        """``count`` more tokens of a document were computed; returns its cache when these were the last."""
        cache = document.advance(self._model, count)
        if cache is not None:
            if document.key[2] in ("copied", "added"):
                document.cache = cache
            else:
                held = self.nbytes(len(document.token_ids), cache)
                self._budget.give(document.nbytes - held)
                document.nbytes = held
        return cache

    def _make(
        self, key: Key, token_ids: Sequence[int], cache: DocumentCache | None, number: int
    ) -> SharedDocument | None:
        model, tokens = self._model, len(token_ids)
        nbytes = self.nbytes(tokens, cache)
        if not self._budget.take(nbytes):
            return None
        shapes = model.recipes.shapes(tokens if cache is None else cache.slots)
        keys, values = (torch.empty(shape, dtype=model.dtype, device=model.device) for shape in shapes)
        kept = None if cache is None or cache.kept is None else cache.kept.to(model.device, copy=True)
        document = SharedDocument(key, token_ids, Segment(keys, values, kept), number)
        document.nbytes = nbytes
        if cache is None:
            document.begin(model)
        else:
            tables = model.rotary.tables(torch.arange(tokens, device=model.device))
            given = (cache.keys.to(model.device), cache.values.to(model.device))
            try:
                if kept is None:
                    model.rotary.place(*given, tables, keys, values)
                else:
                    model.rotary.place_kept(*given, kept, tables, keys, values)
            except KVLinkError:
                self._budget.give(nbytes)
                raise
        self._documents[key] = document
        return document

    def _forget(self, document: SharedDocument) -> None:
        del self._documents[document.key]
