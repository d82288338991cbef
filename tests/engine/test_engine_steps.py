"""Steps: who is served, what a cold document costs others, how answers end, what is drawn and reported."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from engine_runs import NEVER, alone, cached, request_for, run
from oracles import logits as oracle_logits

from kvlink_core.engine import Encoded, Engine, EngineSettings, Failed, Generated, GenerationRequest, SamplingParams
from kvlink_core.engine.schedule import Pace, share
from kvlink_core.errors import ConfigError
from kvlink_core.models import LoadedModel


def test_others_get_a_token_in_each_step_while_a_cold_document_is_encoded(tiny_model: LoadedModel) -> None:
    engine = Engine(tiny_model, EngineSettings(step_tokens=12, stretch=None, mode="shared"))
    quick = engine.submit(request_for(tiny_model, "link-tokens", (0,), "?", max_tokens=60))
    while quick.first_token is None:
        engine.step()
    slow = engine.submit(request_for(tiny_model, "link-tokens", (1, 3), cold=True, max_tokens=2))
    steps = 0
    while slow.first_token is None:
        events = engine.step()
        assert [e.event.token_ids for e in events if isinstance(e, Generated) and e.handle is quick] != []
        steps += 1
    assert steps > 6
    assert slow.computed_tokens == slow.prompt_tokens


def test_by_itself_a_request_encodes_one_document_in_a_step(tiny_model: LoadedModel) -> None:
    engine = Engine(tiny_model, EngineSettings(mode="solo"))
    fast = engine.submit(request_for(tiny_model, "reposition", (0,), max_tokens=8))
    engine.step()
    request = request_for(tiny_model, "reposition", (1, 3, 1, 4), cold=True, max_tokens=2)
    slow = engine.submit(request)
    for done in range(2, 5):  # three documents, one of them twice
        assert slow.first_token is None
        engine.step()
        assert fast.completion_tokens == done
    while engine.busy:
        engine.step()
    assert slow.computed_tokens == request.prompt.length - len(request.prompt.documents[2].token_ids)
    again = Engine(tiny_model, EngineSettings(mode="solo"))
    (outcome,) = run(again, [request])
    assert outcome.token_ids == alone(tiny_model, request).token_ids


def test_what_was_encoded_on_the_way_is_what_the_encoder_makes(tiny_model: LoadedModel) -> None:
    request = request_for(tiny_model, "link-tokens", (1, 3, 1), cold=True)
    engine = Engine(tiny_model, EngineSettings(step_tokens=10, stretch=None, mode="shared"))
    engine.submit(request)
    made = []
    while engine.busy:
        made += [e.cache for e in engine.step() if isinstance(e, Encoded)]
    texts = [list(request.prompt.documents[i].token_ids) for i in (1, 0)]  # the shorter one first
    assert [cache.token_ids.tolist() for cache in made] == texts
    for cache, expected in zip(made, cached(tiny_model, texts), strict=True):
        assert torch.allclose(cache.keys, expected.keys, rtol=0, atol=2e-5 * float(expected.keys.abs().max()))
        assert torch.allclose(cache.values, expected.values, rtol=0, atol=2e-5 * float(expected.values.abs().max()))


def test_a_document_that_two_ask_for_is_encoded_once(tiny_model: LoadedModel) -> None:
    engine = Engine(tiny_model, EngineSettings(step_tokens=16, stretch=None, mode="shared"))
    handles = [engine.submit(request_for(tiny_model, "link-tokens", (1,), cold=True)) for _ in range(3)]
    encoded = 0
    while engine.busy:
        encoded += sum(isinstance(e, Encoded) for e in engine.step())
    assert encoded == 1
    assert [h.computed_tokens == h.prompt_tokens for h in handles] == [True, False, False]


def test_no_more_run_than_may(tiny_model: LoadedModel) -> None:
    engine = Engine(tiny_model, EngineSettings(max_running=2, mode="shared"))
    handles = [engine.submit(request_for(tiny_model, "full", (0,))) for _ in range(5)]
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, engine.stats.running)
        assert engine.stats.running + engine.stats.waiting == sum(not h.finished for h in handles)
    assert most == 2
    firsts = [h.first_token for h in handles]
    assert firsts == sorted(firsts)  # type: ignore[type-var]


def test_draws_do_not_depend_on_the_batch(tiny_model: LoadedModel) -> None:
    def sampled(seed: int, **how: Any) -> GenerationRequest:
        return request_for(tiny_model, "link-tokens", (0, 1), temperature=1.3, seed=seed, max_tokens=20, **how)

    requests = [sampled(1), sampled(2, top_p=0.8), sampled(1, top_k=5), sampled(1), request_for(tiny_model, "full", ())]
    together = run(Engine(tiny_model, EngineSettings(step_tokens=30)), requests, arrivals=[0, 1, 4, 7, 9])
    assert [o.token_ids for o in together] == [alone(tiny_model, r).token_ids for r in requests]
    assert together[0].token_ids == together[3].token_ids
    assert len({tuple(o.token_ids) for o in together}) == 4


def test_log_probabilities_are_the_model_s_own(tiny_model: LoadedModel) -> None:
    request = request_for(tiny_model, "link-tokens", (0, 1), logprobs=4, temperature=1.5, top_k=2, seed=3, max_tokens=5)
    (outcome,) = run(Engine(tiny_model), [request])
    for step, event in enumerate(outcome.events):
        before = outcome.token_ids[:step]
        truth = oracle_logits(tiny_model.network, request.prompt, before, isolate=True).double()
        expected = truth - truth.exp().sum().log()
        (entry,) = event.logprobs
        assert entry.token_id == outcome.token_ids[step]
        assert entry.logprob == pytest.approx(float(expected[entry.token_id]), abs=1e-4)
        best = sorted(expected.tolist(), reverse=True)[:4]
        assert [p for _, p in entry.top] == pytest.approx(best, abs=1e-4)
        assert all(math.isclose(float(expected[i]), p, abs_tol=1e-4) for i, p in entry.top)
    assert [e.logprobs for e in outcome.events] == [e.logprobs for e in outcome.events if e.logprobs]


def test_stop_strings_ids_and_borders_of_characters(tiny_model: LoadedModel) -> None:
    free = request_for(tiny_model, "link-tokens", (0, 1), temperature=2.0, seed=5, max_tokens=60)
    (whole,) = run(Engine(tiny_model), [free])
    assert whole.text == tiny_model.layout.decode(whole.token_ids)
    assert whole.events[-1].finish_reason == "length"
    stop = next(whole.text[i : i + 2] for i in range(10, 50) if whole.text[i : i + 2].isascii())
    stopping = GenerationRequest(
        free.prompt,
        free.linker,
        SamplingParams(temperature=2.0, seed=5, max_tokens=60, stop=(stop,)),
        free.caches,
        NEVER,
    )
    (stopped,) = run(Engine(tiny_model), [stopping])
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.events[-1].finish_reason == "stop"
    last = whole.token_ids[7]
    ended = GenerationRequest(free.prompt, free.linker, free.sampling, free.caches, frozenset({last}))
    (outcome,) = run(Engine(tiny_model), [ended])
    assert outcome.token_ids == whole.token_ids[: whole.token_ids.index(last)]
    assert outcome.events[-1].finish_reason == "stop"


def test_a_linker_that_refuses_fails_its_request_alone(tiny_model: LoadedModel) -> None:
    bad = request_for(tiny_model, "cacheblend:layer=2", (0, 1))

    class Refusing:
        name, uses_caches = "refusing", True

        def links(self, layout: object) -> None:
            return None

        def link(self, *args: object, **kwargs: object) -> Any:
            raise ConfigError("no room", param="linker")

    bad = GenerationRequest(bad.prompt, Refusing(), bad.sampling, bad.caches, NEVER)  # type: ignore[arg-type]
    good = request_for(tiny_model, "link-tokens", (0, 1))
    engine = Engine(tiny_model, EngineSettings(mode="shared"))
    failed, answered = run(engine, [bad, good])
    assert isinstance(failed.error, ConfigError)
    assert answered.token_ids == alone(tiny_model, good).token_ids
    assert engine.stats.kv_used == engine.stats.kv_idle
    assert Failed.__doc__


def test_everything_can_be_dropped_after_a_fault(tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model, EngineSettings(mode="shared"))
    handles = [engine.submit(request_for(tiny_model, "link-tokens", (0, 1))) for _ in range(3)]
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(type(tiny_model.lm.network), "forward", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert engine.cancel_all() == handles
    assert engine.stats.kv_used == engine.stats.kv_idle
    request = request_for(tiny_model, "link-tokens", (0, 1))
    assert run(engine, [request])[0].token_ids == alone(tiny_model, request).token_ids


def test_half_of_a_step_is_the_oldest_s_and_the_rest_goes_to_the_shortest() -> None:
    assert share(10, []) == []
    assert share(10, [100]) == [10]
    assert share(10, [3, 100]) == [3, 7]
    assert share(10, [100, 2, 50]) == [5, 2, 3]
    assert share(1, [5, 5]) == [1, 0]
    assert share(10, [2, 3]) == [2, 3]


def test_the_pace_keeps_steps_short() -> None:
    pace = Pace(512, 2.0)
    assert pace.prefill(0, 1) == 512
    assert pace.prefill(4, 1) == 16
    for _ in range(50):
        pace.note(0.1, decoding=4, prefilled=0)
        pace.note(0.1 + 0.002 * 40, decoding=4, prefilled=40)
    assert pace.prefill(4, 4) == pytest.approx(50, abs=5)
    assert pace.prefill(4, 5) == 508  # most of them have no token yet
    assert Pace(512, None).prefill(4, 1) == 508
    assert Pace(2, None).prefill(4, 1) == 1
