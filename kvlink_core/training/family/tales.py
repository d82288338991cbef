"""Generated tales: passages of which a later one means nothing without an earlier one.

The worlds of ``training/worlds.py`` turned out to need no links: each article's passages stand together, and a question
that names the subject finds its passages by their order. A tale is made so that a question cannot do that alone:

- A passage may name nobody: "She plays the harp." is about the woman whom the nearest earlier passage named at its
  start. Men ("He") and companies ("It") have their own, so that the three mix.
- **Subjects come back.** The same woman is named again later, others in between, and all of them have the same few
  relations. So there are several "She plays the ...", and which is whose follows from the passages before it, not from
  the question: a question would have to resolve every candidate.

Answers are sentences, as in the worlds ("Maria plays the harp."). With the value alone as the answer, a base of this
size did not learn to tell subjects apart in 330 M tokens: it stayed at guessing among the values of a relation.

``make_tale(seed, ...)`` is a pure function of its arguments on every platform; seeds are split as for worlds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from kvlink_core.training import lexicon as lx

#: ``fact``: stated in a passage that names its subject. ``pronoun``: in one that does not. ``two-hop``: by way of
#: another subject, both facts in passages that name theirs; ``two-hop-pronoun``: at least one is not.
KINDS = ("fact", "pronoun", "two-hop", "two-hop-pronoun")


@dataclass(frozen=True)
class TaleQuestion:
    """``kind`` is one of ``KINDS``; a two-hop answer is a sentence that names the subject between."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Tale:
    """Passages in reading order and the questions that they answer."""

    passages: list[str]
    questions: list[TaleQuestion]


@dataclass(frozen=True)
class TaleLevel:
    """How hard tales are. The defaults are the whole task; training's curriculum starts below."""

    bare: bool = False  # "Maria Oslo." instead of sentences, one fact for each subject
    pool: int = 1000  # entries of each word list that may be used
    kinds: str = "wmc"  # women, men, companies
    pronouns: float = 0.55  # share of passages that name nobody, where one can
    facts: int = 3  # most facts in a passage
    hops: bool = True


WHOLE = TaleLevel()


@dataclass(frozen=True)
class _Relation:
    value: str  # what kind of value: a word list, or "person" or "company"
    statement: str
    question: str
    bridge: str = ""


_PERSON = (
    _Relation("city", "{s} lives in {v}.", "Where does {s} live?"),
    _Relation("instrument", "{s} plays the {v}.", "Which instrument does {s} play?"),
    _Relation("person", "{s} is a friend of {v}.", "Who is the friend of {s}?", "the friend of {s}"),
    _Relation("company", "{s} works for {v}.", "Which company does {s} work for?", "the company that {s} works for"),
    _Relation("language", "{s} speaks {v}.", "Which language does {s} speak?"),
    _Relation("study", "{s} studied {v}.", "What did {s} study?"),
    _Relation("year", "{s} was born in {v}.", "When was {s} born?"),
)
_COMPANY = (
    _Relation("city", "{s} is based in {v}.", "Where is {s} based?"),
    _Relation("product", "{s} makes {v}.", "What does {s} make?"),
    _Relation("person", "{s} is run by {v}.", "Who runs {s}?", "the person who runs {s}"),
    _Relation("year", "{s} was founded in {v}.", "When was {s} founded?"),
)
_WORDS = {
    "city": lx.CITIES,
    "instrument": lx.INSTRUMENTS,
    "language": lx.LANGUAGES,
    "study": lx.STUDIES,
    "product": lx.PRODUCTS,
}
_PRONOUNS = {"w": "She", "m": "He", "c": "It"}


@dataclass(eq=False)
class _Subject:
    kind: str
    name: str
    free: list[_Relation]
    facts: list[_Fact] = field(default_factory=list)


@dataclass
class _Fact:
    relation: _Relation
    value: str
    target: _Subject | None
    named: bool


