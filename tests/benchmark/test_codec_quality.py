"""What ``kvlink bench codec`` counts: against steps of the engine, sums made another way, and codecs that do harm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvlink_core.benchmark.codec_material import Case, Group, Material, long_documents, own_text, passages
from kvlink_core.benchmark.codec_quality import Reference, Tally, compare, logits_after, relative
from kvlink_core.benchmark.paired import paired_difference
from kvlink_core.compress import EncodedDocument, get_codec
from kvlink_core.compress.raw import RawCodec
from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine import Generation, SamplingParams
from kvlink_core.models import LoadedModel, load_model
from kvlink_core.types import DocumentCache


@pytest.fixture(scope="module")
def embedded() -> LoadedModel:
    return load_model("embedded")


class Harm(RawCodec):
    """Stores what it is given, and gives back something else."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def decode(self, document: EncodedDocument, device: torch.device | None = None) -> DocumentCache:
        cache = super().decode(document, device)
        return replace(cache, values=cache.values * self.factor)


@pytest.mark.parametrize(
    ("gained", "lost", "asked", "expected"),
    [
        # The example of Fagerland, Lydersen and Laake (Statistics in Medicine 33, 2014), table VI.
        (1, 7, 21, (-28.57, -51.7, -2.6)),
        # Nothing changed: z^2 / (n + z^2).
        (0, 0, 2000, (0.0, -0.1917, 0.1917)),
    ],
)
def test_the_interval_of_a_difference(gained: int, lost: int, asked: int, expected: tuple[float, ...]) -> None:
    assert paired_difference(gained, lost, asked) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("share", [0.0002, 0.001, 0.002, 0.003, 0.005, 0.02])
def test_the_interval_holds_the_truth_19_times_in_20(share: float) -> None:
    """Where answers are lost alone, and each is with this probability: summed over what can be found."""
    asked, held = 2000, 0.0
    for lost in range(120):
        _, low, high = paired_difference(0, lost, asked)
        if low <= -100 * share <= high:
            held += math.comb(asked, lost) * share**lost * (1 - share) ** (asked - lost)
    assert held > 0.93


def bf16(model: LoadedModel, documents: Any) -> list[DocumentCache]:
    return [
        DocumentCache(c.token_ids, c.keys.bfloat16().to(model.dtype), c.values.bfloat16().to(model.dtype))
        for c in DocumentEncoder(model).encode(documents)
    ]


def stepwise(model: LoadedModel, case: Case, caches: list[DocumentCache], follow: Any) -> torch.Tensor:
    """As the engine computes when it generates: the prompt, then token by token."""
    linked = case.linker.link(model, case.prompt, caches, reserve=len(follow))
    found = [linked.compute(linked.token_ids[linked.pending], linked.pending)]
    for position, token in enumerate(follow, case.prompt.length):
        found.append(linked.compute(torch.tensor([token]), torch.tensor([position])))
    return torch.stack(found)


def test_one_pass_gives_what_steps_give(embedded: LoadedModel) -> None:
    for material in (passages(embedded, 3), own_text(embedded, 1, 30, 6)):
        group = material.groups[0]
        caches = bf16(embedded, group.documents)
        for case in group.cases:
            reference = Reference.of(embedded, case, caches)
            steps = stepwise(embedded, case, caches, reference.follow)
            assert (reference.logits - steps).abs().max() <= 1e-4 * steps.abs().max()
            if case.question is None:
                continue
            linked = case.linker.link(embedded, case.prompt, caches, reserve=48)
            events = list(Generation(linked, SamplingParams(), max_tokens=48, stop_ids=embedded.stop_ids))
            assert [t for event in events for t in event.token_ids] == list(reference.follow)
            assert reference.right == ("".join(event.text for event in events) == case.question.answer)


def test_a_wrong_answer_of_the_reference_is_followed_as_it_is(embedded: LoadedModel) -> None:
    group = passages(embedded, 1).groups[0]
    (case,) = group.cases
    assert case.question is not None
    case = replace(case, question=replace(case.question, answer="Nobody knows."))
    caches = bf16(embedded, group.documents)
    reference = Reference.of(embedded, case, caches)
    assert reference.right is False
    assert list(reference.follow) != embedded.layout.plain_tokens("Nobody knows.")
    assert reference.logits[:-1].argmax(1).tolist() == list(reference.follow)


def test_divergence_and_errors_are_those_that_torch_computes(embedded: LoadedModel) -> None:
    group = passages(embedded, 1).groups[0]
    (case,) = group.cases
    caches = bf16(embedded, group.documents)
    reference = Reference.of(embedded, case, caches)
    harmed = [replace(cache, values=cache.values * 0.7) for cache in caches]
    outcome = reference.outcome(embedded, case, harmed)
    found = logits_after(embedded, case, harmed, reference.follow)
    expected = torch.nn.functional.kl_div(
        found.double().log_softmax(1), reference.logits.double().log_softmax(1), reduction="sum", log_target=True
    )
    assert outcome.divergence == pytest.approx(float(expected), rel=1e-6)
    assert outcome.divergence > 1e-5
    assert relative(outcome.logits) == pytest.approx(
        float((found - reference.logits).norm() / reference.logits.norm()), rel=1e-4
    )
    assert outcome.steps == len(reference.follow) + 1


