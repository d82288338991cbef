"""A store in a local directory: files are mapped into memory to be read, and renamed into place to be written."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import pyarrow as pa

from kvlink_core.errors import ConfigError, StoreUnavailableError
from kvlink_core.store.storage import TEMPORARY, Entry, Range, Tail, unavailable


class LocalStorage:
    """See ``Storage``."""

    def __init__(self, root: Path) -> None:
        if "%" in str(root):
            raise ConfigError(
                f"the store's path {str(root)!r} has a '%', which the catalog's library misreads; use another name.",
                param="store",
            )
        self.url = str(root)
        # Absolute, so that a later change of the working directory does not move the store.
        self._root = Path(os.path.abspath(root))
        self.delta_options: dict[str, str] = {}
        self.delta_url = self._root.as_uri()

    def read(self, path: str) -> bytes:
        """See ``Storage.read``."""
        with unavailable(f"cannot read {self.url}/{path}"):
            try:
                return (self._root / path).read_bytes()
            except NotADirectoryError as error:
                raise FileNotFoundError(str(error)) from error

    def names(self, path: str) -> list[str]:
        """See ``Storage.names``."""
        with unavailable(f"cannot list {self.url}/{path}"):
            try:
                return sorted(n for n in os.listdir(self._root / path) if not n.startswith(TEMPORARY))
            except FileNotFoundError:
                return []

    def entries(self, path: str) -> list[Entry]:
        """See ``Storage.entries``. Symbolic links are nobody's files here, and are not followed."""
        found: list[Entry] = []
        with unavailable(f"cannot list {self.url}/{path}"):
            for folder, _, names in os.walk(self._root / path, onerror=_unless_missing):
                for name in names:
                    file = os.path.join(folder, name)
                    try:
                        status = os.lstat(file)
                    except FileNotFoundError:  # another process was faster
                        continue
                    if stat.S_ISREG(status.st_mode):
                        place = Path(file).relative_to(self._root).as_posix()
                        found.append(Entry(place, status.st_size, status.st_mtime))
        return sorted(found, key=lambda e: e.path)

    def modified(self, path: str) -> float | None:
        """See ``Storage.modified``."""
        with unavailable(f"cannot look at {self.url}/{path}"):
            try:
                return os.lstat(self._root / path).st_mtime
            except (FileNotFoundError, NotADirectoryError):
                return None

    def now(self) -> float:
        """See ``Storage.now``. A network file system has a clock of its own, so a file is written to read it."""
        probe = self._root / f"{TEMPORARY}{uuid.uuid4().hex}"
        with unavailable(f"cannot write to the store {self.url}"):
            try:
                probe.write_bytes(b"")
                return os.lstat(probe).st_mtime
            finally:
                probe.unlink(missing_ok=True)

    def remove(self, path: str) -> None:
        """See ``Storage.remove``."""
        with unavailable(f"cannot remove {self.url}/{path}"):
            (self._root / path).unlink(missing_ok=True)

    def move(self, path: str, to: str) -> None:
        """See ``Storage.move``."""
        with unavailable(f"cannot move {self.url}/{path}"):
            (self._root / to).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self._root / path, self._root / to)

    def prepare(self) -> None:
        """See ``Storage.prepare``."""
        with unavailable(f"cannot write to the store {self.url}"):
            try:
                self._root.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError as error:
                raise StoreUnavailableError(f"cannot make {self.url}: {error}") from error
            probe = self._root / f"{TEMPORARY}{uuid.uuid4().hex}"
            probe.write_bytes(b"")
            probe.unlink()

    def publish(self, directory: str, write: Callable[[IO[bytes]], str]) -> str:
        """See ``Storage.publish``."""
        folder = self._root / directory
        temporary = folder / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            with unavailable(f"cannot write to {self.url}/{directory}"):
                for level in (*reversed(folder.relative_to(self._root).parents), folder.relative_to(self._root)):
                    if level.parts:  # never the root itself: where a store was deleted, none is to grow again
                        (self._root / level).mkdir(exist_ok=True)
                with open(temporary, "x+b") as file:
                    name = write(file)
                    file.flush()
                    os.fsync(file.fileno())  # before the rename, or a power cut could leave the name without the bytes
                os.replace(temporary, folder / name)
                _sync_directory(folder)
                return name
        except FileNotFoundError as error:
            raise StoreUnavailableError(f"the store {self.url} is gone: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def tails(self, paths: Sequence[str], length: int) -> list[Tail | Exception]:
        """See ``Storage.tails``."""
        return [self._tail(path, length) for path in paths]

    def _tail(self, path: str, length: int) -> Tail | Exception:
        try:
            with open(self._root / path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(0, size - length))
                return Tail(file.read(length) or b"", size)
        except NotADirectoryError as error:
            return FileNotFoundError(str(error))
        except OSError as error:
            return error

    def open_ranges(self, ranges: Sequence[Range]) -> list[pa.NativeFile | Exception]:
        """See ``Storage.open_ranges``."""
        # As many mappings of a file as there are processors to read it: few to open, and enough to read side by side.
        width = os.cpu_count() or 1
        maps: dict[tuple[str, int], pa.NativeFile | Exception] = {}
        opened: list[pa.NativeFile | Exception] = []
        for number, wanted in enumerate(ranges):
            key = (wanted.path, number % width)
            if key not in maps:
                maps[key] = self._map(wanted.path)
            file = maps[key]
            if not isinstance(file, Exception) and file.size() < wanted.end:  # a bus error, not an exception
                file = EOFError(f"{file.size()} bytes instead of at least {wanted.end}")
            opened.append(file)
        return opened

    def _map(self, path: str) -> pa.NativeFile | Exception:
        try:
            return pa.memory_map(str(self._root / path), "r")
        # Arrow raises ArrowInvalid beside OSError here, e.g. for a file that was emptied.
        except (OSError, pa.ArrowException) as error:
            return error


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
