"""API keys: ``python -m serve.keys create|list|revoke``, and the ring of keys that the ingress asks.

A key is ``kvl_<id>_<secret>``. The secret has 256 random bits and is shown once; the file has only its keyed hash
(HMAC-SHA256 under a salt of its own and, if the environment has it, the pepper ``KVLINK_KEYS_PEPPER``, which then must
be kept apart from the file). A slow hash protects what people choose; nobody chooses these.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from kvlink_core.errors import ConfigError, KVLinkError

logger = logging.getLogger("ray.serve")

PEPPER_VARIABLE = "KVLINK_KEYS_PEPPER"
FILE_VARIABLE = "KVLINK_KEYS"

#: How often the file is looked at: a revoked key works for so long at most.
_LOOK_EVERY_S = 1.0

#: The longest ``Authorization`` header that is read.
_LONGEST = 256

# As the store has it; said again because the store brings torch, which the ingress does without.
Namespace = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")]
_Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Role = Literal["user", "admin"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: whose documents they may use, whether they may change them, and with which key."""

    namespace: str
    admin: bool
    key_id: str = "anonymous"


class KeyRecord(BaseModel):
    """A key as the file has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    namespace: Namespace
    role: Role
    name: str = ""
    salt: _Hex
    hash: _Hex
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None


class KeyFile(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[KeyRecord, ...] = ()


#: Compared with where there is no such key, so that a wrong id takes as long as a wrong secret. Nothing hashes to it.
_NOBODY = KeyRecord(
    id="0" * 12,
    namespace="nobody",
    role="user",
    salt="0" * 64,
    hash="0" * 64,
    created_at=datetime(2000, 1, 1, tzinfo=UTC),
)


def _hash(salt: str, secret: str) -> str:
    key = bytes.fromhex(salt) + os.environ.get(PEPPER_VARIABLE, "").encode()
    return hmac.new(key, secret.encode(), hashlib.sha256).hexdigest()


def read_keys(path: Path) -> KeyFile:
    """The keys of a file.

    Raises:
        ConfigError: it cannot be read or is not what it should be. Names no secret.
    """
    try:
        keys = KeyFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read the keys file {str(path)!r}: {error.strerror}.", param="keys") from None
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in fault["loc"]) or "the file"
        raise ConfigError(f"keys file {str(path)!r}: {place}: {fault['msg']}.", param="keys") from None
    return keys


class KeyRing:
    """The keys of a file, which is read again when it changes. For one thread.

    A file that is gone lets nobody in; one that is damaged is reported and changes nothing, so that a slip of the
    operator does not lock everybody out.

    Args:
        path: made by ``python -m serve.keys``.

    Raises:
        ConfigError: as ``read_keys``, now; later it is only logged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked = time.monotonic()
        self._seen = self._mark()
        self._records = {record.id: record for record in read_keys(path).keys}

    def find(self, authorization: str | None) -> Caller | None:
        """Whose key an ``Authorization`` header holds; ``None`` for none, a wrong, revoked or expired one.

        Takes the same time whether the id or the secret is wrong.
        """
        self._look()
        scheme, _, token = (authorization or "")[:_LONGEST].partition(" ")
        parts = token.strip().split("_", 2)
        sound = scheme.lower() == "bearer" and len(parts) == 3 and parts[0] == "kvl"
        record = self._records.get(parts[1], _NOBODY) if sound else _NOBODY
        equal = hmac.compare_digest(_hash(record.salt, parts[-1]), record.hash)
        expired = record.expires_at is not None and record.expires_at <= datetime.now(UTC)
        if not equal or expired or record is _NOBODY:
            return None
        return Caller(record.namespace, record.role == "admin", record.id)

    def _mark(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY_S:
            return
        self._looked = now
        mark = self._mark()
        if mark == self._seen:
            return
        self._seen = mark
        if mark is None:
            logger.error("the keys file is gone: nobody is let in")
            self._records = {}
            return
        try:
            self._records = {record.id: record for record in read_keys(self._path).keys}
        except KVLinkError as error:
            logger.error("the keys stay as they were: %s", error)


def create_key(
    path: Path, *, namespace: str, role: Role, name: str = "", expires: timedelta | None = None
) -> tuple[KeyRecord, str]:
    """Add a key to a file, which is made if need be; returns it and its secret text, which is kept nowhere.

    Raises ``ConfigError`` for an impossible namespace or an unusable file.
    """
    key_id, secret, salt = secrets.token_hex(6), secrets.token_urlsafe(32), secrets.token_hex(32)
    now = datetime.now(UTC).replace(microsecond=0)
    try:
        record = KeyRecord(
            id=key_id, namespace=namespace, role=role, name=name, salt=salt, hash=_hash(salt, secret),
            created_at=now, expires_at=now + expires if expires else None,
        )  # fmt: skip
    except ValidationError:
        raise ConfigError(
            f"namespace {namespace[:100]!r} is not 1 to 64 of A-Z a-z 0-9 . _ - (and no leading dot).",
            param="namespace",
        ) from None
    with _changing(path) as records:
        records.append(record)
    return record, f"kvl_{key_id}_{secret}"


def revoke_key(path: Path, key_id: str) -> KeyRecord:
    """Take a key out of a file. Raises ``ConfigError`` when it is not there."""
    with _changing(path) as records:
        for record in records:
            if record.id == key_id:
                records.remove(record)
                return record
        raise ConfigError(f"there is no key {key_id!r} in {str(path)!r}.")


@contextmanager
def _changing(path: Path) -> Iterator[list[KeyRecord]]:
    """The records, written back in one step; two that change them wait for each other."""
    try:
        with open(path.with_name(f"{path.name}.lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            records = list(read_keys(path).keys) if path.exists() else []
            yield records
            _write(path, records)
    except OSError as error:
        raise ConfigError(f"cannot write the keys file {str(path)!r}: {error.strerror}.") from None


def _write(path: Path, records: Sequence[KeyRecord]) -> None:
    content = json.dumps(KeyFile(keys=tuple(records)).model_dump(mode="json"), indent=2)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:  # mode 0600
        file.write(content + "\n")
    os.replace(file.name, path)


app = typer.Typer(add_completion=False, help="API keys of the service.", no_args_is_help=True)
_File = Annotated[Path, typer.Option("--file", envvar=FILE_VARIABLE, help="the keys file")]


@app.command()
def create(
    file: _File,
    namespace: Annotated[str, typer.Option(help="whose documents it may use")] = "default",
    admin: Annotated[bool, typer.Option("--admin", help="may also add and delete documents")] = False,
    name: Annotated[str, typer.Option(help="for you to know it by")] = "",
    days: Annotated[float | None, typer.Option(help="how long it works", min=0)] = None,
) -> None:
    """Make a key. It is printed once, on standard output."""
    record, key = create_key(
        file,
        namespace=namespace,
        role="admin" if admin else "user",
        name=name,
        expires=None if days is None else timedelta(days=days),
    )
    typer.echo(f"key {record.id} for namespace {record.namespace!r} ({record.role}); it is not shown again:", err=True)
    typer.echo(key)


@app.command("list")
def list_(file: _File) -> None:
    """Show the keys, without their secrets."""
    for record in read_keys(file).keys:
        ends = f"until {record.expires_at:%Y-%m-%d %H:%M}" if record.expires_at else "no end"
        typer.echo(
            f"{record.id}  {record.role:5}  {record.namespace}  {record.created_at:%Y-%m-%d}  {ends}  {record.name}"
        )


@app.command()
def revoke(key_id: str, file: _File) -> None:
    """Take a key back. Running services notice within a second or so."""
    record = revoke_key(file, key_id)
    typer.echo(f"revoked {record.id} of namespace {record.namespace!r}")


def main() -> None:
    """Exit with 0, or with 2 after one line on standard error."""
    try:
        app()
    except KVLinkError as error:
        typer.echo(f"Error: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
