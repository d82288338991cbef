"""Where a store's files are: a local directory or a bucket, behind one small interface.

The Delta table does its own reading and writing; it only gets an address and options from here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import pyarrow as pa

from kvlink_core.errors import ConfigError, KVLinkError, StoreUnavailableError

#: Unfinished writes begin with this; readers ignore them.
TEMPORARY = ".tmp-"

_ANSI = re.compile(r"\x1b\[[0-9;]*m|[↳]")


@dataclass(frozen=True, slots=True)
class Tail:
    """The last bytes of a file, and its whole size where that is known without asking again."""

    data: bytes
    size: int | None


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes ``start`` to ``end`` (exclusive) of a file."""

    path: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A file as a listing shows it. ``modified`` is in seconds since 1970, by the storage's own clock."""

    path: str
    size: int
    modified: float


class Storage(Protocol):
    """Files under one root. Paths are relative, with ``/``. Safe to use from several threads.

    Where an exception is a *result*, it concerns that one file; it is never raised for the others' sake.
    """

    @property
    def url(self) -> str:
        """The root as the user wrote it, for messages."""
        ...

    @property
    def delta_url(self) -> str:
        """The root as deltalake wants it."""
        ...

    @property
    def delta_options(self) -> dict[str, str]:
        """``storage_options`` for deltalake."""
        ...

    def read(self, path: str) -> bytes:
        """A whole small file. Raises ``FileNotFoundError`` or ``StoreUnavailableError``."""
        ...

    def names(self, path: str) -> list[str]:
        """Names directly under a directory, unfinished writes left out; empty when there is no such directory.

        Raises ``StoreUnavailableError``, also when it is a file.
        """
        ...

    def entries(self, path: str) -> list[Entry]:
        """All regular files under a directory, however deep, unfinished writes included; sorted by path.

        Empty when there is no such directory. Raises ``StoreUnavailableError``.
        """
        ...

    def modified(self, path: str) -> float | None:
        """When a file was written, or ``None`` when there is none. Raises ``StoreUnavailableError``."""
        ...

    def now(self) -> float:
        """The time on the clock that ``modified`` is told by. Raises ``StoreUnavailableError``."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file; one that is not there is fine. Raises ``StoreUnavailableError``."""
        ...

    def move(self, path: str, to: str) -> None:
        """Give a file another path, not necessarily atomically: killed in between, both may be there, never neither.

        Raises ``FileNotFoundError`` or ``StoreUnavailableError``.
        """
        ...

    def prepare(self) -> None:
        """Make the root so that it can be written to, and prove it. Raises ``StoreUnavailableError``."""
        ...

    def publish(self, directory: str, write: Callable[[IO[bytes]], str]) -> str:
        """Write a file so that it appears whole or not at all, replacing any of that name.

        ``write`` gets a file to write to and read back, and returns the name that it is to have in ``directory``.
        Returns that name.

        Raises ``StoreUnavailableError``; what ``write`` raises of its own passes through.
        """
        ...

    def tails(self, paths: Sequence[str], length: int) -> list[Tail | Exception]:
        """The last ``length`` bytes of each file (all of a shorter one), concurrently."""
        ...

    def open_ranges(self, ranges: Sequence[Range]) -> list[pa.NativeFile | Exception]:
        """Each range as a file in which its bytes stand at their own offsets; one concurrent round of requests.

        Several ranges of one path may come as one file, of which only one thread may read at a time.
        """
        ...


def describe(error: BaseException) -> str:
    """An exception of a library as part of one line."""
    text = " ".join(_ANSI.sub("", str(error)).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@contextmanager
def unavailable(what: str) -> Iterator[None]:
    """Turn whatever a storage library raises into ``StoreUnavailableError``, but for our own and missing files."""
    try:
        yield
    except (KVLinkError, FileNotFoundError):
        raise
    # Broad on purpose: file systems, botocore, aiohttp and delta-rs have no common root, and none of their types
    # means anything to a caller but that the store did not do what it was asked.
    except Exception as error:
        raise StoreUnavailableError(f"{what}: {describe(error)}") from error


def open_storage(url: str, options: Mapping[str, str] | None = None) -> Storage:
    """The storage at ``url``: a local path, ``file://`` or ``s3://bucket/prefix``.

    ``options`` are for S3, as object_store names them (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ...); what is
    not given comes from the environment. Raises ``ConfigError``.
    """
    from kvlink_core.store.local import LocalStorage

    scheme, separator, rest = url.partition("://")
    if not url or "\0" in url:
        raise ConfigError("the store's path is empty or has a zero byte.", param="store")
    if separator and scheme == "s3":
        from kvlink_core.store.s3 import S3Storage

        return S3Storage(rest.strip("/"), options or {})
    if separator and scheme != "file":
        raise ConfigError(f"a store can be a local path or s3://..., not {scheme}://.", param="store")
    if options:
        raise ConfigError(f"a local store takes no storage options, but got {sorted(options)}.", param="store")
    return LocalStorage(Path(rest if separator else url))
