"""A store as those who look after it see it: all namespaces, all models, all codecs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType

from kvlink_core.errors import ConfigError
from kvlink_core.store import layout
from kvlink_core.store.lifecycle.table import CatalogTable, Scope
from kvlink_core.store.manifest import check_namespace
from kvlink_core.store.shards import ShardReader
from kvlink_core.store.storage import Storage, open_storage

#: Called with what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Show no progress."""


class StoreKeeper:
    """An open store, for the functions of this package. For one thread at a time.

    Attributes:
        storage: its files.
        catalog: all of its rows.
        reader: its payloads.
    """

    def __init__(self, storage: Storage) -> None:
        """Use ``open`` instead, which checks what is there."""
        self.url = storage.url
        self.storage = storage
        self.catalog = CatalogTable(storage)
        self.reader = ShardReader(storage)

    @classmethod
    def open(cls, url: str, *, storage_options: Mapping[str, str] | None = None) -> StoreKeeper:
        """Open the store at ``url``, whatever models it holds caches of.

        Raises ``StoreNotFoundError``, ``StoreUnavailableError``, ``FormatVersionError`` or ``ConfigError``.
        """
        storage = open_storage(str(url), storage_options)
        layout.check_store(storage)
        return cls(storage)

    def __enter__(self) -> StoreKeeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads."""
        self.reader.close()

    def scope(self, namespace: str | None = None, fingerprint: str | None = None, codec: str | None = None) -> Scope:
        """What is meant, from what a user wrote: a fingerprint may be given by its first digits.

        Raises ``ConfigError`` for an impossible namespace, and for a fingerprint that fits none or several.
        """
        if namespace is not None:
            check_namespace(namespace)
        if fingerprint is not None:
            held = [d for d in layout.fingerprints(self.storage) if d.startswith(fingerprint)]
            if len(held) != 1:
                raise ConfigError(
                    f"fingerprint {fingerprint[:64]!r} is the beginning of {len(held)} of those in {self.url}; "
                    "`kvlink store stats` shows them.",
                    param="fingerprint",
                )
            fingerprint = held[0]
        return Scope(namespace, fingerprint, codec)
