"""Sessions with tiers: the same answers, from nearer places; and a store in trouble costs time, never an answer."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from slow_store import SlowStore
from tier_scene import kept, reading_threads, soon

from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine import SamplingParams
from kvlink_core.errors import ConfigError, StoreUnavailableError
from kvlink_core.models import LoadedModel
from kvlink_core.session import AnswerRequest, Session
from kvlink_core.store import DocumentStore
from kvlink_core.store.tiers import TierSettings
from kvlink_core.types import Document, DocumentRef, Message

TEXTS = {f"t{n}": f"Maria Lopez was born in Lima in {1900 + n}." + " Nobody knows why." * n for n in range(6)}
ASK = [Message("user", "Where?")]
ONE = SamplingParams(max_tokens=1)

Open = Callable[..., Session]


@pytest.fixture
def store(tiny_model: LoadedModel, tmp_path: Path) -> Iterator[SlowStore]:
    opened = DocumentStore.open(str(tmp_path / "store"), fingerprint=tiny_model.fingerprint, create=True)
    tokens = [tiny_model.layout.document_tokens(Document("", text)) for text in TEXTS.values()]
    opened.commit(opened.write_shard(list(zip(TEXTS, DocumentEncoder(tiny_model).encode(tokens), strict=True))))
    made = SlowStore(opened)
    yield made
    made.gate.set()
    made.close()


@pytest.fixture
def session(tiny_model: LoadedModel, store: SlowStore) -> Iterator[Open]:
    """Opens sessions that are closed in the end."""
    made: list[Session] = []

    def open_session(*, alone: bool = False, **changes: Any) -> Session:
        settings = TierSettings(**{"host_bytes": 2**22, "timeout_s": 20.0, "recompute": "never", **changes})
        made.append(Session(tiny_model, None if alone else store, settings))
        return made[-1]

    yield open_session
    store.gate.set()
    for one in made:
        one.close()


def ask(session: Session, *documents: Document | DocumentRef, tokens: int = 8) -> tuple[str, list[str | None]]:
    """The answer, and where each document came from."""
    answer = session.start(AnswerRequest(ASK, documents, "link-tokens", SamplingParams(max_tokens=tokens)))
    return answer.text(), [d.origin for d in answer.documents]


def refs(*ids: str) -> list[DocumentRef]:
    return [DocumentRef(i) for i in ids]


def expected(model: LoadedModel, *ids: str) -> str:
    """With nothing stored and nothing kept."""
    return ask(Session(model), *(Document("", TEXTS[i]) for i in ids))[0]


def test_answers_are_the_same_from_every_tier(
    tiny_model: LoadedModel, store: SlowStore, session: Open, tmp_path: Path
) -> None:
    disk = {"disk_bytes": 2**24, "disk_path": tmp_path / "near"}
    first = session(**disk)
    wanted = refs("t0", "t3", "t0")
    text = expected(tiny_model, "t0", "t3", "t0")
    assert ask(first, *wanted) == (text, ["store"] * 3)
    kept(first._resolver._near.tiers)  # type: ignore[union-attr]
    assert ask(first, *wanted) == (text, ["host"] * 3)
    first.close()
    second = session(**disk)
    assert ask(second, *wanted) == (text, ["disk"] * 3)
    assert store.reads == [["t0", "t3"]]
    lengths = {i: len(tiny_model.layout.document_tokens(Document("", TEXTS[i]))) for i in ("t0", "t3")}
    tokens = 2 * lengths["t0"] + lengths["t3"]
    counts = first.counters.as_dict()
    assert (counts["requested_tokens"], counts["hit_tokens"]) == (2 * tokens, 2 * tokens)
    assert (counts["hit_tokens_store"], counts["hit_tokens_host"], counts["hit_tokens_disk"]) == (tokens, tokens, 0)
    assert second.counters.as_dict()["hit_tokens_disk"] == tokens


def test_what_is_sent_as_text_is_there_the_second_time(tiny_model: LoadedModel, session: Open) -> None:
    for alone in (True, False):
        made = session(alone=alone)
        new = Document("", "Not in the store.")
        first, second = ask(made, new), ask(made, new)
        assert (first[1], second[1]) == (["encoded"], ["host"])
        assert first[0] == second[0] == ask(Session(tiny_model), new)[0]
        usage = made.start(AnswerRequest(ASK, [new], "link-tokens", ONE)).usage
        assert usage.cached_tokens == len(tiny_model.layout.document_tokens(new))


def test_a_hundred_requests_for_a_cold_document_read_it_once(
    tiny_model: LoadedModel, store: SlowStore, session: Open
) -> None:
    made = session()
    text = ask(Session(tiny_model), Document("", TEXTS["t1"]), tokens=1)[0]
    store.gate.clear()
    store.asked.clear()
    with ThreadPoolExecutor(100) as pool:
        answers = [pool.submit(ask, made, *refs("t1"), tokens=1) for _ in range(100)]
        soon(lambda: store.reads)
        time.sleep(0.3)
        store.gate.set()
        found = [answer.result(60) for answer in answers]
    assert store.reads == [["t1"]]
    assert {text for text, _ in found} == {text}
    assert {origin for _, (origin,) in found} <= {"store", "host"}
    assert made.counters.documents_encoded == 0


def test_a_hundred_requests_for_a_new_text_encode_it_once(session: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    made, encoded, lock = session(alone=True), [], threading.Lock()
    encode = DocumentEncoder.encode

    def slowly(self: DocumentEncoder, documents: list[list[int]]) -> object:
        with lock:
            encoded.append(len(documents))
        time.sleep(0.1)
        return encode(self, documents)

    monkeypatch.setattr(DocumentEncoder, "encode", slowly)
    with ThreadPoolExecutor(100) as pool:
        answers = [pool.submit(ask, made, Document("", "New to all."), tokens=1) for _ in range(100)]
        assert len({answer.result(60)[0] for answer in answers}) == 1
    assert encoded == [1]


def test_prefetching_takes_the_reading_out_of_the_request(store: SlowStore, session: Open) -> None:
    made = session()
    request = AnswerRequest(ASK, refs("t0", "t1"), "link-tokens", ONE)
    made.prefetch(request)
    soon(lambda: made.tier_stats.tiers["host"].documents == 2)  # type: ignore[union-attr]
    store.failing = True
    assert [d.origin for d in made.start(request).documents] == ["host", "host"]
    made.prefetch(dataclasses.replace(request, linker="full"))  # which needs none
    assert len(store.reads) == 1


def test_a_store_that_is_away_means_computing_then_is_left_alone_then_recovers(
    tiny_model: LoadedModel, store: SlowStore, session: Open, caplog: pytest.LogCaptureFixture
) -> None:
    made = session(host_bytes=0, failures=2, retry_after_s=0.3, timeout_s=5.0)
    assert ask(made, *refs("t0"))[1] == ["store"]  # so its token ids are known
    store.failing = True
    text = expected(tiny_model, "t0")
    for _ in range(4):
        assert ask(made, *refs("t0")) == (text, ["encoded"])
    assert len(store.reads) + store.asked.count("refresh") <= 5
    assert made.tier_stats.circuit_opened > 0  # type: ignore[union-attr]
    assert "the store does not answer, computing 1 documents" in caplog.text
    with pytest.raises(StoreUnavailableError):  # known by its id alone, and never met
        ask(made, *refs("t5"))
    assert ask(made, Document("", TEXTS["t5"])) == (expected(tiny_model, "t5"), ["encoded"])
    store.failing = False
    soon(lambda: ask(made, *refs("t0"))[1] == ["store"])
    assert ask(made, *refs("t5")) == (expected(tiny_model, "t5"), ["store"])


def test_a_store_that_hangs_holds_up_a_request_for_the_time_out_at_most(
    tiny_model: LoadedModel, store: SlowStore, session: Open
) -> None:
    made = session(host_bytes=0, failures=1, retry_after_s=60.0, timeout_s=1.0)
    text = expected(tiny_model, "t0")
    store.gate.clear()
    started = time.monotonic()
    assert ask(made, Document("", TEXTS["t0"])) == (text, ["encoded"])
    assert time.monotonic() - started < 8
    started = time.monotonic()
    assert ask(made, Document("", TEXTS["t0"])) == (text, ["encoded"])
    assert time.monotonic() - started < 0.9


def test_damage_on_its_way_is_recomputed_and_counted(tiny_model: LoadedModel, session: Open, store: SlowStore) -> None:
    from kvlink_core.errors import PayloadCorruptError

    store.spoil = lambda _: PayloadCorruptError("flipped")
    made = session()
    assert ask(made, *refs("t2")) == (expected(tiny_model, "t2"), ["reencoded-corrupt"])
    assert made.counters.corrupt_payloads == 1
    assert ask(made, *refs("t2")) == (expected(tiny_model, "t2"), ["host"])


def test_a_slow_store_is_not_waited_for_where_computing_is_faster(
    tiny_model: LoadedModel, store: SlowStore, session: Open
) -> None:
    """Documents are named by id, so their token ids have to be asked for."""
    made = session(host_bytes=0, recompute="auto")
    made.calibrate()
    store.latency_s, store.bytes_per_s = 0.02, 20_000.0  # a document of 40 tokens takes a second
    ask(made, *refs("t0"), tokens=1)
    ask(made, *refs("t1"), tokens=1)
    started = time.monotonic()
    text, origins = ask(made, *refs("t2", "t3"), tokens=1)
    assert time.monotonic() - started < 0.8
    assert origins == ["encoded", "encoded"]
    assert text == ask(Session(tiny_model), *(Document("", TEXTS[i]) for i in ("t2", "t3")), tokens=1)[0]
    assert made.tier_stats.computed == 3  # type: ignore[union-attr]  # t1 too


def test_what_is_replaced_under_its_id_is_not_served_from_memory(
    tiny_model: LoadedModel, store: SlowStore, session: Open
) -> None:
    made = session()
    made._resolver._refresh_after = 0.0
    assert ask(made, *refs("t0"))[0] == expected(tiny_model, "t0")
    tokens = tiny_model.layout.document_tokens(Document("", TEXTS["t4"]))
    store.commit(store.write_shard([("t0", DocumentEncoder(tiny_model).encode([tokens])[0])]))
    assert ask(made, *refs("t0"))[0] == expected(tiny_model, "t4")


def test_closing_leaves_no_thread(store: SlowStore, session: Open) -> None:
    before = reading_threads()
    made = session()
    ask(made, *refs("t0"))
    made.close()
    soon(lambda: reading_threads() == before)


def test_without_tiers_nothing_is_kept_and_nothing_to_close(tiny_model: LoadedModel, store: SlowStore) -> None:
    plain = Session(tiny_model, store)
    new = Document("", "Not in the store.")
    assert [ask(plain, new)[1], ask(plain, new)[1]] == [["encoded"], ["encoded"]]
    assert plain.tier_stats is None
    plain.prefetch(AnswerRequest(ASK, refs("t0")))
    plain.calibrate()
    plain.close()
    assert ask(plain, new)[1] == ["encoded"]


def test_impossible_tiers_are_refused(tiny_model: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="needs a CUDA GPU"):
        Session(tiny_model, None, TierSettings(device_bytes=1))
