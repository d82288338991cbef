"""The budget of bytes: shared documents, admission, preemption, cancellation; and that all of it comes back."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from engine_runs import Outcome, alone, request_for, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvlink_core.engine import Engine, EngineSettings, Failed, Generated, GenerationRequest, Handle
from kvlink_core.engine.memory import Budget, Lanes
from kvlink_core.errors import PromptTooLongError, RequestTooLargeError, SamplingError
from kvlink_core.models import LoadedModel

EVERYTHING = {"max_running": 64, "step_tokens": 64, "stretch": None}


def engine_with(model: LoadedModel, kv_bytes: int, **options: object) -> Engine:
    return Engine(model, EngineSettings(kv_bytes=kv_bytes, mode="shared", **{**EVERYTHING, **options}))  # type: ignore[arg-type]


def lane_bytes(model: LoadedModel, slots: int, limit: int = 2**30) -> int:
    return Lanes(model, Budget(limit)).slab_bytes(slots)


def document_bytes(model: LoadedModel, request: GenerationRequest) -> int:
    return sum(cache.nbytes for cache in request.caches if cache is not None)


def test_sixteen_requests_hold_their_documents_once(tiny_model: LoadedModel) -> None:
    request = request_for(tiny_model, "link-tokens", (0, 1, 3))
    documents = document_bytes(tiny_model, request)
    used = []
    for count in (1, 16):
        engine = engine_with(tiny_model, 2**24)
        for _ in range(count):
            engine.submit(request)
        while engine.stats.running < count:
            engine.step()
        used.append(engine.stats.kv_used - lane_bytes(tiny_model, 64, 2**24) * -(-count // 16))
    assert used == [documents, documents]


def test_namespaces_share_nothing(tiny_model: LoadedModel) -> None:
    request = request_for(tiny_model, "link-tokens", (0, 1), cold=True)
    engine = engine_with(tiny_model, 2**24)
    handles = [engine.submit(replace(request, namespace=space)) for space in ("a", "b", "a")]
    engine.step()
    runner = engine._runner
    assert len(runner.documents._documents) == 4  # type: ignore[union-attr]
    while engine.busy:
        engine.step()
    assert [h.computed_tokens == h.prompt_tokens for h in handles] == [True, True, False]


def test_the_budget_is_what_tensors_take(tiny_model: LoadedModel) -> None:
    engine = engine_with(tiny_model, 2**24)
    engine.submit(request_for(tiny_model, "link-tokens", (0, 1)))
    engine.submit(request_for(tiny_model, "full", (1, 3), max_tokens=100))
    engine.submit(request_for(tiny_model, "reposition", (4,), cold=True))
    engine.step()
    runner = engine._runner
    slabs = [s.slots for group in runner.lanes._slabs.values() for s in group]  # type: ignore[union-attr]
    held = sum(s.keys.nbytes + s.values.nbytes + s.positions.nbytes for s in slabs)
    for document in runner.documents._documents.values():  # type: ignore[union-attr]
        held += document.segment.keys.nbytes + document.segment.values.nbytes
        if not document.ready:
            assert document._unrotated is not None
            held += document._unrotated.nbytes + len(document.token_ids) * 8
    assert held == engine.stats.kv_used


def test_what_can_never_fit_is_refused_by_name(tiny_model: LoadedModel) -> None:
    request = request_for(tiny_model, "link-tokens", (0, 1), max_tokens=300)
    needs = engine_with(tiny_model, 2**30)._runner.needs(_task(tiny_model, request))
    engine = engine_with(tiny_model, needs // 2)
    with pytest.raises(RequestTooLargeError, match="MiB for keys and values, and the engine has"):
        engine.submit(request)
    assert not engine.busy
    with pytest.raises(PromptTooLongError):
        engine.submit(request_for(tiny_model, "link-tokens", (0,), max_tokens=3000))
    with pytest.raises(SamplingError):
        engine.submit(request_for(tiny_model, "link-tokens", (0,), temperature=-1.0))


def _task(model: LoadedModel, request: object) -> object:
    from kvlink_core.engine.requests import Task

    return Task(model, request, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["shared", "copied", "solo"])
def test_a_tight_budget_changes_no_token(tiny_model: LoadedModel, mode: str) -> None:
    """Six requests in memory for two or three: they wait, grow, push each other out, and come to the same end."""
    requests = [
        request_for(tiny_model, "link-tokens", (i % 4, 1), f"Question {i}?", max_tokens=90, temperature=0.8, seed=i)
        for i in range(6)
    ]
    # In place: two documents and a lane of 128 slots, and some more; else a whole prompt and its answer, and half.
    most = 170_000 if mode == "shared" else 240_000
    engine = Engine(tiny_model, EngineSettings(kv_bytes=most, mode=mode, step_tokens=40))  # type: ignore[arg-type]
    outcomes = run(engine, requests, arrivals=[0, 0, 1, 2, 3, 5])
    assert [o.token_ids for o in outcomes] == [alone(tiny_model, r).token_ids for r in requests]
    assert engine.stats.kv_peak <= engine.stats.kv_limit
    if mode != "solo":  # there, the whole answer is reserved
        assert engine.stats.preemptions > 0


def test_the_youngest_is_pushed_out(tiny_model: LoadedModel) -> None:
    old = request_for(tiny_model, "link-tokens", (0, 1), max_tokens=120)
    documents = document_bytes(tiny_model, old)
    # Room for one to grow to the end, beside half of another.
    engine = engine_with(tiny_model, documents + sum(lane_bytes(tiny_model, slots, 2**17) for slots in (256, 128)))
    first, second = engine.submit(old), engine.submit(old)
    while engine.busy:
        engine.step()
    assert first.preemptions == 0
    assert second.preemptions > 0
    assert first.completion_tokens == second.completion_tokens == 120
    assert first.computed_tokens == second.computed_tokens


def test_cancelling_frees_everything_at_once(tiny_model: LoadedModel) -> None:
    engine = engine_with(tiny_model, 2**24)
    handles = [
        engine.submit(request_for(tiny_model, linker, (0, 1), cold=cold))
        for linker in ("link-tokens", "full", "epic:k=2")
        for cold in (False, True)
    ]
    engine.step()
    engine.step()
    for handle in handles:
        engine.cancel(handle)
        engine.cancel(handle)
        assert handle.finished
    assert not engine.busy
    assert engine.step() == []
    assert engine.stats.kv_used == engine.stats.kv_idle
    engine.trim()
    assert engine.stats.kv_used == 0


def test_a_document_that_its_only_reader_leaves_is_not_encoded_further(tiny_model: LoadedModel) -> None:
    engine = engine_with(tiny_model, 2**24, step_tokens=8)
    handle = engine.submit(request_for(tiny_model, "link-tokens", (1, 3), cold=True))
    engine.step()
    assert engine._runner.encoding()
    engine.cancel(handle)
    assert not engine._runner.encoding()
    assert engine.stats.kv_used == engine.stats.kv_idle


def test_idle_documents_are_used_again_and_make_room(tiny_model: LoadedModel) -> None:
    request = request_for(tiny_model, "link-tokens", (0, 1))
    engine = engine_with(tiny_model, 2**24)
    run(engine, [request])
    idle = engine.stats.kv_idle
    assert idle == engine.stats.kv_used > 0
    run(engine, [request])
    assert engine.stats.kv_used == idle
    small = engine_with(tiny_model, int(engine._runner.needs(_task(tiny_model, request)) * 1.01))  # type: ignore[arg-type]
    for places in ((0, 1), (1, 2), (2, 0), (0, 1)):
        (outcome,) = run(small, [request_for(tiny_model, "link-tokens", places)])
        assert len(outcome.token_ids) == 6


@given(seed=st.integers(0, 2**32), kib=st.integers(300, 1500))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_arrivals_and_departures_leave_nothing_behind(tiny_model: LoadedModel, seed: int, kib: int) -> None:
    """Submit, cancel and step at random, then see who finished: the same tokens as alone, and an empty pool."""
    draw = random.Random(seed)
    engine = Engine(tiny_model, EngineSettings(kv_bytes=kib * 1024, max_running=5, step_tokens=24, mode="shared"))
    live: dict[Handle, Outcome] = {}
    done: list[tuple[object, Outcome]] = []
    requests: dict[Handle, object] = {}
    for _ in range(draw.randint(5, 40)):
        action = draw.random()
        if action < 0.35:
            linker = draw.choice(["link-tokens", "reposition", "full", "epic:k=2", "concat"])
            places = [draw.randrange(5) for _ in range(draw.randint(0, 3))]
            request = request_for(
                tiny_model, linker, places, cold=draw.random() < 0.4, max_tokens=draw.choice([1, 5, 70])
            )
            try:
                handle = engine.submit(request)
            except RequestTooLargeError:
                continue
            live[handle], requests[handle] = Outcome(), request
        elif action < 0.45 and live:
            handle = draw.choice(list(live))
            engine.cancel(handle)
            del live[handle]
        else:
            _step(engine, live, done, requests)
        assert engine.stats.kv_used <= engine.stats.kv_limit
        if not live:
            assert engine.stats.documents == 0
            assert engine.stats.kv_used == engine.stats.kv_idle
    for _ in range(3000):
        if not engine.busy:
            break
        _step(engine, live, done, requests)
    assert not live
    assert engine.stats.documents == 0
    assert engine.stats.kv_used == engine.stats.kv_idle
    engine.trim()
    assert engine.stats.kv_used == 0
    assert engine.stats.kv_peak <= engine.stats.kv_limit
    for request, outcome in done[:4]:
        assert outcome.token_ids == alone(tiny_model, request).token_ids  # type: ignore[arg-type]


def _step(
    engine: Engine,
    live: dict[Handle, Outcome],
    done: list[tuple[object, Outcome]],
    requests: dict[Handle, object],
) -> None:
    for event in engine.step():
        assert not isinstance(event, Failed)
        if isinstance(event, Generated):
            live[event.handle].events.append(event.event)
            if event.event.finish_reason is not None:
                done.append((requests[event.handle], live.pop(event.handle)))
