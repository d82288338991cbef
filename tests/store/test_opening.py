"""Local paths that are not what one hoped for, and addresses that are none."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from store_places import FINGERPRINT, local_place, make_cache, same

from kvlink_core.errors import ConfigError, StoreNotFoundError, StoreUnavailableError, UnknownCodecError
from kvlink_core.store import DocumentStore


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize("url", ["{tmp}/a-file", "{tmp}/a-file/below"])
def test_a_file_is_no_store(tmp_path: Path, url: str, create: bool) -> None:
    (tmp_path / "a-file").write_text("x")
    error = (
        StoreUnavailableError if create or not url.endswith("below") else (StoreNotFoundError, StoreUnavailableError)
    )
    with pytest.raises(error):
        DocumentStore.open(url.format(tmp=tmp_path), fingerprint=FINGERPRINT, create=create)
    assert (tmp_path / "a-file").read_text() == "x"


def test_what_cannot_be_made_is_unavailable() -> None:
    with pytest.raises(StoreUnavailableError):
        DocumentStore.open("/proc/no-such/store", fingerprint=FINGERPRINT, create=True)


def test_what_cannot_be_written_is_found_out_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DocumentStore.open(str(tmp_path / "s"), fingerprint=FINGERPRINT, create=True).close()

    def refuse(*_: Any) -> None:  # the tests may run as root, whom no mode bits stop
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(StoreUnavailableError, match="cannot write"):
        DocumentStore.open(str(tmp_path / "s"), fingerprint=FINGERPRINT, create=True)
    DocumentStore.open(str(tmp_path / "s"), fingerprint=FINGERPRINT).close()


def test_a_store_that_vanishes(tmp_path: Path) -> None:
    place = local_place(tmp_path / "s")
    with place.open(create=True) as store:
        store.commit(store.write_shard([("a", make_cache(3, 1))]))
        (tmp_path / "s").rename(tmp_path / "gone")
        with pytest.raises(StoreUnavailableError):
            store.write_shard([("b", make_cache(3, 2))])
        with pytest.raises(StoreNotFoundError):
            store.commit([store.alias("b", store.lookup(["a"])["a"])])
        assert not (tmp_path / "s").exists()
        assert [type(e).__name__ for e in store.load(list(store.lookup(["a"]).values()))] == ["PayloadMissingError"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"url": ""}, ConfigError),
        ({"url": "a\0b"}, ConfigError),
        ({"url": "gs://bucket/x"}, ConfigError),
        ({"url": "s3://"}, ConfigError),
        ({"url": "100%"}, ConfigError),
        ({"url": "x", "namespace": "../x"}, ConfigError),
        ({"url": "x", "namespace": ""}, ConfigError),
        ({"url": "x", "namespace": "a\n"}, ConfigError),
        ({"url": "x", "codec": "zip"}, UnknownCodecError),
        ({"url": "x", "storage_options": {"AWS_REGION": "x"}}, ConfigError),
        ({"url": "s3://bucket", "storage_options": {"aws_regoin": "x"}}, ConfigError),
        ({"url": "x", "fingerprint": None}, ConfigError),
    ],
)
def test_impossible_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], error: type[Exception]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        DocumentStore.open(**({"fingerprint": FINGERPRINT, "create": True} | arguments))


@pytest.mark.parametrize("name", ["with space", "ünï#?&", "-dash", "'quote\"", "namespace=x"])
def test_odd_paths_and_relative_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    cache = make_cache(3, 1)
    with DocumentStore.open(name, fingerprint=FINGERPRINT, create=True) as store:
        monkeypatch.chdir("/")
        store.commit(store.write_shard([("a", cache)]))
    with DocumentStore.open(f"file://{tmp_path}/{name}", fingerprint=FINGERPRINT) as store:
        assert same(store.load([store.lookup(["a"])["a"]])[0], cache)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_dead_endpoint_is_said_soon() -> None:
    options = {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    }
    start = time.monotonic()
    for create in (False, True):
        with pytest.raises(StoreUnavailableError, match="s3://bucket/x"):
            DocumentStore.open("s3://bucket/x", fingerprint=FINGERPRINT, create=create, storage_options=options)
    assert time.monotonic() - start < 60  # the libraries' own patience is minutes
