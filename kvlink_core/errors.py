"""Everything that KVLink raises on purpose. Each message names the cause and, where there is one, the remedy.

``KVLinkError`` is the root. Three branches tell a caller whose move it is: ``InputError`` (the caller sent
something that cannot be done as asked), ``ModelError`` (the model cannot be loaded or is not supported) and
``StoreError`` (what is stored is missing, damaged or foreign). HTTP status codes and exit codes are derived from
the class, never from the text.
"""

from __future__ import annotations

from collections.abc import Sequence


class KVLinkError(Exception):
    """Root of all errors raised on purpose. ``str(error)`` is one line, fit to be shown to a user."""

    #: Short stable name for machines: error bodies, metrics labels, job summaries.
    code = "kvlink_error"

    #: The name of the offending parameter, where there is one.
    param: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(" ".join(message.split()))
        if param is not None:
            self.param = param


class InputError(KVLinkError):
    """The request, corpus or configuration cannot be done as asked; sending it again will not help."""

    code = "invalid_request"


class ConfigError(InputError):
    """A configuration value is unknown, missing or impossible."""

    code = "invalid_config"


class CorpusError(InputError):
    """A corpus file or row cannot be read as what it says it is."""

    code = "invalid_corpus"


class EmptyDocumentError(InputError):
    """A document without a single token."""

    code = "empty_document"


class DuplicateDocumentError(InputError):
    """One document id with two different texts."""

    code = "duplicate_document"


class UnknownDocumentError(InputError):
    """A document id that the store does not have, and no text to encode instead."""

    code = "document_not_found"

    def __init__(self, document_ids: list[str], *, chunked: Sequence[str] = ()) -> None:
        shown = ", ".join(repr(i) for i in document_ids[:5]) + (", ..." if len(document_ids) > 5 else "")
        remedy = "Send its text, or run precompute on it first."
        if chunked:
            remedy = f"{chunked[0]!r} was too long and is stored in chunks: ask for '{chunked[0]}#0' and so on."
        super().__init__(f"no such document in the store: {shown}. {remedy}", param="documents")
        self.document_ids = document_ids


class DocumentPlaceError(UnknownDocumentError):
    """A document named by its id alone, stored for other places of a prompt than the one it has in this one."""

    code = "document_not_at_place"

    def __init__(self, document_id: str, place: int) -> None:
        InputError.__init__(
            self,
            f"document {document_id!r} is not stored for place {place} (from 0) of a prompt, and this model's document "
            "template names the place. Send its text, or run precompute with more --places.",
            param="documents",
        )
        self.document_ids = [document_id]


class TooManyDocumentsError(InputError):
    """More documents than the model has link tokens for."""

    code = "too_many_documents"


class MisplacedDocumentsError(InputError):
    """Documents in a turn that cannot hold them: not a user's, or the chat template drops, repeats or changes it."""

    code = "misplaced_documents"


class EmptyQuestionError(InputError):
    """A prompt without a question."""

    code = "empty_question"


class PromptTooLongError(InputError):
    """A prompt that, with the tokens asked for, exceeds the model's context."""

    code = "context_length_exceeded"

    def __init__(self, tokens: int, limit: int, *, what: str = "the prompt", reason: str = "") -> None:
        super().__init__(
            f"{what} has {tokens} tokens, and the model's context is {limit}{reason and f' ({reason})'}. "
            "Send fewer or shorter documents, or lower max_tokens.",
            param="messages",
        )
        self.tokens = tokens
        self.limit = limit


class RequestTooLargeError(InputError):
    """A request whose keys and values can never fit into the engine's memory, whatever else is running."""

    code = "request_too_large"

    def __init__(self, nbytes: int, limit: int) -> None:
        super().__init__(
            f"the request may need {nbytes / 2**20:,.1f} MiB for keys and values, and the engine has "
            f"{limit / 2**20:,.1f}. Send fewer or shorter documents, lower max_tokens, or give the engine more memory.",
            param="max_tokens",
        )
        self.nbytes = nbytes
        self.limit = limit


class SamplingError(InputError):
    """A sampling parameter outside its range."""

    code = "invalid_sampling"


class UnknownLinkerError(InputError):
    """A linker name that is not registered."""

    code = "unknown_linker"


class UnknownCodecError(InputError):
    """A codec name that is not registered."""

    code = "unknown_codec"


class UnknownScorerError(InputError):
    """A scorer name that is not registered."""

    code = "unknown_scorer"


class PrunedCacheError(InputError):
    """Caches that lack some of their tokens, asked for something that needs them all."""

    code = "pruned_cache"


class ModelError(KVLinkError):
    """The model cannot be loaded or used."""

    code = "model_error"


class ModelNotFoundError(ModelError):
    """No model directory there, or it lacks a file."""

    code = "model_not_found"


class UnsupportedModelError(ModelError):
    """The architecture cannot be linked exactly; refused rather than served wrong."""

    code = "unsupported_model"


class ChatTemplateError(ModelError):
    """The model's chat template cannot be read, or has no place for documents where ``kvlink.json`` puts them."""

    code = "chat_template_error"


class StoreError(KVLinkError):
    """Root of what can go wrong with stored caches."""

    code = "store_error"


class StoreNotFoundError(StoreError):
    """There is no store at that path."""

    code = "store_not_found"


class StoreUnavailableError(StoreError):
    """The store's file system does not answer, or refuses to be read or written."""

    code = "store_unavailable"


class DocumentLostError(StoreError):
    """A document known by its id alone, whose payload and token ids are both damaged: it cannot be had again."""

    code = "document_lost"

    def __init__(self, document_id: str) -> None:
        super().__init__(
            f"document {document_id!r}: its stored cache and its token ids are both damaged. "
            "Send its text, or run precompute on it with --replace.",
            param="documents",
        )


class FingerprintMismatchError(StoreError):
    """The store holds caches of another model, tokenizer or template."""

    code = "fingerprint_mismatch"


class PayloadError(StoreError):
    """A stored payload that must not be served. Readers recompute, count and report it; never crash."""

    code = "payload_error"


class PayloadMissingError(PayloadError):
    """The catalog names a shard or a row group that is not there."""

    code = "payload_missing"


class PayloadCorruptError(PayloadError):
    """Bytes that do not match their checksum, or a file that is torn or lies about itself."""

    code = "payload_corrupt"


class PayloadForeignError(PayloadError):
    """A sound payload of something else: other tokens, fingerprint or namespace than asked for."""

    code = "payload_foreign"


class FormatVersionError(PayloadError):
    """A payload written by a newer format than this reader knows."""

    code = "format_version"
