"""``kvlink bench tiers``: the policies that ours is compared with, the traces, and the throttled stores."""

from __future__ import annotations

import gzip
import json
import time
from itertools import product
from pathlib import Path

import pytest
from command import Kvlink
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlink_core.benchmark.tiers_hits import simulate
from kvlink_core.benchmark.tiers_policies import POLICIES, Clairvoyant, TinyLfu
from kvlink_core.benchmark.tiers_report import TiersReport
from kvlink_core.benchmark.tiers_speed import SpeedSettings, measure_speed
from kvlink_core.benchmark.tiers_traces import Trace, question_traces, read_questions, zipf_trace
from kvlink_core.encode import DocumentEncoder
from kvlink_core.errors import ConfigError
from kvlink_core.models import LoadedModel

ASKED = st.lists(st.integers(0, 9), max_size=80)
SIZES = st.lists(st.integers(1, 9), min_size=10, max_size=10)


@given(keys=ASKED, sizes=SIZES, capacity=st.integers(1, 30), name=st.sampled_from(["lru", "fifo"]))
def test_queues_against_lists(keys: list[int], sizes: list[int], capacity: int, name: str) -> None:
    cache, held = POLICIES[name](capacity, keys), []
    for key in keys:
        assert cache.ask(key, sizes[key]) == (key in held)
        if key in held and name == "lru":
            held.remove(key)
            held.append(key)
        elif key not in held and sizes[key] <= capacity:
            held.append(key)
            while sum(sizes[k] for k in held) > capacity:
                held.pop(0)


def most_hits(keys: list[int], capacity: int, held: frozenset[int] = frozenset()) -> int:
    """The most that any policy can do, by trying all."""
    if not keys:
        return 0
    first, *rest = keys
    if first in held:
        return 1 + most_hits(rest, capacity, held)
    choices = [held] + ([held | {first}] if len(held) < capacity else [(held - {k}) | {first} for k in held])
    return max(most_hits(rest, capacity, choice) for choice in choices)


@settings(max_examples=60, deadline=None)
@given(keys=st.lists(st.integers(0, 4), max_size=11), capacity=st.integers(1, 3))
def test_nothing_does_better_than_the_clairvoyant_one(keys: list[int], capacity: int) -> None:
    cache = Clairvoyant(capacity, keys)
    assert sum(cache.ask(key, 1) for key in keys) == most_hits(keys, capacity)


@given(keys=ASKED, sizes=SIZES, capacity=st.integers(0, 40))
def test_no_policy_holds_more_than_it_may(keys: list[int], sizes: list[int], capacity: int) -> None:
    for name, make in POLICIES.items():
        cache = make(capacity, keys)
        seen: set[int] = set()
        for key in keys:
            hit = cache.ask(key, sizes[key])
            assert not hit or key in seen, name
            seen.add(key)
        if isinstance(cache, TinyLfu):
            queues = (cache._window, cache._probation, cache._protected)
            held = [sum(queue.values()) for queue in queues]
            assert held[0] == cache._in_window <= cache._window_size
            assert held[1] + held[2] == cache._in_main <= max(0, cache._main_size)
            assert held[2] == cache._in_protected


def test_a_scan_hurts_lru_and_not_ours() -> None:
    trace = zipf_trace(documents=500, requests=8000, scans=8, scanned=400)
    found = {name: simulate(trace, 0.1, name).document_hits for name in POLICIES}
    assert found["s3-fifo"] > found["lru"] + 0.03
    assert found["lru"] > found["fifo"]
    assert found["clairvoyant"] >= max(found.values())


def test_the_zipf_trace_is_what_it_says() -> None:
    trace = zipf_trace(documents=100, requests=20_000, scans=4, scanned=50)
    again = [k for k in trace.keys if k < 100]
    once = [k for k in trace.keys if k >= 100]
    assert (len(again), trace.counted) == (20_000, 20_000)
    assert len(once) == len(set(once)) == 200
    assert trace.keys[5000:5050] == list(range(100, 150))
    assert 1.8 < again.count(0) / again.count(1) < 2.2
    assert 8 < again.count(0) / again.count(9) < 12
    assert trace.total == sum(trace.sizes[:100])
    assert all(20 <= size <= 4000 for size in trace.sizes)