def test_a_codec_is_charged_with_what_it_does(embedded: LoadedModel) -> None:
    codecs: Mapping[str, Any] = {
        "raw": get_codec("raw"), "lossless": get_codec("lossless"), "int8": get_codec("int8"),
        "deaf": Harm(0.0), "again": Harm(0.0),
    }  # fmt: skip
    material = passages(embedded, 12)
    done: list[tuple[int, int]] = []
    tallies = compare(embedded, material, codecs, lambda *at: done.append(at))
    assert done == [(n, 12) for n in range(1, 13)]
    for name in ("raw", "lossless"):
        tally = tallies[name]
        assert (relative(tally.keys), relative(tally.values), relative(tally.logits)) == (0, 0, 0)
        assert (tally.divergence, tally.same_choices, tally.questions) == (0, tally.steps, 12)
        assert (tally.gained, tally.lost) == (0, 0)
    raw, int8, deaf = tallies["raw"], tallies["int8"], tallies["deaf"]
    assert raw.stored_bytes == raw.bf16_bytes == 2 * 2 * 8 * 4 * 32 * raw.tokens
    assert tallies["lossless"].stored_bytes < raw.stored_bytes
    assert 0 < relative(int8.keys) < 0.02
    assert 0 < int8.divergence / int8.steps < 1e-2
    assert relative(deaf.values) == 1
    assert relative(deaf.keys) == 0
    assert deaf.divergence / deaf.steps > 0.1
    assert deaf.lost == raw.right - deaf.right > 6
    assert deaf == tallies["again"]


def test_pruned_caches_are_held_against_what_they_have_left(embedded: LoadedModel) -> None:
    specs = [
        "raw",
        "raw:keep=0.5,scorer=knorm",
        "raw:keep=0.5,scorer=expected-attention",
        "int8:keep=0.5,scorer=random",
    ]
    tallies = compare(embedded, long_documents(embedded, 4, 100), {spec: get_codec(spec) for spec in specs})
    whole, *pruned = (tallies[spec] for spec in specs)
    for tally in pruned:
        assert (tally.tokens, tally.bf16_bytes) == (whole.tokens, whole.bf16_bytes)
        assert tally.divergence > 0
    for tally in pruned[:2]:
        assert (relative(tally.keys), relative(tally.values)) == (0, 0)
        assert 0.5 < tally.stored_bytes / tally.bf16_bytes < 0.54
    assert 0 < relative(pruned[2].keys) < 0.02


def test_answers_that_change_count_once_each() -> None:
    from kvlink_core.benchmark.codec_quality import Outcome

    tally = Tally()
    for right, before in ((True, True), (True, False), (False, True), (False, True), (False, False)):
        tally.add_outcome(Outcome((1.0, 4.0), 0.5, 2, 1, right), before)
    tally.add_outcome(Outcome((1.0, 4.0), 0.5, 2, 1, None), None)
    assert (tally.questions, tally.right, tally.gained, tally.lost) == (5, 2, 1, 2)
    assert (tally.steps, tally.same_choices, tally.divergence) == (12, 6, 3.0)
    assert relative(tally.logits) == 0.5


def test_long_documents_hold_all_passages_and_all_questions(embedded: LoadedModel) -> None:
    short, long = passages(embedded, 90), long_documents(embedded, 90, 400)
    assert short.prompts == long.prompts == 90
    tokens = [t for group in short.groups for document in group.documents for t in document]
    assert tokens == [t for group in long.groups for document in group.documents for t in document]
    assert all(len(group.documents) == 1 for group in long.groups)
    assert 1 < len(long.groups) < len(short.groups)
    assert max(len(group.documents[0]) for group in long.groups) <= 400
    assert "90 prompts" in long.description


def test_drawn_texts_are_the_models_own_and_go_on(tiny_model: LoadedModel) -> None:
    material = own_text(tiny_model, 3, 20, 5)
    again = own_text(tiny_model, 3, 20, 5)
    texts = [[*g.documents[0], *g.cases[0].continuation] for g in material.groups]
    assert texts == [[*g.documents[0], *g.cases[0].continuation] for g in again.groups]
    assert len({tuple(text) for text in texts}) == 3
    assert [len(text) for text in texts] == [24] * 3
    assert not any(token in tiny_model.stop_ids for text in texts for token in text)
    (segment, last) = material.groups[0].cases[0].prompt.segments
    assert (segment.end, last.start, len(last.token_ids)) == (20, 20, 1)


def test_a_group_without_harm_costs_nothing_to_describe() -> None:
    material = Material("m", "two texts", [Group([[1, 2], [3]], []), Group([[4, 5, 6]], [])])
    assert material.description == "two texts: 0 prompts, 3 documents of 2 tokens on average"
    assert math.isclose(relative((4.0, 16.0)), 0.5)
    assert relative((0.0, 0.0)) == 0
