"""``kvlink store`` as a user types it: what every subcommand prints, does and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Done, Kvlink
from safetensors.torch import load_file
from store_keeping import make_old, put
from store_places import Place, make_cache, same

from kvlink_core.store import DocumentStore
from kvlink_core.types import DocumentCache

CACHES = {f"doc-{i}": make_cache(3 + i, i) for i in range(6)}
SECRET = {"secret": make_cache(5, 77)}

Run = Callable[..., Done]


@pytest.fixture
def store(local: Place) -> DocumentStore:
    """Six documents in three shards, and another tenant's."""
    made = local.open(create=True)
    names = list(CACHES)
    for start in (0, 2, 4):
        put(made, {n: CACHES[n] for n in names[start : start + 2]})
    put(local.open(namespace="theirs"), SECRET)
    return made


@pytest.fixture
def run(kvlink: Kvlink, store: DocumentStore, local: Place) -> Run:
    """``kvlink store COMMAND`` on that store, which must not end in a traceback."""

    def call(command: str, *arguments: str, code: int = 0) -> Done:
        done = kvlink("store", command, local.url, *arguments)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return call


def parsed(done: Done) -> Any:
    return json.loads(done.stdout)


def documents(run: Run, *arguments: str) -> set[str]:
    return {row["document_id"] for row in parsed(run("ls", "--limit", "0", "--json", *arguments))["rows"]}


def shards(local: Place) -> int:
    return len(local.names("shards"))


def test_help_names_every_command(kvlink: Kvlink) -> None:
    shown = kvlink("store", "--help").stdout
    for command in ("ls", "inspect", "stats", "verify", "delete", "expire", "gc", "compact", "rebuild", "export"):
        assert f" {command} " in shown
        assert kvlink("store", command, "--help").returncode == 0


def test_ls(run: Run) -> None:
    done = run("ls")
    assert all(name in done.stdout for name in CACHES)
    assert "secret" not in done.stdout
    assert "6 documents" in done.stdout
    assert "2 shown; --limit 0 shows all" in run("ls", "--limit", "2").stdout
    found = parsed(run("ls", "--prefix", "doc-3", "--json"))
    assert (found["total"], found["rows"][0]["document_id"], found["rows"][0]["tokens"]) == (1, "doc-3", 6)
    assert documents(run, "--namespace", "theirs") == {"secret"}
    assert documents(run, "--codec", "int8") == set()


def test_inspect(run: Run, store: DocumentStore, local: Place) -> None:
    row = store.lookup(["doc-2"])["doc-2"]
    done = run("inspect", "doc-2")
    assert row.shard in done.stdout
    assert "sound" in done.stdout
    (item,) = parsed(run("inspect", "doc-2", "--json"))
    assert (item["row"]["token_digest"], item["problem"], item["manifest"]["layers"]) == (row.token_digest, None, 3)
    assert "doc-2" in run("inspect", "--shard", row.shard[:16]).stdout
    assert parsed(run("inspect", "--shard", row.shard[:16], "--json"))["ids"] == {"0": ["doc-2"], "1": ["doc-3"]}
    local.delete(f"shards/{row.shard}")
    assert "payload_missing" in run("inspect", "doc-2", code=1).stdout


def test_stats(run: Run) -> None:
    done = run("stats")
    for word in ("default", "theirs", "raw", "under an hour", "tiny"):
        assert word in done.stdout
    found = parsed(run("stats", "--json"))
    assert found["total"]["documents"] == 7
    assert {(g["namespace"], g["codec"]): g["amount"]["tokens"] for g in found["groups"]} == {
        ("default", "raw"): sum(c.tokens for c in CACHES.values()), ("theirs", "raw"): 5
    }  # fmt: skip
    assert found["ages"]["under an hour"]["documents"] == 7
    assert (found["files"]["shards"], found["files"]["unnamed"]) == (4, 0)
    assert parsed(run("stats", "--namespace", "theirs", "--json"))["total"]["documents"] == 1


def test_verify(run: Run, store: DocumentStore, local: Place) -> None:
    done = run("verify", "--jobs", "3")
    assert "read and checked 7 documents" in done.stdout
    assert "all can be served" in done.stdout
    assert "verifying" in done.stderr  # the bar
    row = store.lookup(["doc-4"])["doc-4"]
    data = bytearray(local.read(f"shards/{row.shard}"))
    data[data.index(CACHES["doc-4"].keys.numpy().tobytes()[:32])] ^= 1
    local.write(f"shards/{row.shard}", bytes(data))
    done = run("verify", code=1)
    assert "doc-4" in done.stdout
    assert "1 cannot be served" in done.stdout
    assert "all can be served" in run("verify", "--quick").stdout  # which reads no values
    found = parsed(run("verify", "--json", code=1))
    assert [(p["code"], p["documents"]) for p in found["verification"]["problems"]] == [("payload_corrupt", ["doc-4"])]
    assert parsed(run("verify", "--namespace", "theirs", "--json"))["sound"] is True


