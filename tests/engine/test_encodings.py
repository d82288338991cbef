"""Documents encoded for their caches alone: beside requests, which get their tokens meanwhile; and linking's time."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from engine_runs import TEXTS, alone, cached, request_for, run

from kvlink_core.engine import Encoded, Encoding, Engine, EngineEvent, EngineSettings, Generated
from kvlink_core.engine.trial import Mode
from kvlink_core.errors import EmptyDocumentError, PromptTooLongError, RequestTooLargeError
from kvlink_core.models import LoadedModel
from kvlink_core.types import DocumentCache


def tokens_of(model: LoadedModel, *texts: str) -> list[int]:
    return model.layout.plain_tokens(" ".join(texts))


def encoded(events: list[EngineEvent]) -> list[tuple[Encoding | None, DocumentCache]]:
    return [(e.encoding, e.cache) for e in events if isinstance(e, Encoded)]


def assert_same(cache: DocumentCache, expected: DocumentCache) -> None:
    assert torch.equal(cache.token_ids, expected.token_ids)
    assert torch.allclose(cache.keys, expected.keys, rtol=0, atol=2e-5 * float(expected.keys.abs().max()))
    assert torch.allclose(cache.values, expected.values, rtol=0, atol=2e-5 * float(expected.values.abs().max()))


def test_requests_get_a_token_in_every_step_while_documents_are_added(tiny_model: LoadedModel) -> None:
    engine = Engine(tiny_model, EngineSettings(step_tokens=12, stretch=None, mode="shared"))
    asked = request_for(tiny_model, "link-tokens", (0,), "?", max_tokens=80)
    quick = engine.submit(asked)
    while quick.first_token is None:
        engine.step()
    documents = [tokens_of(tiny_model, *TEXTS), tokens_of(tiny_model, *reversed(TEXTS))]
    encodings = [engine.encode(d) for d in documents]
    made: list[tuple[Encoding | None, DocumentCache]] = []
    steps = 0
    while len(made) < 2:
        events = engine.step()
        made += encoded(events)
        assert [e.handle for e in events if isinstance(e, Generated)] == [quick]
        steps += 1
    assert steps >= sum(map(len, documents)) // 12
    assert [encoding for encoding, _ in made] == encodings
    for (_, cache), expected in zip(made, cached(tiny_model, documents), strict=True):
        assert_same(cache, expected)
    engine.cancel(quick)
    assert not engine.busy
    assert engine.stats.kv_used == engine.stats.kv_idle


def test_who_asks_is_served_before_what_is_added(tiny_model: LoadedModel) -> None:
    engine = Engine(tiny_model, EngineSettings(step_tokens=8, stretch=None, mode="shared"))
    engine.encode(tokens_of(tiny_model, *TEXTS))
    engine.step()
    late = engine.submit(request_for(tiny_model, "link-tokens", (1,), cold=True, max_tokens=2))
    order: list[object] = []
    while engine.busy:
        order += [e.handle if isinstance(e, Generated) else e for e in engine.step()]
    kinds = [
        "token" if one is late else "added" if isinstance(one, Encoded) and one.encoding else "encoded" for one in order
    ]
    assert kinds == ["encoded", "token", "token", "added"]


@pytest.mark.parametrize("mode", ["shared", "copied", "solo"])
def test_in_every_mode_and_within_the_budget(tiny_model: LoadedModel, mode: Mode) -> None:
    requests = [request_for(tiny_model, "link-tokens", (i, 3), f"Question {i}?", cold=i == 1) for i in range(3)]
    engine = Engine(tiny_model, EngineSettings(step_tokens=32, kv_bytes=2**19, mode=mode))
    document = tokens_of(tiny_model, *TEXTS[:2])
    engine.encode(document)
    engine.encode(document)
    outcomes = run(engine, requests, arrivals=[0, 1, 2])
    assert [o.token_ids for o in outcomes] == [alone(tiny_model, r).token_ids for r in requests]
    assert engine.stats.kv_used == engine.stats.kv_idle
    encoding = engine.encode(document)
    made: list[tuple[Encoding | None, DocumentCache]] = []
    while engine.busy:
        made += encoded(engine.step())
    ((same, cache),) = made
    assert same is encoding
    assert_same(cache, cached(tiny_model, [document])[0])


def test_one_that_waits_for_memory_is_not_overtaken(tiny_model: LoadedModel) -> None:
    first = request_for(tiny_model, "full", (0, 1, 3), max_tokens=30)
    probe = Engine(tiny_model, EngineSettings(mode="solo"))
    probe.submit(first)
    probe.step()
    engine = Engine(tiny_model, EngineSettings(kv_bytes=probe.stats.kv_used + 2**12, mode="solo"))
    engine.submit(first)
    engine.step()
    engine.encode(tokens_of(tiny_model, *TEXTS))
    second = engine.submit(request_for(tiny_model, "full", (), "?", max_tokens=1))
    order: list[object] = []
    while engine.busy:
        order += [e for e in engine.step() if isinstance(e, Encoded) or e.handle is second]
    assert [isinstance(each, Encoded) for each in order] == [True, False]


def test_what_cannot_be_encoded_is_refused(tiny_model: LoadedModel) -> None:
    engine = Engine(tiny_model, EngineSettings(kv_bytes=2**16, mode="shared"))
    with pytest.raises(EmptyDocumentError):
        engine.encode([])
    with pytest.raises(PromptTooLongError):
        engine.encode([1] * (tiny_model.context_length + 1))
    with pytest.raises(RequestTooLargeError):
        engine.encode([1] * (tiny_model.context_length - 1))
    assert not engine.busy


def test_after_a_fault_nothing_is_left(tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("shared", "solo"):
        engine = Engine(tiny_model, EngineSettings(step_tokens=8, mode=mode))
        document = tokens_of(tiny_model, *TEXTS)
        engine.encode(document)
        engine.encode(document)
        with monkeypatch.context() as patch:
            patch.setattr("kvlink_core.engine.solo_runner.DocumentEncoder.encode", lambda *a, **k: 1 / 0)
            patch.setattr("kvlink_core.engine.flat_runner.FlatPass.forward", lambda *a, **k: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.step()
        assert engine.cancel_all() == []
        assert not engine.busy
        assert engine.stats.kv_used == engine.stats.kv_idle


@pytest.mark.parametrize(
    ("mode", "linker"), [("shared", "link-tokens"), ("shared", "epic:k=2"), ("solo", "reposition")]
)
def test_linking_takes_the_time_that_it_takes(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, mode: Mode, linker: str
) -> None:
    """Turning two documents 30 ms each is in ``link_s``, and nothing else is; documents that are there cost nothing."""
    place = type(tiny_model.rotary).place

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.03)
        return place(*args, **kwargs)

    engine = Engine(tiny_model, EngineSettings(mode=mode))
    monkeypatch.setattr(type(tiny_model.rotary), "place", slowly)
    request = request_for(tiny_model, linker, (0, 1), max_tokens=3)
    cold = engine.submit(request)
    while engine.busy:
        engine.step()
    assert cold.admitted is not None
    assert cold.first_token is not None
    assert 0.06 <= cold.link_s <= cold.first_token - cold.admitted
    hot = engine.submit(request)
    while engine.busy:
        engine.step()
    assert (hot.link_s < 0.03) == (mode == "shared" and linker == "link-tokens")
