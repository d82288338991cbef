"""Documents to caches: run each document alone through the model and keep its keys before RoPE and its values.

Documents of like length share a batch, padded on the right: with a causal mask no real token ever sees padding, so
batching changes nothing but the order of floating-point sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from kvlink_core.errors import EmptyDocumentError, PromptTooLongError
from kvlink_core.models import LoadedModel
from kvlink_core.models.key_recipe import UnrotatedCache
from kvlink_core.models.reading import Reading, Reads
from kvlink_core.types import DocumentCache


def length_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Group indices so that a batch, padded to its longest, has at most ``max_batch_tokens`` tokens.

    A document longer than that gets a batch of its own. Deterministic: sorted by length, then by index.
    """
    batches: list[list[int]] = []
    current: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if current and lengths[index] * (len(current) + 1) > max_batch_tokens:
            batches.append(current)
            current = []
        current.append(index)
    return [*batches, current] if current else batches


class Pruner(Protocol):
    """Takes tokens out of caches as they are made (``compress.pruning_of`` has one for each codec that prunes)."""

    @property
    def reads(self) -> Reads:
        """What it has to see of a document beyond its cache."""
        ...

    def prune(self, cache: DocumentCache, reading: Reading | None = None) -> DocumentCache:
        """A pruned cache. Raises what the scorer raises."""
        ...


class DocumentEncoder:
    """Makes document caches (arXiv 2502.16002, section 3: each document is encoded on its own).

    Args:
        model: the model; caches carry its dtype.
        max_batch_tokens: padded tokens of one forward pass; more is faster until memory or cores are full.
        prune: prunes each cache here, where all of the model is at hand; all tokens are seen while encoding.

    Raises:
        UnsupportedModelError: ``prune`` has to see what this model does not show.
    """

    def __init__(self, model: LoadedModel, *, max_batch_tokens: int = 4096, prune: Pruner | None = None) -> None:
        self.model = model
        self.max_batch_tokens = max_batch_tokens
        self._prune = prune
        self._twice = prune is not None and prune.reads == "again"
        if prune is not None:
            model.lm.check_reads(prune.reads)

    def encode(self, documents: Sequence[Sequence[int]]) -> list[DocumentCache]:
        """Encode documents given as token ids (``layout.document_tokens``).

        Returns:
            One cache per document, in the order given, each with memory of its own on the model's device.

        Raises:
            EmptyDocumentError: a document without tokens.
            PromptTooLongError: a document longer than the model's context, or than half of it where it is read twice.
        """
        limit = self.model.context_length // (2 if self._twice else 1)
        for token_ids in documents:
            if not token_ids:
                raise EmptyDocumentError("a document without tokens cannot be encoded.", param="documents")
            if len(token_ids) > limit:
                reason = "half of it, as this scorer reads it twice" if self._twice else self.model.spec.context_reason
                raise PromptTooLongError(len(token_ids), limit, what="a document", reason=reason)
        caches: dict[int, DocumentCache] = {}
        most = self.max_batch_tokens // (2 if self._twice else 1)
        for batch in length_batches([len(d) for d in documents], most):
            caches.update(zip(batch, self._encode_batch([documents[i] for i in batch]), strict=True))
        return [caches[i] for i in range(len(documents))]

    @torch.inference_mode()
    def _encode_batch(self, batch: Sequence[Sequence[int]]) -> list[DocumentCache]:
        model = self.model
        rows = [[*d, *d] if self._twice else d for d in batch]
        longest = max(len(row) for row in rows)
        input_ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        for padded, row in zip(input_ids, rows, strict=True):
            padded[: len(row)] = torch.tensor(row, dtype=torch.int64)
        inputs = self._inputs(input_ids.to(model.device))
        if self._prune is None:
            cache = model.lm.encode(**inputs)
            return [self._cut(cache, input_ids, i, len(d)) for i, d in enumerate(batch)]
        cache, readings = model.lm.read(self._prune.reads, [len(d) for d in batch], **inputs)
        return [
            self._prune.prune(self._cut(cache, input_ids, i, len(d)), reading)
            for i, (d, reading) in enumerate(zip(batch, readings, strict=True))
        ]

    def _cut(self, cache: UnrotatedCache, input_ids: torch.Tensor, row: int, tokens: int) -> DocumentCache:
        """One document out of a batch, in memory of its own."""
        return DocumentCache(
            token_ids=input_ids[row, :tokens].clone(),
            keys=torch.stack([k[row, :, :tokens] for k in cache.keys]),
            values=torch.stack([v[row, :, :tokens] for v in cache.values]),
        )

    def _inputs(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        wrap = self.model.description.soft_wrap
        if wrap is None:
            return {"input_ids": input_ids}
        return {"inputs_embeds": wrap.embed(self.model.network.get_input_embeddings(), input_ids)}
