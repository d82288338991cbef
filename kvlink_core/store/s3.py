"""A store in an S3 bucket, or in anything that speaks S3 with conditional puts."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import pyarrow as pa

from kvlink_core.errors import ConfigError, StoreUnavailableError
from kvlink_core.store.storage import TEMPORARY, Entry, Range, Tail, describe, unavailable

#: Options as object_store names them, and what s3fs calls the same thing.
_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_SESSION_TOKEN": "token"}
_CLIENT = {"AWS_ENDPOINT_URL": "endpoint_url", "AWS_REGION": "region_name"}
_OPTIONS = {*_CREDENTIALS, *_CLIENT, "AWS_ALLOW_HTTP"}

#: One request moves one connection's worth of bandwidth; larger ranges are fetched in parts of this size.
_PART_BYTES = 16 * 2**20

#: Requests under way at a time. A query of many documents is one round of them; botocore's own limit is ten.
_CONNECTIONS = 128


class S3Storage:
    """See ``Storage``."""

    def __init__(self, root: str, options: Mapping[str, str]) -> None:
        if unknown := sorted(set(options) - _OPTIONS):
            raise ConfigError(f"storage options {unknown} are none of {sorted(_OPTIONS)}.", param="store")
        if not root:
            raise ConfigError("s3:// needs a bucket: s3://bucket/prefix.", param="store")
        try:
            import s3fs
        except ImportError as error:
            raise ConfigError("a store on S3 needs s3fs: pip install 'kvlink[s3]'.", param="store") from error

        self.url = self.delta_url = f"s3://{root}"
        self._root = root
        endpoint = options.get("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT_URL", ""))
        # The commit is a put that fails when the version exists already: that is what makes two writers safe.
        # delta-rs alone would try a dead endpoint for three minutes.
        self.delta_options = {
            "aws_conditional_put": "etag",
            "max_retries": "3",
            "retry_timeout": "30s",
            "connect_timeout": "5s",
            **({"AWS_ALLOW_HTTP": "true"} if endpoint.startswith("http://") else {}),
            **options,
        }
        client = {ours: options[name] for name, ours in _CLIENT.items() if name in options}
        self._fs: Any = s3fs.S3FileSystem(
            **{ours: options[name] for name, ours in _CREDENTIALS.items() if name in options},
            client_kwargs=client,
            config_kwargs={
                "connect_timeout": 5,
                "read_timeout": 60,
                "retries": {"max_attempts": 3},
                "max_pool_connections": _CONNECTIONS,
            },
            use_listings_cache=False,  # other writers add files
        )

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def read(self, path: str) -> bytes:
        """See ``Storage.read``."""
        with unavailable(f"cannot read {self.url}/{path}"):
            return bytes(self._fs.cat_file(self._at(path)))

    def names(self, path: str) -> list[str]:
        """See ``Storage.names``."""
        with unavailable(f"cannot list {self.url}/{path}"):
            try:
                found = self._fs.ls(self._at(path), detail=False, refresh=True)
            except FileNotFoundError:
                return []
            names = (str(name).rstrip("/").rpartition("/")[2] for name in found)
            return sorted(n for n in names if n and not n.startswith(TEMPORARY))

    def entries(self, path: str) -> list[Entry]:
        """See ``Storage.entries``."""
        with unavailable(f"cannot list {self.url}/{path}"):
            try:
                found = self._fs.find(self._at(path), detail=True, refresh=True)
            except FileNotFoundError:
                return []
            return sorted(
                (
                    Entry(str(name).removeprefix(f"{self._root}/"), int(info["size"]), info["LastModified"].timestamp())
                    for name, info in found.items()
                    if info["type"] == "file" and not str(name).endswith("/")
                ),
                key=lambda e: e.path,
            )

    def modified(self, path: str) -> float | None:
        """See ``Storage.modified``."""
        with unavailable(f"cannot look at {self.url}/{path}"):
            try:
                written = self._fs.info(self._at(path), refresh=True).get("LastModified")  # a prefix has none
            except FileNotFoundError:
                return None
            return None if written is None else float(written.timestamp())

    def now(self) -> float:
        """See ``Storage.now``. S3 tells times in whole seconds."""
        probe = f"{TEMPORARY}{uuid.uuid4().hex}"
        with unavailable(f"cannot write to the store {self.url}"):
            self._fs.pipe_file(self._at(probe), b"")
            found = self.modified(probe)
            self._fs.rm_file(self._at(probe))
        if found is None:
            raise StoreUnavailableError(f"the store {self.url} does not show what was just written to it.")
        return found

    def remove(self, path: str) -> None:
        """See ``Storage.remove``."""
        with unavailable(f"cannot remove {self.url}/{path}"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(path))

    def move(self, path: str, to: str) -> None:
        """See ``Storage.move``."""
        with unavailable(f"cannot move {self.url}/{path}"):
            self._fs.cp_file(self._at(path), self._at(to))
            self._fs.rm_file(self._at(path))

    def prepare(self) -> None:
        """See ``Storage.prepare``. The bucket must exist; making one needs rights that writers rarely have."""
        probe = self._at(f"{TEMPORARY}{uuid.uuid4().hex}")
        try:
            with unavailable(f"cannot write to the store {self.url}"):
                self._fs.pipe_file(probe, b"")
                self._fs.rm_file(probe)
        except FileNotFoundError as error:
            raise StoreUnavailableError(
                f"cannot write to {self.url}: {describe(error)}. Is the bucket there?"
            ) from error

    def publish(self, directory: str, write: Callable[[IO[bytes]], str]) -> str:
        """See ``Storage.publish``. Through a local file, because an upload that is broken off must not be completed."""
        with tempfile.NamedTemporaryFile(prefix="kvlink-") as file:
            name = write(file)
            file.flush()
            try:
                with unavailable(f"cannot write to {self.url}/{directory}"):
                    self._fs.put_file(file.name, self._at(f"{directory}/{name}".lstrip("/")))
            except FileNotFoundError as error:
                raise StoreUnavailableError(f"the store {self.url} is gone: {describe(error)}") from error
        return name

    def tails(self, paths: Sequence[str], length: int) -> list[Tail | Exception]:
        """See ``Storage.tails``."""
        found = self._cat([Range(path, -length, 0) for path in paths])
        # A shorter answer than asked for is the whole object; otherwise its size is not told.
        return [
            item if isinstance(item, Exception) else Tail(item, len(item) if len(item) < length else None)
            for item in found
        ]

    def open_ranges(self, ranges: Sequence[Range]) -> list[pa.NativeFile | Exception]:
        """See ``Storage.open_ranges``."""
        parts = [
            [Range(r.path, start, min(start + _PART_BYTES, r.end)) for start in range(r.start, r.end, _PART_BYTES)]
            for r in ranges
        ]
        answers = iter(self._cat([part for group in parts for part in group]))
        opened: list[pa.NativeFile | Exception] = []
        for wanted, group in zip(ranges, parts, strict=True):
            got = [next(answers) for _ in group]
            if errors := [g for g in got if isinstance(g, Exception)]:
                opened.append(errors[0])
                continue
            pieces = [g for g in got if isinstance(g, bytes)]
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            if len(data) != wanted.end - wanted.start:
                opened.append(EOFError(f"{len(data)} bytes instead of {wanted.end - wanted.start}"))
            else:
                opened.append(pa.PythonFile(_Window(data, wanted.start), mode="r"))
        return opened

    def _cat(self, ranges: Sequence[Range]) -> list[bytes | Exception]:
        """All ranges concurrently. ``end`` 0 stands for a suffix of ``-start`` bytes."""
        if not ranges:
            return []
        paths = [self._at(r.path) for r in ranges]
        ends = [r.end or None for r in ranges]
        try:
            # Errors come back as values here, on purpose: they concern one file each, and each is looked at above.
            found = self._fs.cat_ranges(paths, [r.start for r in ranges], ends, on_error="return")
        # Broad on purpose: what fails for all at once (no credentials, a closed loop) has no common type.
        except Exception as error:
            return [error] * len(ranges)
        return [_shorter(item) if isinstance(item, Exception) else item for item in found]


def _shorter(error: Exception) -> Exception:
    """The answer that a range begins beyond the object's end is about the object, so no failure of the store's."""
    answer = getattr(error.__cause__, "response", None)
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
    return EOFError(f"it ends before the bytes that are wanted ({describe(error)})") if status == 416 else error


class _Window(io.RawIOBase):
    """A read-only file of which only the bytes from ``start`` on are there; the rest reads as empty."""

    def __init__(self, data: bytes, start: int) -> None:
        super().__init__()
        self._data = memoryview(data)
        self._start = start
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._start + len(self._data)}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> memoryview:  # Arrow takes any buffer, and copies none
        begin = self._position - self._start
        if begin < 0:
            return self._data[:0]
        end = len(self._data) if size is None or size < 0 else begin + size
        piece = self._data[begin:end]
        self._position += len(piece)
        return piece
