"""Copies of a remote store's payloads on local disk, encoded as they are there.

Each is a shard of one document (FORMAT.md), named after its key and its footer, so it is checked like any other shard
when it is read: a damaged copy is removed and read from the store again. They outlive the process.
"""

from __future__ import annotations

import fcntl
import io
import logging
import mmap
import os
import re
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from kvlink_core.compress import EncodedDocument
from kvlink_core.errors import ConfigError, PayloadError
from kvlink_core.store.payload import (
    PayloadFile,
    check_asked,
    corrupt,
    footer_length,
    locate,
    parse_footer,
    read_document,
)
from kvlink_core.store.rows import CatalogRow
from kvlink_core.store.storage import TEMPORARY
from kvlink_core.store.tiers.key import CacheKey
from kvlink_core.store.tiers.memory_tier import TierStats
from kvlink_core.store.tiers.s3fifo import S3Fifo

logger = logging.getLogger(__name__)

_NAME = re.compile(r"([0-9a-f]{64})-([0-9a-f]{64}\.parquet)")

#: File systems give out space in units of this or less.
_UNIT = 4096

#: The most that a copy takes beyond its columns and token ids: page headers, and a footer that names 65,536 layers.
_OVERHEAD = 64 * 2**10

#: Once the disk has refused to take a copy, full for instance, no other is tried for so long.
_REST_S = 10.0

#: The most processes that share a directory.
_SLOTS = 256


@dataclass(slots=True)
class _Copy:
    shard: str
    nbytes: int
    leases: int = 0
    removed: bool = False  # while lent, its space is not free yet


