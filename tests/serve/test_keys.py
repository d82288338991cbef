"""API keys: what the file holds, who is let in, and what happens when the file changes."""

from __future__ import annotations

import json
import stat
import time
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvlink_core.errors import ConfigError
from kvlink_core.store.manifest import NAMESPACE
from serve import keys
from serve.keys import Caller, KeyRing, create_key, read_keys, revoke_key


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def look_again(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "_looked", float("-inf"))


def test_a_key_lets_its_caller_in_and_the_file_cannot_be_used_as_one(file: Path) -> None:
    record, key = create_key(file, namespace="acme", role="admin", name="ci")
    ring = KeyRing(file)
    assert ring.find(f"Bearer {key}") == Caller("acme", admin=True, key_id=record.id)
    assert ring.find(f"bearer  {key} ") == Caller("acme", admin=True, key_id=record.id)
    content = file.read_text("utf-8")
    secret = key.split("_", 2)[2]
    assert len(secret) >= 43
    assert secret not in content
    assert ring.find(f"Bearer kvl_{record.id}_{record.hash}") is None
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        "",
        "Bearer",
        "Bearer kvl",
        "Bearer kvl__",
        "Bearer kvl_000000000000_",
        "Bearer kvl_000000000000_" + "0" * 64,
        "Basic {key}",
        "Bearer {key}x",
        "Bearer {short}",
        "Bearer {other}",
        "Bearer \u00e9\u00ff",
        "Bearer " + "x" * 10_000,
    ],
)
def test_wrong_keys_are_nobody(file: Path, wrong: str | None) -> None:
    record, key = create_key(file, namespace="acme", role="user")
    other = f"kvl_{'f' * 12}_{key.split('_', 2)[2]}"
    ring = KeyRing(file)
    given = wrong and wrong.format(key=key, short=key[:-1], other=other)
    assert ring.find(given) is None
    assert ring.find(f"Bearer {key}") == Caller("acme", admin=False, key_id=record.id)


def test_a_pepper_makes_the_file_alone_worthless(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(keys.PEPPER_VARIABLE, "salt is not enough")
    _, key = create_key(file, namespace="acme", role="user")
    assert KeyRing(file).find(f"Bearer {key}") is not None
    monkeypatch.delenv(keys.PEPPER_VARIABLE)
    assert KeyRing(file).find(f"Bearer {key}") is None


def test_keys_end(file: Path) -> None:
    _, key = create_key(file, namespace="acme", role="user", expires=timedelta(seconds=-1))
    assert KeyRing(file).find(f"Bearer {key}") is None


def test_a_running_service_sees_new_and_revoked_keys(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, first_key = create_key(file, namespace="acme", role="user")
    ring = KeyRing(file)
    _, second_key = create_key(file, namespace="globex", role="user")
    assert ring.find(f"Bearer {second_key}") is None
    look_again(ring, monkeypatch)
    assert ring.find(f"Bearer {second_key}") is not None
    revoke_key(file, first.id)
    look_again(ring, monkeypatch)
    assert ring.find(f"Bearer {first_key}") is None


def test_a_damaged_file_changes_nothing_and_a_missing_one_locks_up(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, key = create_key(file, namespace="acme", role="user")
    ring = KeyRing(file)
    file.write_text("{", "utf-8")
    look_again(ring, monkeypatch)
    assert ring.find(f"Bearer {key}") is not None
    file.unlink()
    look_again(ring, monkeypatch)
    assert ring.find(f"Bearer {key}") is None


def test_a_wrong_id_takes_as_long_as_a_wrong_secret(file: Path) -> None:
    record, _ = create_key(file, namespace="acme", role="user")
    ring = KeyRing(file)
    guesses = {"secret": f"Bearer kvl_{record.id}_{'x' * 43}", "id": f"Bearer kvl_{'f' * 12}_{'x' * 43}"}
    best = {}
    for name, guess in guesses.items():
        times = []
        for _ in range(300):
            began = time.perf_counter()
            ring.find(guess)
            times.append(time.perf_counter() - began)
        best[name] = min(times)
    # One without a hash would take a tenth. The comparison itself is hmac.compare_digest.
    assert 0.5 < best["id"] / best["secret"] < 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "Invalid JSON"),
        ('{"kyes": []}', "kyes"),
        ('{"keys": [{"id": "x"}]}', "keys.0.id"),
        ("[]", "the file"),
    ],
)
def test_unusable_files_are_one_line(file: Path, content: str, said: str) -> None:
    file.write_text(content, "utf-8")
    with pytest.raises(ConfigError, match="keys file") as caught:
        read_keys(file)
    assert said in str(caught.value)


@pytest.mark.parametrize("namespace", ["a", "A-b_c.9", "x" * 64, "", ".", "..", "../x", "a/b", "x" * 65, "a b", "ä"])
def test_namespaces_are_the_store_s(file: Path, namespace: str) -> None:
    if NAMESPACE.fullmatch(namespace):
        create_key(file, namespace=namespace, role="user")
    else:
        with pytest.raises(ConfigError, match="namespace"):
            create_key(file, namespace=namespace, role="user")


def test_the_command(file: Path) -> None:
    run = CliRunner().invoke
    made = run(
        keys.app, ["create", "--file", str(file), "--namespace", "acme", "--admin", "--name", "ci", "--days", "2"]
    )
    assert made.exit_code == 0
    key = made.stdout.strip()
    assert KeyRing(file).find(f"Bearer {key}") is not None
    listed = run(keys.app, ["list", "--file", str(file)]).stdout
    assert "acme" in listed
    assert "admin" in listed
    assert "until" in listed
    assert key.split("_", 2)[2] not in listed
    key_id = json.loads(file.read_text("utf-8"))["keys"][0]["id"]
    assert run(keys.app, ["revoke", key_id, "--file", str(file)]).exit_code == 0
    assert read_keys(file).keys == ()
    with pytest.raises(ConfigError, match="no key"):
        revoke_key(file, key_id)