def make_tale(seed: int, passages: tuple[int, int] = (4, 20), level: TaleLevel = WHOLE) -> Tale:
    """The tale of ``seed``, with at most the number of passages drawn from ``passages`` (fewer if facts run out)."""
    rng = random.Random(seed)
    many = rng.randint(*passages)
    subjects = _subjects(rng, many, level)
    focus: dict[str, _Subject] = {}
    texts: list[str] = []
    for _ in range(many):
        can_follow = [s for s in focus.values() if s.free]
        if can_follow and rng.random() < level.pronouns:
            subject, named = can_follow[int(rng.random() * len(can_follow))], False
        else:
            left = [s for s in subjects if s.free]
            if not left:
                break
            # Someone else than the one in focus, if there is anyone: a name again for the same would change nothing.
            others = [s for s in left if focus.get(s.kind) is not s] or left
            subject, named = others[int(rng.random() * len(others))], True
            focus[subject.kind] = subject
        texts.append(_passage(rng, subject, named, subjects, level))
    return Tale(texts, _ask(rng, subjects, level))


def _subjects(rng: random.Random, many: int, level: TaleLevel) -> list[_Subject]:
    # About two passages of facts for each, so that facts last and several subjects share their relations.
    count = max(2, min(9, round(many * (0.3 + 0.25 * rng.random()))))
    used: set[str] = set()
    subjects = []
    for _ in range(count):
        kind = level.kinds[int(rng.random() * len(level.kinds))]
        words = {"w": lx.WOMEN, "m": lx.MEN, "c": lx.COMPANIES}[kind]
        name = _pick(rng, words, level)
        while name in used:
            name = _pick(rng, words, level)
        used.add(name)
        relations = list(_COMPANY if kind == "c" else _PERSON)
        rng.shuffle(relations)
        subjects.append(_Subject(kind, name, relations[:1] if level.bare else relations))
    return subjects


def _pick(rng: random.Random, words: list[str], level: TaleLevel) -> str:
    return words[int(rng.random() * min(len(words), level.pool))]


def _passage(rng: random.Random, subject: _Subject, named: bool, subjects: list[_Subject], level: TaleLevel) -> str:
    sentences = []
    for number in range(min(rng.randint(1, level.facts), len(subject.free))):
        relation = subject.free.pop()
        value, target = _value(rng, relation, subject, subjects, level)
        subject.facts.append(_Fact(relation, value, target, named))
        says = subject.name if named and number == 0 else _PRONOUNS[subject.kind]
        sentences.append(f"{says} {value}." if level.bare else relation.statement.format(s=says, v=value))
    return " ".join(sentences)


def _value(
    rng: random.Random, relation: _Relation, subject: _Subject, subjects: list[_Subject], level: TaleLevel
) -> tuple[str, _Subject | None]:
    if relation.value == "year":
        return str(1900 + int(rng.random() * min(120, max(20, level.pool)))), None
    if relation.value in _WORDS:
        return _pick(rng, _WORDS[relation.value], level), None
    kinds = "wm" if relation.value == "person" else "c"
    others = [s for s in subjects if s.kind in kinds and s is not subject]
    if others and rng.random() < 0.85:
        target = others[int(rng.random() * len(others))]
        return target.name, target
    known = {s.name for s in subjects}
    words = lx.COMPANIES if kinds == "c" else lx.WOMEN if rng.random() < 0.5 else lx.MEN
    value = _pick(rng, words, level)
    while value in known:
        value = _pick(rng, words, level)
    return value, None


def _ask(rng: random.Random, subjects: list[_Subject], level: TaleLevel) -> list[TaleQuestion]:
    single: list[TaleQuestion] = []
    hops: list[TaleQuestion] = []
    for subject in subjects:
        for fact in subject.facts:
            if level.bare:
                single.append(TaleQuestion("fact", f"{subject.name}?", f"{subject.name} {fact.value}."))
                continue
            kind = "fact" if fact.named else "pronoun"
            said = fact.relation.statement.format(s=subject.name, v=fact.value)
            single.append(TaleQuestion(kind, fact.relation.question.format(s=subject.name), said))
            if not level.hops or fact.target is None:
                continue
            bridge = fact.relation.bridge.format(s=subject.name)
            who = "which" if fact.target.kind == "c" else "who"
            for second in fact.target.facts:
                kind = "two-hop" if fact.named and second.named else "two-hop-pronoun"
                clause = second.relation.statement.format(s=who, v=second.value)
                hops.append(TaleQuestion(kind, second.relation.question.format(s=bridge), f"{said[:-1]}, {clause}"))
    rng.shuffle(hops)
    questions = single + hops[: len(single)]
    rng.shuffle(questions)
    return questions