def test_hits_are_counted_by_documents_and_by_tokens_without_the_scans() -> None:
    trace = Trace("t", [0, 1, 5, 0, 1, 1], [10, 30, 0, 0, 0, 10], 40, 5)
    row = simulate(trace, 1.0, "fifo")  # each puts the next one out, but the last
    assert (row.documents, row.document_hits, row.token_hits) == (5, 1 / 5, 30 / 110)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl.gz"
    documents = {n: {"title": n, "text": f"text of {n}"} for n in "abc"}
    rows = [{"question": "?", "documents": [documents[n] for n in names]} for names in ("ab", "bc", "aba")]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return path


def test_questions_give_their_documents(questions: Path, tmp_path: Path) -> None:
    asked, drawn = question_traces(questions, lambda text: len(text[1]), asked=50)
    assert (asked.name, asked.keys, asked.sizes) == ("mine, file order", [0, 1, 1, 2, 0, 1], [9, 9, 9])
    assert drawn.name == "mine, 50 drawn"
    assert len(drawn.keys) == 100
    squad = {"data": [{"title": "t", "paragraphs": [{"context": "c", "qas": [{}, {}]}, {"context": "d", "qas": [{}]}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    assert read_questions(tmp_path / "squad.json") == [[("t", "c")], [("t", "c")], [("t", "d")]]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"data": 5}', b"\xff", b'{"data": [{"title": 1}]}'])
@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
def test_other_files_are_refused(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match="neither JSON Lines"):
        read_questions(tmp_path / name)


def test_a_fast_store_is_loaded_from_and_a_slow_one_is_not(
    tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = DocumentEncoder.encode

    def slowly(self: DocumentEncoder, documents: list[list[int]]) -> object:
        time.sleep(sum(map(len, documents)) * 0.5e-3)
        return encode(self, documents)

    monkeypatch.setattr(DocumentEncoder, "encode", slowly)
    links = ((2e5, 0.05), (2e9, 0.0))
    wanted = SpeedSettings(links=links, documents=4, tokens=(60, 120), each=2, warmup=3, runs=3)
    slow, fast = measure_speed(tiny_model, tmp_path / "store", wanted)
    assert (slow.loaded, [len(t) for t in (slow.load_s, slow.compute_s, slow.auto_s)]) == (0.0, [3, 3, 3])
    assert (slow.medians[0] > 2 * slow.medians[2], fast.medians[1] > 2 * fast.medians[2]) == (True, True)
    assert fast.loaded == 1.0


def test_the_command(kvlink: Kvlink, tiny_model_dir: Path, questions: Path, tmp_path: Path) -> None:
    output, plot = tmp_path / "out.json", tmp_path / "out.svg"
    result = kvlink(
        "bench", "tiers", "--model", str(tiny_model_dir), "--requests", "500", "--sizes", "0.05,0.5",
        "--qa", str(questions), "--link", "2000:0", "--documents", "2", "--tokens", "20,40", "--repeats", "2",
        "--json", str(output), "--plot", str(plot),
    )  # fmt: skip
    assert result.returncode == 0
    assert "w-tinylfu" in result.stdout
    assert "2,000 MB/s, 0 ms" in result.stdout
    report = TiersReport.model_validate_json(output.read_text())
    assert {(row.trace.split(",")[0], row.share) for row in report.hits} == set(product(["Zipf(1)"], [0.05, 0.5])) | {
        ("mine", 0.1)
    }
    assert len(report.speed[0].auto_s) == 2
    assert plot.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sizes", "2"], "1 at most"),
        (["--sizes", "x"], "separated by commas"),
        (["--link", "5"], "MB/s and milliseconds"),
        (["--link", "0:5"], "MB/s and milliseconds"),
        (["--tokens", "9,3"], "the shortest and the longest"),
        (["--qa", "nowhere.json", "--no-speed", "--requests", "1", "--sizes", "0.01"], "neither JSON Lines"),
    ],
)
def test_impossible_options_are_refused(kvlink: Kvlink, options: list[str], said: str) -> None:
    result = kvlink("bench", "tiers", *options)
    assert result.returncode == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()[-1]) < 400
