"""Several writers at once, and writers that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from store_places import Place, make_cache, same

TESTS = Path(__file__).parent.parent


# Five commits of two documents each, one of them wanted by all workers.
WORKER = """
import sys
from store_places import FINGERPRINT, make_cache
from kvlink_core.store import DocumentStore
url, worker = sys.argv[1], int(sys.argv[2])
with DocumentStore.open(url, fingerprint=FINGERPRINT, create=True) as store:
    for step in range(5):
        entries = [(f"{worker}-{step}", make_cache(4, 100 * worker + step)), ("shared", make_cache(4, 7))]
        store.commit(store.write_shard(entries))
"""


def start(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    return subprocess.Popen([sys.executable, "-c", script, *arguments], env=environment)


def test_concurrent_writers_lose_nothing(local: Place) -> None:
    workers = [start(WORKER, local.url, str(n)) for n in range(3)]  # they also race to create the store
    assert [w.wait(120) for w in workers] == [0, 0, 0]
    store = local.open()
    expected = {f"{n}-{step}": make_cache(4, 100 * n + step) for n in range(3) for step in range(5)}
    rows = store.lookup([*expected, "shared"])
    assert len(rows) == 16
    assert all(
        same(found, expected[i]) for i, found in zip(expected, store.load([rows[i] for i in expected]), strict=True)
    )
    assert same(store.load([rows["shared"]])[0], make_cache(4, 7))


KILLED = """
import os, signal, sys
from store_places import FINGERPRINT, make_cache
from kvlink_core.store import DocumentStore, writing as module
url, when = sys.argv[1:]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
store = DocumentStore.open(url, fingerprint=FINGERPRINT)
if when == "in the middle of the file":
    written = module.write_payload
    def tear(file, *arguments):
        name = written(file, *arguments)
        file.truncate(file.tell() // 2)
        file.flush()
        die()
    module.write_payload = tear
elif when == "before the rename":
    os.replace = die
elif when == "in the commit":
    from kvlink_core.store import catalog
    catalog.write_deltalake = die
rows = store.write_shard([("b", make_cache(5, 2)), ("c", make_cache(5, 3))])
if when == "before the commit":
    die()
store.commit(rows)
"""


def test_killed_writers_leave_nothing_visible_and_nothing_in_the_way(local: Place) -> None:
    store = local.open(create=True)
    a = make_cache(4, 1)
    store.commit(store.write_shard([("a", a)]))
    before = set(local.names("shards"))
    for when in ("in the middle of the file", "before the rename", "before the commit", "in the commit"):
        assert start(KILLED, local.url, when).wait(120) == -signal.SIGKILL, when
        reader = local.open()
        assert set(reader.lookup(["a", "b", "c"])) == {"a"}, when
        assert same(reader.load([reader.lookup(["a"])["a"]])[0], a)
    # Only temporary files and one whole shard that no row names; names are the content's, so two kills left one file.
    left = set(local.names("shards")) - before
    assert sum(not name.startswith(".tmp-") for name in left) == 1
    again = local.open(create=True)
    again.commit(again.write_shard([("b", make_cache(5, 2)), ("c", make_cache(5, 3))]))
    assert sum(not name.startswith(".tmp-") for name in set(local.names("shards")) - before) == 1
    rows = local.open().lookup(["b", "c"])
    assert all(same(f, make_cache(5, n)) for f, n in zip(again.load([rows["b"], rows["c"]]), (2, 3), strict=True))
