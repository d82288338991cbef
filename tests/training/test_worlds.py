"""Worlds are deterministic, and a reader who knows only English and the passages finds exactly one answer."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest

from kvlink_core.training import worlds
from kvlink_core.training.curriculum import LAST, STAGES, Progress
from kvlink_core.training.variety import rename, vary
from kvlink_core.training.worlds import TEST_SEEDS, TRAIN_SEEDS, VALIDATION_SEEDS, Question, World, make_world

# An independent reader: what each sentence pattern says, written out again and not taken from the generator's tables.
PERSON = r"(?P<s>.+?)"
SENTENCES: list[tuple[str, str]] = [
    ("lives", r"(?P<s>.+?) (?:lives in|has a home in) (?P<v>.+)\."),
    ("lives", r"(?P<s>.+?) settled in (?P<v>.+) years ago\."),
    ("moved", r"(?P<s>.+?) moved to (?P<v>.+) in (?P<y>\d{4})\."),
    ("moved", r"In (?P<y>\d{4}) (?P<s>.+?) moved to (?P<v>.+)\."),
    ("works", r"(?P<s>.+?) (?:works for|has a job at|is employed by) (?P<v>.+)\."),
    ("born", r"(?P<s>.+?) was born in (?P<v>\d{4})\."),
    ("plays", r"(?P<s>.+?) plays the (?P<v>.+)\."),
    ("plays", r"(?P<s>.+?) practises the (?P<v>.+) every evening\."),
    ("speaks", r"(?P<s>.+?) (?:speaks|is fluent in) (?P<v>.+)\."),
    ("pet", r"(?P<s>.+?) (?:keeps|takes care of) (?P<v>.+)\."),
    ("studied", r"(?P<s>.+?) (?:studied|has a degree in) (?P<v>.+)\."),
    ("based", r"(?P<s>.+?) (?:is based in|has its head office in) (?P<v>.+)\."),
    ("makes", r"(?P<s>.+?) sells (?P<v>.+) all over the world\."),
    ("makes", r"(?P<s>.+?) makes (?P<v>.+)\."),
    ("founded", r"(?P<s>.+?) (?:was founded|opened for business) in (?P<v>\d{4})\."),
    ("led", r"(?P<s>.+?) is (?:led|run) by (?P<v>.+)\."),
    ("known", r"(?P<s>.+?) is (?:known|famous) for its (?P<v>.+)\."),
    ("river", r"(?P<s>.+?) (?:lies on|was built along) the river (?P<v>.+)\."),
    ("governed", r"(?P<s>.+?) is governed by (?P<v>.+)\."),
    ("governed", r"(?P<s>.+?) has elected (?P<v>.+) as mayor\."),
    ("railway", r"(?P<s>.+?) got its first railway in (?P<v>\d{4})\."),
    ("railway", r"(?P<s>.+?) has had a railway since (?P<v>\d{4})\."),
    ("owner", r"(?P<s>.+?) (?:belongs to|is owned by) (?P<v>.+)\."),
    ("made", r"(?P<s>.+?) (?:was made in|dates from) (?P<v>\d{4})\."),
    ("kept", r"(?P<s>.+?) (?:is kept|can be seen) in (?P<v>.+)\."),
    ("material", r"(?P<s>.+?) (?:is made of|was cut from) (?P<v>.+)\."),
    ("job", r"(?P<s>.+?) became (?P<v>an? .+) early on\."),
    ("job", r"(?P<s>.+?) is (?P<v>an? .+)\."),
]
ANSWERS: list[tuple[str, str]] = [
    (key, pattern.replace("|has a home in", "")) for key, pattern in SENTENCES if not pattern.startswith("In ")
]
PRONOUNS = {"she", "he", "it"}


def read(world: World) -> tuple[dict[tuple[str, str], str], dict[tuple[str, str], int]]:
    """Facts ``(subject, relation) -> value`` and the passage of each; fails on anything ambiguous."""
    facts: dict[tuple[str, str], str] = {}
    places: dict[tuple[str, str], int] = {}
    subject = ""
    for place, passage in enumerate(world.passages):
        for sentence in re.findall(r"[^.]+\.", passage):
            sentence = sentence.strip()
            hits = [(key, m) for key, p in SENTENCES if (m := re.fullmatch(p, sentence))]
            assert len(hits) == 1, (sentence, hits)
            key, match = hits[0]
            name = match["s"]
            if name.lower() in PRONOUNS:
                assert subject, sentence
            else:
                subject = name.lower()
            assert (subject, key) not in facts, "two facts of one relation"
            value = match["v"].lower()
            facts[subject, key] = f"{value} {match['y']}" if key == "moved" else value
            places[subject, key] = place
    return facts, places


def claims(question: Question) -> list[tuple[str, str, str]]:
    """The ``(subject, relation, value)`` claims that an answer makes."""
    first, _, second = question.answer.partition(", ")
    parts = [first if first.endswith(".") else first + "."]
    out = []
    subject = ""
    if second:
        parts.append(second)
    for part in parts:
        hits = [(key, m) for key, p in ANSWERS if (m := re.fullmatch(p, part))]
        assert len(hits) == 1, (part, hits)
        key, match = hits[0]
        subject = out[0][2] if out else match["s"].lower()
        value = match["v"].lower()
        out.append((subject, key, f"{value} {match['y']}" if key == "moved" else value))
    return out


@pytest.mark.parametrize("renamed", [False, True], ids=["listed words", "new words"])
@pytest.mark.parametrize("start", [TEST_SEEDS.start, VALIDATION_SEEDS.start, TRAIN_SEEDS.start])
def test_every_question_has_exactly_the_given_answer(start: int, renamed: bool) -> None:
    kinds: dict[str, int] = {}
    for seed in range(start, start + 100):
        world = make_world(seed)
        if renamed:
            world = rename(world, random.Random(seed))
        assert 2 <= len(world.passages) <= 12
        assert len(world.titles) == len(world.passages)
        facts, places = read(world)
        for question in world.questions:
            kinds[question.kind] = kinds.get(question.kind, 0) + 1
            found = claims(question)
            for subject, key, value in found:
                assert facts[subject, key] == value, (seed, question)
            subject, key, _ = found[0]
            assert subject in question.question.lower()
            passage = world.passages[places[subject, key]].lower()
            if question.kind == "two-hop":
                assert len(found) == 2
                assert places[found[0][:2]] != places[found[1][:2]], "across two documents"
                bridge = rf"\b{re.escape(found[1][0])}\b"
                assert not re.search(bridge, question.question.lower()), "the bridge is not named"
            else:
                assert len(found) == 1
                named = re.search(rf"\b{re.escape(subject)}\b", passage)
                # A new word may happen to be an English one ("in"); those are too short to look for.
                assert len(subject) < 4 or (question.kind == "fact") == (named is not None)
    assert min(kinds[kind] for kind in ("fact", "pronoun", "two-hop")) > 100


def test_unknown_questions_are_not_answered_by_the_passages() -> None:
    asked = 0
    for seed in range(150):
        world = make_world(seed)
        known = {question.question for question in world.questions}
        for question in world.unknown:
            assert question.answer == worlds.UNKNOWN_ANSWER
            assert question.question not in known
            asked += 1
    assert asked > 150


def test_a_seed_gives_the_same_world_everywhere() -> None:
    # Frozen: if this changes, held-out figures are figures of other worlds.
    world = make_world(2)
    assert world == make_world(2)
    assert world.passages == [
        "Phoenix has had a railway since 2012. It is governed by Rajesh Jones. Phoenix lies on the river Esk.",
        "Hugo Jones has a degree in theology. He practises the tuba every evening.",
    ]


def test_seed_ranges_are_disjoint() -> None:
    ranges = sorted((TEST_SEEDS, VALIDATION_SEEDS, TRAIN_SEEDS), key=lambda r: r.start)
    assert all(a.stop <= b.start for a, b in pairwise(ranges))


def test_the_number_of_passages_is_respected() -> None:
    assert {len(make_world(seed, (3, 3)).passages) for seed in range(50)} == {3}
    assert {len(make_world(seed, (2, 12)).passages) for seed in range(300)} == set(range(2, 13))


def test_stages_make_worlds_and_progress_moves_on() -> None:
    for stage in STAGES:
        assert all(make_world(seed, stage.passages, stage.level).questions for seed in range(20))
    progress = Progress(needed=0.9)
    assert not progress.update(0, 10, elapsed=1.0, patience=100.0)
    for _ in range(30):
        progress.update(10, 10, elapsed=2.0, patience=100.0)
    assert progress.stage >= 2
    progress = Progress()
    assert progress.update(0, 10, elapsed=101.0, patience=100.0), "patience ran out"
    progress = Progress(stage=LAST)
    assert not progress.update(10, 10, elapsed=1e9, patience=1.0)


def test_variety_keeps_the_text_and_the_answers() -> None:
    seen: set[str] = set()
    for seed in range(200):
        world = make_world(seed)
        rng = random.Random(seed)
        asked = vary(world, rng)
        assert asked.documents
        assert all(text.startswith("Passage: ") and text.endswith("\n") for text in asked.documents)
        assert asked == vary(world, random.Random(seed)), "a function of world and generator"
        seen |= {role for role, _ in asked.turns} | {question.kind for question in asked.questions}
        if len(asked.documents) < len(world.passages):
            seen.add("merged")
    assert seen >= {"system", "user", "assistant", "fact", "pronoun", "two-hop", "unknown", "merged"}
