"""Fingerprints: every field counts, and a difference is told by name."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace

import pytest

from kvlink_core.fingerprint import Fingerprint, digest_of_tokens, token_bytes

ONE = Fingerprint(model="m", weights="w", tokenizer="t", rope="r", dtype="float32", template="x")


@pytest.mark.parametrize("name", [f.name for f in fields(Fingerprint)])
def test_every_field_changes_the_digest_and_is_named(name: str) -> None:
    other = replace(ONE, **{name: 99 if name == "format" else "other"})
    assert other.digest != ONE.digest
    assert set(ONE.difference(other)) == {name}


def test_json_round_trip() -> None:
    import json

    assert Fingerprint.from_mapping(json.loads(ONE.to_json())) == ONE


def test_the_digest_is_fixed_for_ever() -> None:
    """A golden value: stores on disks depend on it."""
    assert ONE.digest == "e9fce0708d184e0c7168315c35eec3592b7b88158a3cc13e62c016f21712832a"


def test_other_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="colour"):
        Fingerprint.from_mapping({"colour": "red"})


def test_token_ids_as_bytes_and_their_digest_are_fixed_for_ever() -> None:
    assert token_bytes([1, 258, 2**32 - 1]) == b"\1\0\0\0\2\1\0\0\xff\xff\xff\xff"
    assert digest_of_tokens([1, 258]) == hashlib.sha256(b"\1\0\0\0\2\1\0\0").hexdigest()
    assert token_bytes([]) == b""
    for beyond in (-1, 2**32):
        with pytest.raises(AssertionError):
            token_bytes([beyond])
