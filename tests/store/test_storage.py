"""The parts of a storage that maintenance needs, in a directory and in a bucket."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from store_places import Place

from kvlink_core.store.storage import Storage, open_storage


@pytest.fixture
def storage(place: Place) -> Storage:
    place.open(create=True)
    return open_storage(place.url, place.options)


def put(storage: Storage, directory: str, name: str, data: bytes) -> None:
    def write(file: object) -> str:
        file.write(data)  # type: ignore[attr-defined]
        return name

    storage.publish(directory, write)


def test_files_are_listed_however_deep(storage: Storage) -> None:
    assert storage.entries("nowhere") == []
    put(storage, "x/y=1/z", "b", b"12")
    put(storage, "x", "a", b"")
    put(storage, "x", ".tmp-1", b"1")
    before = storage.now()
    found = storage.entries("x")
    assert [(e.path, e.size) for e in found] == [("x/.tmp-1", 1), ("x/a", 0), ("x/y=1/z/b", 2)]
    assert all(before - 60 < e.modified <= before for e in found)
    assert [storage.modified(e.path) for e in found] == [e.modified for e in found]
    assert storage.modified("x/none") is None
    assert storage.modified("x/a/b") is None


def test_files_are_moved_and_removed(storage: Storage) -> None:
    put(storage, "x", "a", b"12")
    storage.move("x/a", "new/place/b")
    assert storage.modified("x/a") is None
    assert storage.read("new/place/b") == b"12"
    with pytest.raises(FileNotFoundError):
        storage.move("x/a", "y")
    storage.remove("new/place/b")
    storage.remove("new/place/b")
    assert storage.modified("new/place/b") is None


def test_links_are_left_alone(local: Place, tmp_path: Path) -> None:
    local.open(create=True)
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "file").write_bytes(b"1")
    os.symlink(outside, Path(local.url) / "folder")
    os.symlink(outside / "file", Path(local.url) / "file")
    assert not any("folder" in e.path or e.path == "file" for e in open_storage(local.url).entries(""))
