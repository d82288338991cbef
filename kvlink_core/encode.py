"""Documents to caches: run each document alone through the model and keep its keys before RoPE and its values.

Documents of like length share a batch, padded on the right: with a causal mask no real token ever sees padding, so
batching changes nothing but the order of floating-point sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvlink_core.errors import EmptyDocumentError, PromptTooLongError
from kvlink_core.models import LoadedModel
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


class DocumentEncoder:
    """Makes document caches (arXiv 2502.16002, section 3: each document is encoded on its own).

    Args:
        model: the model; caches carry its dtype.
        max_batch_tokens: padded tokens of one forward pass; more is faster until memory or cores are full.
    """

    def __init__(self, model: LoadedModel, *, max_batch_tokens: int = 4096) -> None:
        self.model = model
        self.max_batch_tokens = max_batch_tokens

    def encode(self, documents: Sequence[Sequence[int]]) -> list[DocumentCache]:
        """Encode documents given as token ids (``layout.document_tokens``).

        Returns:
            One cache per document, in the order given, each with memory of its own on the model's device.

        Raises:
            EmptyDocumentError: a document without tokens.
            PromptTooLongError: a document longer than the model's context.
        """
        for token_ids in documents:
            if not token_ids:
                raise EmptyDocumentError("a document without tokens cannot be encoded.", param="documents")
            if len(token_ids) > self.model.context_length:
                raise PromptTooLongError(
                    len(token_ids), self.model.context_length, what="a document", reason=self.model.spec.context_reason
                )
        caches: dict[int, DocumentCache] = {}
        for batch in length_batches([len(d) for d in documents], self.max_batch_tokens):
            caches.update(zip(batch, self._encode_batch([documents[i] for i in batch]), strict=True))
        return [caches[i] for i in range(len(documents))]

    @torch.inference_mode()
    def _encode_batch(self, batch: Sequence[Sequence[int]]) -> list[DocumentCache]:
        model = self.model
        longest = max(len(d) for d in batch)
        input_ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, token_ids in zip(input_ids, batch, strict=True):
            row[: len(token_ids)] = torch.tensor(token_ids, dtype=torch.int64)
        cache = model.lm.encode(**self._inputs(input_ids.to(model.device)))
        return [
            DocumentCache(
                token_ids=input_ids[i, : len(token_ids)].clone(),
                keys=torch.stack([k[i, :, : len(token_ids)] for k in cache.keys]),
                values=torch.stack([v[i, :, : len(token_ids)] for v in cache.values]),
            )
            for i, token_ids in enumerate(batch)
        ]

    def _inputs(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        wrap = self.model.description.soft_wrap
        if wrap is None:
            return {"input_ids": input_ids}
        return {"inputs_embeds": wrap.embed(self.model.network.get_input_embeddings(), input_ids)}
