"""The few values that travel between the layers. All frozen; tensors inside them are read-only by contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kvlink_core.errors import InputError

#: The longest document id, in bytes of UTF-8.
MAX_DOCUMENT_ID_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Document:
    """The unit of reuse: a text with an id.

    ``id`` is the caller's name for it; two documents with the same rendered text share one payload.
    """

    id: str
    text: str
    title: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DocumentRef:
    """A document named by its id alone; its cache must be in the store."""

    id: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; ``role`` is ``system``, ``user`` or ``assistant``.

    ``documents`` were added in this turn, which must be a user's: they stand before its content.
    """

    role: str
    content: str
    documents: Sequence[Document | DocumentRef] = ()


@dataclass(frozen=True, slots=True)
class DocumentCache:
    """The keys and values of one document encoded alone, at positions ``0..tokens-1``.

    Models with latent attention cache a latent in the place of the key and one shared key in that of the value.

    A pruned cache lacks some of its tokens, in each layer and head others, but in all of them as many: ``slots`` are
    left of each. The document had all of its tokens while it was encoded.

    Attributes:
        token_ids: int64 ``[tokens]``, the document's tokens as the template rendered them.
        keys: ``[layers, kv_heads, slots, key_dim]``, in the model's dtype, **before** RoPE.
        values: ``[layers, kv_heads, slots, value_dim]``, in the model's dtype (before RoPE, where it is rotated).
        kept: int32 ``[layers, kv_heads, slots]``: which token each slot is, ascending from 0 up; ``None`` for all
            tokens, and then ``slots`` is ``tokens``.

    The tensors may be views of a memory-mapped, read-only file: never write to them.
    """

    token_ids: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    kept: torch.Tensor | None = None

    def __post_init__(self) -> None:
        tokens = self.token_ids.shape[0]
        assert self.token_ids.ndim == 1
        assert self.keys.ndim == 4
        assert self.values.ndim == 4
        assert self.keys.shape[:3] == self.values.shape[:3]
        if self.kept is None:
            assert self.keys.shape[2] == tokens
        else:
            assert self.kept.dtype == torch.int32
            assert self.kept.shape == self.keys.shape[:3]
            assert 1 <= self.kept.shape[2] <= tokens

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.token_ids.shape[0])

    @property
    def slots(self) -> int:
        """Number of tokens that each layer and head has keys and values of."""
        return int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of K and V, and of ``kept``."""
        return self.keys.nbytes + self.values.nbytes + (0 if self.kept is None else self.kept.nbytes)


def check_document_id(document_id: str) -> None:
    """The one rule for document ids: 1 to 1024 bytes of UTF-8, of any characters. Raises ``InputError``."""
    try:
        length = len(document_id.encode())
    except UnicodeEncodeError as error:
        raise InputError(f"document id {document_id[:60]!a} is not valid Unicode.") from error
    if not 1 <= length <= MAX_DOCUMENT_ID_BYTES:
        shown = document_id if length <= 60 else f"{document_id[:60]}..."
        raise InputError(f"document id {shown!r} has {length} bytes; 1 to {MAX_DOCUMENT_ID_BYTES} are allowed.")
