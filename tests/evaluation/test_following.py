"""A walk sees what one plain forward pass of the model gives, and its own answer is the engine's."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import greedy as oracle_greedy
from strategies import linked_by, prompt_for

from kvlink_core.engine import Generation, SamplingParams
from kvlink_core.evaluation.following import closeness, follow, greedy
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Prompt

STEPS = 6
NEVER: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def prompt(tiny_model: LoadedModel) -> Prompt:
    return prompt_for(tiny_model, "reposition")


def test_the_free_walk_is_the_oracles(tiny_model: LoadedModel, prompt: Prompt) -> None:
    walk = greedy(linked_by(tiny_model, "full", prompt, reserve=STEPS), max_tokens=STEPS, stop_ids=NEVER)
    tokens, logits = oracle_greedy(tiny_model.network, prompt, STEPS, isolate=False)
    assert list(walk.followed) == tokens == list(walk.token_ids or ())
    assert torch.allclose(walk.logits, torch.stack(logits), atol=1e-3)


def test_what_is_followed_is_seen_as_one_pass_sees_it(tiny_model: LoadedModel, prompt: Prompt) -> None:
    """Tokens that nobody would choose, and the answer from the first place on, over slots that were written before."""
    forced = [65, 66, 67, 68]
    linked = linked_by(tiny_model, "full", prompt, reserve=STEPS)
    walk = follow(linked, forced, answer=True, max_tokens=STEPS, stop_ids=NEVER)
    ids = torch.cat([prompt.token_ids(), torch.tensor(forced[:-1])])[None]
    with torch.inference_mode():
        whole = tiny_model.network(input_ids=ids, attention_mask=None).logits[0, prompt.length - 1 :].float()
    assert torch.allclose(walk.logits, whole, atol=1e-3)
    assert list(walk.token_ids or ()) == oracle_greedy(tiny_model.network, prompt, STEPS, isolate=False)[0]


@pytest.mark.parametrize("spec", ["reposition", "link-tokens", "epic:k=3", "cacheblend:ratio=0.3", "concat"])
def test_the_own_answer_is_the_engines(tiny_model: LoadedModel, spec: str) -> None:
    """Whatever was followed meanwhile: full's answer, its own one, or one that shares a beginning with its own."""
    prompt = prompt_for(tiny_model, spec)
    stop = tiny_model.stop_ids
    generation = Generation(
        linked_by(tiny_model, spec, prompt, reserve=12), SamplingParams(), max_tokens=12, stop_ids=stop
    )
    expected = [token for event in generation for token in event.token_ids]
    full = greedy(
        linked_by(tiny_model, "full", prompt_for(tiny_model, "full"), reserve=12), max_tokens=12, stop_ids=stop
    )
    for forced in (list(full.followed), expected, [*expected[:3], 7, 8], expected[:2]):
        linked = linked_by(tiny_model, spec, prompt, reserve=12)
        walk = follow(linked, forced, answer=True, max_tokens=12, stop_ids=stop)
        assert list(walk.token_ids or ()) == expected
        assert walk.logits.shape[0] == len(forced)
        assert walk.first_s > 0


def test_an_end_that_is_chosen_ends_the_answer(tiny_model: LoadedModel, prompt: Prompt) -> None:
    tokens, _ = oracle_greedy(tiny_model.network, prompt, STEPS, isolate=False)
    end = next(token for token in tokens[1:] if tokens.index(token) > 0)
    at = tokens.index(end)
    free = greedy(linked_by(tiny_model, "full", prompt, reserve=9), max_tokens=9, stop_ids=frozenset({end}))
    assert (list(free.followed), list(free.token_ids or ())) == (tokens[: at + 1], tokens[:at])
    led = follow(
        linked_by(tiny_model, "full", prompt, reserve=9), free.followed,
        answer=True, max_tokens=9, stop_ids=frozenset({end}),
    )  # fmt: skip
    assert led.token_ids == free.token_ids


def test_kl_and_top1_by_hand() -> None:
    """Two tokens of a vocabulary of two: 1/2 and 1/2 against 1/4 and 3/4; and the same distribution twice."""
    full = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    found = torch.tensor([[0.0, math.log(3)], [11.0, 13.0]])
    close = closeness(found, full, [0, 1])
    assert close.kl == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2)
    assert close.nll == pytest.approx((math.log(4) + math.log(1 + math.exp(-2))) / 2)
    assert close.top1 == 0.5  # the first of equals is the most likely: token 0 of the reference, token 1 of the other
    assert close.tokens == 2


def test_kl_against_the_direct_sum() -> None:
    draw = torch.Generator().manual_seed(3)
    full, found = (torch.randn(35, 40, generator=draw) * 4 for _ in range(2))
    total = 0.0
    for p_logits, q_logits in zip(full.tolist(), found.tolist(), strict=True):
        p_sum, q_sum = (math.fsum(math.exp(x) for x in logits) for logits in (p_logits, q_logits))
        for p_logit, q_logit in zip(p_logits, q_logits, strict=True):
            p, q = math.exp(p_logit) / p_sum, math.exp(q_logit) / q_sum
            total += p * math.log(p / q)
    assert closeness(found, full, [0] * 35).kl == pytest.approx(total / 35, rel=1e-9)
    assert closeness(full, full, [0] * 35).kl == 0.0


def test_what_full_rules_out_counts_nothing() -> None:
    full = torch.tensor([[0.0, -math.inf]])
    assert closeness(torch.tensor([[0.0, 0.0]]), full, [0]).kl == pytest.approx(math.log(2))
    assert closeness(torch.tensor([[0.0, -math.inf]]), full, [0]).kl == 0.0