class DiskTier:
    """Files in a directory, never more than ``capacity`` bytes of them. Safe to use from several threads.

    Each process works in a subdirectory of its own, the first that no living process has, and finds there what the one
    before it left; ``capacity`` is for each of them. A file that is being read is not removed.

    Args:
        directory: made if it is not there.
        capacity: bytes, in units of 4,096 as file systems count them.
        clock: seconds that only grow.

    Raises:
        ConfigError: the directory cannot be made, written to or locked.
    """

    def __init__(self, directory: Path, capacity: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._policy: S3Fifo[str] = S3Fifo(capacity)
        self._copies: dict[str, _Copy] = {}
        self._writing: set[str] = set()
        self._nbytes = self._lent_bytes = 0
        self._evictions = self._refused = 0
        self._lock = threading.Lock()
        self._ended: deque[_Copy] = deque()
        self._resting_until = float("-inf")
        self._clock = clock
        slot: int | None = None
        try:
            self._directory, slot = _own_slot(directory)
            self._take_over()
        except OSError as error:
            if slot is not None:
                os.close(slot)
            raise ConfigError(
                f"the disk tier cannot use {str(directory)!r}: {error.strerror or error}.", param="disk_path"
            ) from error
        self._slot = slot

    @property
    def stats(self) -> TierStats:
        """A consistent copy."""
        with self._lock:
            return TierStats(self._capacity, self._nbytes, len(self._copies), self._evictions, self._refused)

    def __contains__(self, key: CacheKey) -> bool:
        with self._lock:
            return key.digest in self._copies

    def get(self, row: CatalogRow) -> EncodedDocument | None:
        """The payload of ``row`` as it was stored, checked; ``None`` if it is not here, or not sound."""
        name = CacheKey.of(row).digest
        with self._lock:
            self._settle()
            copy = self._copies.get(name)
            if copy is None:
                return None
            self._policy.hit(name)
            self._lent_bytes += copy.nbytes if not copy.leases else 0
            copy.leases += 1
        try:
            data = self._map(name, copy)
            return _read(data, replace(row, shard=copy.shard, row_group=0))
        except (PayloadError, OSError) as error:
            # Its text alone: a log that kept the error would keep the frames in which the copy is lent.
            logger.warning(
                "the disk tier's copy of document %r is not sound, removing it: %s", row.document_id, str(error)
            )
        data = None  # its lease ends here
        with self._lock:
            self._settle()
            if self._copies.get(name) is copy:
                self._policy.remove(name)
                self._delete(name)
        return None

    def put(self, key: CacheKey, nbytes: int, write: Callable[[IO[bytes]], str]) -> bool:
        """Keep a file; false when there is no room that is not in use, or the disk refuses.

        Args:
            key: of the document.
            nbytes: of its columns and token ids together; the file may be larger by what Parquet adds.
            write: writes the shard and returns its name.
        """
        name = key.digest
        reserved = _units(nbytes + _OVERHEAD)
        with self._lock:
            self._settle()
            if name in self._copies or name in self._writing:
                return True
            if self._clock() < self._resting_until or not self._make_room(reserved):
                self._refused += 1
                return False
            self._nbytes += reserved
            self._writing.add(name)
        temporary = self._directory / f"{TEMPORARY}{uuid.uuid4().hex}"
        copy: _Copy | None = None
        try:
            with _Limited(temporary, reserved) as file:
                shard = write(file)
                size = file.seek(0, os.SEEK_END)
            os.replace(temporary, self._directory / f"{name}-{shard}")
            copy = _Copy(shard, _units(size))
        except (OSError, pa.ArrowException) as error:
            logger.warning("the disk tier cannot keep a document: %s", error)
            if isinstance(error, OSError) and error.errno is not None:  # not only this document's fault
                self._resting_until = self._clock() + _REST_S
        finally:
            if copy is None:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
            with self._lock:
                self._writing.discard(name)
                self._nbytes -= reserved - (copy.nbytes if copy else 0)
                if copy is not None:
                    self._copies[name] = copy
                    self._policy.add(name, copy.nbytes)
        return copy is not None

    def close(self) -> None:
        """Let another process have the directory; what is there stays for it."""
        with self._lock:
            self._copies.clear()
            self._capacity = 0
            if self._slot >= 0:
                os.close(self._slot)
            self._slot = -1

    def _take_over(self) -> None:
        """Take in, oldest first, what an earlier process left, and remove what is unfinished or too much."""
        found = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if match := _NAME.fullmatch(entry.name):
                    status = entry.stat()
                    found.append((status.st_mtime_ns, match[1], match[2], _units(status.st_size)))
                elif entry.name.startswith(TEMPORARY):
                    os.unlink(entry.path)
        for _, name, shard, nbytes in sorted(found):
            twice = name in self._copies
            if twice or not self._make_room(nbytes):
                os.unlink(self._directory / f"{name}-{shard}")
                continue
            self._copies[name] = _Copy(shard, nbytes)
            self._policy.add(name, nbytes)
            self._nbytes += nbytes

    def _make_room(self, nbytes: int) -> bool:
        if nbytes > self._capacity - self._lent_bytes:
            return False
        while self._nbytes + nbytes > self._capacity:
            name = self._policy.evict(lambda n: not self._copies[n].leases)
            if name is None:
                return False
            self._delete(name)
            self._evictions += 1
        return True

    def _delete(self, name: str) -> None:
        copy = self._copies.pop(name)
        (self._directory / f"{name}-{copy.shard}").unlink(missing_ok=True)
        copy.removed = True
        self._nbytes -= copy.nbytes if not copy.leases else 0

    def _map(self, name: str, copy: _Copy) -> pa.Buffer:
        """The file's bytes; the copy counts as lent until nothing refers to them."""
        try:
            with open(self._directory / f"{name}-{copy.shard}", "rb") as file:
                lease = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except (OSError, ValueError) as error:  # mmap's for an empty file
            self._ended.append(copy)
            raise OSError(f"{type(error).__name__}: {error}") from error
        weakref.finalize(lease, self._ended.append, copy).atexit = False
        return pa.py_buffer(lease)

    def _settle(self) -> None:
        while self._ended:
            copy = self._ended.popleft()
            copy.leases -= 1
            if not copy.leases:
                self._lent_bytes -= copy.nbytes
                self._nbytes -= copy.nbytes if copy.removed else 0


class _Limited(io.FileIO):
    """A new file that refuses to grow beyond what was reserved for it."""

    def __init__(self, path: Path, limit: int) -> None:
        super().__init__(path, "x+")
        self._limit = limit

    def write(self, data: bytes) -> int:  # type: ignore[override]  # any buffer, as FileIO has it
        view = memoryview(data)
        if self.tell() + view.nbytes > self._limit:
            raise OSError(f"it would take more than the {self._limit} bytes that were reserved")
        written = 0
        while written < view.nbytes:  # a raw file may take less than it is given
            written += super().write(view[written:])
        return written


def _read(data: pa.Buffer, row: CatalogRow) -> EncodedDocument:
    """The one document of a shard that is in memory, checked as FORMAT.md section 4 says. Raises ``PayloadError``."""
    with corrupt(row.shard):
        length = footer_length(data[max(0, data.size - 12) :].to_pybytes(), row.shard, data.size)
        footer = parse_footer(row.shard, data[data.size - length :].to_pybytes(), data.size)
        check_asked(footer, row)
        locate(footer, 0)
        return read_document(PayloadFile(pa.BufferReader(data), footer), 0, verify=True)


def _own_slot(directory: Path) -> tuple[Path, int]:
    """A subdirectory that no living process has, and the descriptor that keeps it so."""
    for number in range(_SLOTS):
        slot = directory / f"slot-{number}"
        slot.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(slot, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        except OSError:
            os.close(descriptor)
            raise
        return slot, descriptor
    raise OSError(f"{_SLOTS} processes use it already")


def _units(nbytes: int) -> int:
    return -(-nbytes // _UNIT) * _UNIT
