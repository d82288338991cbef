"""The directory of a store: finding one, making one, and telling whose caches it holds."""

from __future__ import annotations

import hashlib
import json
from typing import IO

from kvlink_core.errors import (
    ConfigError,
    FingerprintMismatchError,
    FormatVersionError,
    StoreNotFoundError,
    StoreUnavailableError,
)
from kvlink_core.fingerprint import Fingerprint
from kvlink_core.store.storage import Storage

MARKER = "store.json"
STORE_VERSION = 1
_MARKER_BYTES = json.dumps({"format": "kvlink-store", "version": STORE_VERSION}, separators=(",", ":")).encode()


def check_store(storage: Storage) -> None:
    """Raise unless there is a store of a version that this code knows.

    Raises ``StoreNotFoundError``, ``FormatVersionError`` or ``StoreUnavailableError``.
    """
    try:
        data = storage.read(MARKER)
    except FileNotFoundError as error:
        storage.names("")  # tells a file or an unreadable directory from an absent store
        raise StoreNotFoundError(
            f"there is no KVLink store at {storage.url}. Run precompute with this path to make one."
        ) from error
    try:
        marker = json.loads(data)
        sound = marker["format"] == "kvlink-store" and isinstance(marker["version"], int)
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise StoreUnavailableError(
            f"{storage.url}/{MARKER} is damaged; a sound one contains {_MARKER_BYTES.decode()} and nothing else."
        )
    if marker["version"] > STORE_VERSION:
        raise FormatVersionError(
            f"the store {storage.url} has version {marker['version']}, and this version of KVLink reads up to "
            f"{STORE_VERSION}. Upgrade KVLink."
        )


def create_store(storage: Storage) -> None:
    """Make a store, or complete one whose making was interrupted; afterwards it can be written to.

    Refuses a directory that holds anything else. Several may try at once. Raises ``StoreUnavailableError``.
    """
    try:
        check_store(storage)
        storage.prepare()
    except StoreNotFoundError as error:
        if names := storage.names(""):
            raise StoreUnavailableError(
                f"{storage.url} is not empty and not a KVLink store (it holds {', '.join(names[:3])}"
                f"{', ...' if len(names) > 3 else ''}). Give an empty or a new path."
            ) from error
        storage.prepare()
        storage.publish("", lambda file: _write(file, MARKER, _MARKER_BYTES))


def _write(file: IO[bytes], name: str, data: bytes) -> str:
    file.write(data)
    return name


def fingerprints(storage: Storage) -> list[str]:
    """Digests of all fingerprints that the store holds caches of."""
    names = storage.names("fingerprints")
    return [n.removesuffix(".json") for n in names if n.endswith(".json")]


def add_fingerprint(storage: Storage, fingerprint: Fingerprint) -> None:
    """Write down the fields of ``fingerprint``."""
    add_fingerprint_json(storage, fingerprint.to_json())


def add_fingerprint_json(storage: Storage, text: str) -> None:
    """The same, of a fingerprint's canonical JSON, which may be of another version than this one's."""
    data = text.encode()
    storage.publish("fingerprints", lambda file: _write(file, f"{hashlib.sha256(data).hexdigest()}.json", data))


def only_fingerprint(storage: Storage) -> Fingerprint:
    """The one fingerprint that the store holds. Raises ``ConfigError`` when there is none or more than one."""
    held = fingerprints(storage)
    if len(held) != 1:
        raise ConfigError(
            f"the store {storage.url} holds caches of {len(held)} models; say which by giving a fingerprint.",
            param="fingerprint",
        )
    found = read_fingerprint(storage, held[0])
    if found is None:
        raise StoreUnavailableError(f"{storage.url}/fingerprints/{held[0]}.json is damaged.")
    return found


def _read_fingerprint(storage: Storage, digest: str) -> Fingerprint:
    data = storage.read(f"fingerprints/{digest}.json")
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError("does not hash to its name")
    return Fingerprint.from_mapping(json.loads(data))


def read_fingerprint(storage: Storage, digest: str) -> Fingerprint | None:
    """The fields behind ``digest``, or ``None`` where they are missing or damaged.

    Raises ``StoreUnavailableError`` when the store does not answer.
    """
    try:
        return _read_fingerprint(storage, digest)
    except (ValueError, TypeError, RecursionError, FileNotFoundError):
        return None


def check_fingerprint(storage: Storage, wanted: Fingerprint) -> None:
    """Raise ``FingerprintMismatchError`` when the store holds caches, but none of ``wanted``."""
    held = fingerprints(storage)
    if not held or wanted.digest in held:
        return
    shown = [difference(storage, digest, wanted) for digest in held[:3]]
    raise FingerprintMismatchError(
        f"the store {storage.url} was made with another model or template: {'; or '.join(shown)}. "
        "Use the model that it was made with, or another store path."
    )


def difference(storage: Storage, digest: str, wanted: Fingerprint) -> str:
    """What differs between a held fingerprint and ``wanted``, as text: ``field: held != wanted``."""
    held = read_fingerprint(storage, digest)
    if held is None:
        return f"fingerprint {digest[:12]}... (its fields cannot be read) != {wanted.digest[:12]}..."
    pairs = held.difference(wanted)
    return ", ".join(f"{name}: {_short(a)} != {_short(b)}" for name, (a, b) in pairs.items())


def _short(value: object) -> str:
    text = str(value) or '""'
    return text if len(text) <= 120 else f"{text[:120]}..."
