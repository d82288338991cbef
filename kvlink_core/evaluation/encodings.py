"""Caches of the documents that questions stand on: each distinct document is encoded once, whoever asks for it.

Batches are planned from the data alone: a document always shares its forward pass with the same others, however a run
was interrupted and whatever memory had to be given up, so that a resumed run sees the same caches to the last bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np

from kvlink_core.compress import Codec, EncodedDocument
from kvlink_core.encode import DocumentEncoder, Pruner, length_batches
from kvlink_core.models import LoadedModel
from kvlink_core.types import DocumentCache

#: Token ids of a document as ``token_bytes`` writes them: a run may have millions, and they are kept.
Tokens = bytes

BYTES_PER_TOKEN_ID = 4

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """What was used last, up to so many bytes; what is larger than that alone is kept until the next comes."""

    def __init__(self, most_bytes: int, size: Callable[[V], int]) -> None:
        self._most = most_bytes
        self._size = size
        self._held: OrderedDict[K, V] = OrderedDict()
        self._bytes = 0

    def get(self, key: K) -> V | None:
        """The value, which is now the last that was used."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: K, value: V) -> None:
        """Keep a value under a new key."""
        if key in self._held:
            self._bytes -= self._size(self._held.pop(key))
        self._held[key] = value
        self._bytes += self._size(value)
        while self._bytes > self._most and len(self._held) > 1:
            self._bytes -= self._size(self._held.popitem(last=False)[1])


class Encodings:
    """Document caches by token ids.

    Args:
        model: makes them.
        most_bytes: of caches kept for questions to come.
        max_batch_tokens: padded tokens of one forward pass.
        prune: of a codec that prunes, which takes place while encoding.

    Attributes:
        longest: tokens that a document may have.
        encoded: documents encoded so far.

    Raises:
        UnsupportedModelError: ``prune`` has to see what this model does not show.
    """

    def __init__(
        self, model: LoadedModel, *, most_bytes: int, max_batch_tokens: int = 4096, prune: Pruner | None = None
    ) -> None:
        self._encoder = DocumentEncoder(model, max_batch_tokens=max_batch_tokens, prune=prune)
        self.longest = model.context_length // (2 if prune is not None and prune.reads == "again" else 1)
        self._max_batch_tokens = max_batch_tokens
        self._batch_of: dict[Tokens, list[Tokens]] = {}
        self._recent: Recent[Tokens, DocumentCache] = Recent(most_bytes, lambda cache: cache.nbytes)
        self.encoded = 0

    def plan(self, documents: Sequence[Tokens]) -> None:
        """Say which documents come next, in the order of the data; those that are new share batches.

        Encodes nothing. A run that is resumed plans everything again from the start.
        """
        new = [tokens for tokens in dict.fromkeys(documents) if tokens not in self._batch_of]
        for batch in length_batches([len(tokens) // BYTES_PER_TOKEN_ID for tokens in new], self._max_batch_tokens):
            members = [new[i] for i in batch]
            self._batch_of.update((tokens, members) for tokens in members)

    def caches(self, documents: Sequence[Tokens]) -> list[DocumentCache]:
        """The caches of planned documents, in order; what is not at hand is encoded with all of its batch."""
        found = {tokens: cache for tokens in documents if (cache := self._recent.get(tokens)) is not None}
        for tokens in documents:
            if tokens not in found:
                members = self._batch_of[tokens]
                token_ids = [np.frombuffer(each, "<u4").tolist() for each in members]
                made = dict(zip(members, self._encoder.encode(token_ids), strict=True))
                self.encoded += len(members)
                for each, cache in made.items():
                    self._recent.put(each, cache)
                found |= made
        return [found[tokens] for tokens in documents]


class Stored:
    """Documents as a codec has them in host memory, from where every question decodes them anew.

    Args:
        codec: any.
        most_bytes: of documents kept for questions to come.
    """

    def __init__(self, codec: Codec, *, most_bytes: int) -> None:
        self.codec = codec
        self._recent: Recent[Tokens, EncodedDocument] = Recent(most_bytes, stored_bytes)

    def documents(
        self, documents: Sequence[Tokens], make: Callable[[Sequence[Tokens]], Sequence[DocumentCache]]
    ) -> list[EncodedDocument]:
        """The documents, of which those that are not at hand are made by ``make`` and encoded."""
        found = {tokens: held for tokens in documents if (held := self._recent.get(tokens)) is not None}
        missing = [tokens for tokens in dict.fromkeys(documents) if tokens not in found]
        for tokens, cache in zip(missing, make(missing), strict=True):
            document = self.codec.encode(cache)
            self._recent.put(tokens, document)
            found[tokens] = document
        return [found[tokens] for tokens in documents]


def stored_bytes(document: EncodedDocument) -> int:
    """What a document takes in a store, K and V alone."""
    return sum(column.data.numel() for column in document.columns.values())