def test_delete(run: Run, tmp_path: Path) -> None:
    done = run("delete", "doc-0", "nothing")
    assert "would delete 1 document" in done.stdout
    assert "not there: 'nothing'" in done.stdout
    assert "--yes does it" in done.stderr
    assert documents(run) == set(CACHES)
    run("delete", "secret", "--yes")  # of another tenant
    assert documents(run, "--namespace", "theirs") == {"secret"}
    assert "deleted 1 document" in run("delete", "doc-0", "--yes").stdout
    listed = tmp_path / "ids"
    listed.write_text("doc-1\ndoc-2\n")
    assert parsed(run("delete", "--ids-from", str(listed), "--yes", "--json"))["documents"] == 2
    assert documents(run) == {"doc-3", "doc-4", "doc-5"}


def test_expire(run: Run) -> None:
    assert "would delete 0 documents" in run("expire", "--older-than", "30d").stdout
    assert "would delete 6 documents" in run("expire", "--older-than", "0").stdout
    assert documents(run) == set(CACHES)
    assert parsed(run("expire", "--older-than", "0", "--yes", "--json"))["documents"] == 6
    assert documents(run) == set()
    assert documents(run, "--namespace", "theirs") == {"secret"}


def test_gc(run: Run, local: Place, store: DocumentStore) -> None:
    run("delete", "doc-0", "doc-1", "--yes")
    store.write_shard([("never committed", make_cache(9, 500))])
    done = run("gc", "--yes")
    assert "removed 0 shards" in done.stdout
    assert "unused, but younger than 24h: " in done.stdout
    assert shards(local) == 5
    make_old(local)
    assert "would remove 1 shard " in run("gc").stdout  # what a reader may just have looked up stays for as long
    assert "would remove 2 shards" in run("gc", "--grace", "0").stdout
    assert shards(local) == 5
    found = parsed(run("gc", "--grace", "0", "--yes", "--json"))
    assert (len(found["shards"]), found["done"]) == (2, True)
    assert shards(local) == len(local.names("tokens")) == 3
    assert "all can be served" in run("verify").stdout


def test_compact(run: Run, local: Place) -> None:
    assert "would write 6 payloads" in run("compact").stdout
    assert shards(local) == 4
    assert "of 3 shards into 1" in run("compact", "--yes").stdout
    run("gc", "--grace", "0", "--yes")
    assert shards(local) == 2
    assert documents(run) == set(CACHES)
    with local.open() as reader:
        rows = list(reader.lookup(CACHES).values())
        assert all(same(found, CACHES[r.document_id]) for found, r in zip(reader.load(rows), rows, strict=True))
    assert parsed(run("compact", "--target", "1MiB", "--dead", "0", "--json"))["before"] == 0


def test_rebuild(run: Run, local: Place) -> None:
    run("delete", "doc-5", "--yes")
    for name in local.names("catalog/_delta_log"):
        local.delete(f"catalog/_delta_log/{name}")
    assert "no catalog" in run("ls", code=2).stderr
    assert "would make a catalog of 6 documents" in run("rebuild").stdout
    found = parsed(run("rebuild", "--yes", "--json"))
    assert (found["documents"], found["lost"], found["catalog"]) == (6, [], "missing")
    assert documents(run) == set(CACHES) - {"doc-5"}  # what was deleted does not come back
    assert documents(run, "--namespace", "theirs") == {"secret"}
    assert "all can be served" in run("verify").stdout


def test_export(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert "wrote 6 documents" in run("export", str(target)).stdout
    described = [json.loads(p.read_text()) for p in target.glob("doc-*.json")]
    assert {d["document_id"] for d in described} == set(CACHES)
    for item in described:
        assert same(DocumentCache(**load_file(target / item["file"])), CACHES[item["document_id"]])
    assert parsed(run("export", str(tmp_path / "one"), "--id", "doc-1", "--json"))["documents"] == 1
    assert torch.load is not None


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("ls", ["--namespace", "../x"], "namespace '../x'"),
        ("ls", ["--fingerprint", "zz"], "fingerprint 'zz'"),
        ("inspect", [], "name either a document or"),
        ("inspect", ["a", "--shard", "b"], "name either a document or"),
        ("inspect", ["nothing"], "nothing"),
        ("inspect", ["secret"], "secret"),
        ("inspect", ["--shard", "ffff"], "no shard 'ffff'"),
        ("delete", [], "name the documents"),
        ("delete", [""], "id"),
        ("delete", ["--ids-from", "/nowhere"], "cannot read '/nowhere'"),
        ("expire", ["--older-than", "soon"], "write a time as"),
        ("expire", ["--older-than", "30"], "write a time as"),
        ("gc", ["--grace", "-1h"], "write a time as"),
        ("compact", ["--target", "big"], "write a size as"),
        ("export", ["/proc/nothing/x"], "cannot write to"),
        ("export", ["OUT", "--id", "secret"], "secret"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    run: Run, tmp_path: Path, command: str, arguments: list[str], said: str
) -> None:
    done = run(command, *(str(tmp_path / "out") if a == "OUT" else a for a in arguments), code=2)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("command", ["ls", "stats", "verify", "gc", "compact", "rebuild"])
def test_no_store_is_one_line_and_exit_code_2(kvlink: Kvlink, tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "nothing", tmp_path / "file", tmp_path):
        done = kvlink("store", command, str(place))
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
        assert done.stderr.startswith("kvlink: ")
