"""Generated worlds: short passages about people, companies, cities and things, with questions that they answer.

``make_world(seed)`` is a pure function of its arguments on every platform. Seeds are split in three disjoint ranges:
training uses ``TRAIN_SEEDS``, model selection ``VALIDATION_SEEDS``, reported figures ``TEST_SEEDS``; since every
world draws its own names, facts, wording and order, a held-out context is never seen in training (single names,
relations and sentence patterns are).

How to read a world: each passage is one document. Passages about one subject (an *article*) stand next to each other.
The first passage of an article names its subject; a later one may say only "She", "He" or "It", which always means the
subject of the nearest earlier passage that starts with a name. Relations of the subject kinds are worded differently,
and no subject has two facts of one relation, so every question has exactly one answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from kvlink_core.training import lexicon as lx
from kvlink_core.training.relations import RELATIONS, WHO, Relation

TRAIN_SEEDS = range(1 << 40, 1 << 52)
VALIDATION_SEEDS = range(1_000_000, 2_000_000)
TEST_SEEDS = range(0, 1_000_000)

UNKNOWN_ANSWER = "The passages do not say."


@dataclass(frozen=True)
class Question:
    """``kind`` is ``fact``, ``pronoun`` (the fact stands in a passage that does not name its subject), ``two-hop`` or,
    in ``World.unknown`` only, ``unknown``."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class World:
    """Passages in reading order, the questions they answer, and each passage's subject (usable as its title).

    ``unknown`` holds a few questions that the passages do not answer; their answer is ``UNKNOWN_ANSWER``.
    """

    passages: list[str]
    questions: list[Question]
    titles: list[str]
    unknown: list[Question]


@dataclass(frozen=True)
class Level:
    """How hard worlds are. The defaults are the full task; training's curriculum starts far below."""

    bare: bool = False  # "Maria Lopez Oslo." instead of sentences
    pool: int = 1000  # entries of each word list that may be used
    made_up: float = 0.12  # share of names made from syllables
    articles: int = 12  # most subjects in a world
    facts: int = 3  # most facts in a passage
    article_passages: int = 4  # most passages in an article: 1 means no passage depends on another
    relations: int = 1000  # relations of each subject kind that may be used
    kinds: tuple[str, ...] = ("person", "person", "person", "company", "company", "city", "thing")
    hops: bool = True


FULL = Level()

_VALUES: dict[str, list[str]] = {
    "job": lx.JOBS,
    "instrument": lx.INSTRUMENTS,
    "language": lx.LANGUAGES,
    "pet": lx.PETS,
    "study": lx.STUDIES,
    "product": lx.PRODUCTS,
    "sight": lx.SIGHTS,
    "place": lx.KEEPING_PLACES,
    "material": lx.MATERIALS,
}


@dataclass
class _Fact:
    relation: Relation
    value: str
    target: _Subject | None  # the subject that the value names, when it has an article of its own
    year: str = ""
    kind: str = ""  # set once the fact is written: fact or pronoun


@dataclass(eq=False)
class _Subject:
    kind: str
    name: str  # as inside a sentence: "Maria Lopez", "the silver clock"
    pronoun: str
    facts: list[_Fact] = field(default_factory=list)

    def opening(self) -> str:
        return self.name[0].upper() + self.name[1:]


class _Names:
    """Draws names that are unique within one world."""

    def __init__(self, rng: random.Random, level: Level) -> None:
        self._rng, self._level = rng, level
        self._used: set[str] = set()

    def pick(self, words: list[str]) -> str:
        return words[int(self._rng.random() * min(len(words), self._level.pool))]

    def _invent(self) -> str:
        pick = self._rng.choice
        word = pick(lx.ONSETS) + pick(lx.VOWELS)
        while self._rng.random() < 0.4:
            word += pick(lx.ONSETS)[0] + pick(lx.VOWELS)
        return word + pick(lx.CODAS)

    def word(self, words: list[str]) -> str:
        return self._invent().capitalize() if self._rng.random() < self._level.made_up else self.pick(words)

    def entity(self, kind: str) -> tuple[str, str]:
        """A new name of that kind, with its pronoun."""
        while True:
            pronoun = "It"
            if kind == "person":
                woman = self._rng.random() < 0.5
                pronoun = "She" if woman else "He"
                name = f"{self.word(lx.WOMEN if woman else lx.MEN)} {self.word(lx.FAMILIES)}"
            elif kind == "company":
                name = self.word(lx.COMPANIES)
            elif kind == "city":
                name = self.word(lx.CITIES)
            elif kind == "river":
                name = self.word(lx.RIVERS)
            else:
                name = f"the {self.pick(lx.ADJECTIVES)} {self.pick(lx.NOUNS)}"
            if name not in self._used:
                self._used.add(name)
                return name, pronoun

    def year(self) -> str:
        return str(1900 + int(self._rng.random() * min(120, max(20, self._level.pool))))

    def value(self, kind: str) -> str:
        if kind == "year":
            return self.year()
        if kind not in _VALUES:
            return self.entity(kind)[0]
        value = self.pick(_VALUES[kind])
        if self._rng.random() < self._level.made_up / 2:
            # A word that no list holds, behind the article of the one that it replaces.
            article = value.split(" ")[0] + " " if value.startswith(("a ", "an ", "the ")) else ""
            value = ("a " if article == "an " else article) + self._invent()
        return value


def make_world(seed: int, passages: tuple[int, int] = (2, 12), level: Level = FULL) -> World:
    """The world of ``seed``, with a number of passages drawn evenly from ``passages`` (both ends included)."""
    rng = random.Random(seed)
    names = _Names(rng, level)
    sizes = _article_sizes(rng, rng.randint(*passages), level)
    subjects = []
    for _ in sizes:
        kind = level.kinds[int(rng.random() * len(level.kinds))]
        subjects.append(_Subject(kind, *names.entity(kind)))
    # Entities without an article are drawn from those met already half the time, so that subjects share values.
    extras: dict[str, list[str]] = {}
    out_passages: list[str] = []
    titles: list[str] = []
    for subject, size in zip(subjects, sizes, strict=True):
        for text in _write_article(rng, names, subject, size, subjects, extras, level):
            out_passages.append(text)
            titles.append(subject.opening())
    questions = _ask(rng, subjects, level)
    unknown = [] if level.bare else _ask_unknown(rng, names, subjects, 1 + len(questions) // 8)
    return World(out_passages, questions, titles, unknown)


def _article_sizes(rng: random.Random, total: int, level: Level) -> list[int]:
    # A world-wide typical size, so that some worlds are many short articles and others few long ones.
    longest = rng.randint(1, level.article_passages)
    sizes: list[int] = []
    while (left := total - sum(sizes)) > 0:
        if len(sizes) == level.articles:
            break
        sizes.append(min(left, rng.randint(1, longest)))
    return sizes


def _write_article(
    rng: random.Random,
    names: _Names,
    subject: _Subject,
    size: int,
    subjects: list[_Subject],
    extras: dict[str, list[str]],
    level: Level,
) -> list[str]:
    relations = list(RELATIONS[subject.kind][: level.relations])
    rng.shuffle(relations)
    if {"lives", "moved"} <= {relation.key for relation in relations}:
        # A person is said to live somewhere or to have moved somewhere: both would be two homes.
        out = "lives" if rng.random() < 0.35 else "moved"
        relations = [relation for relation in relations if relation.key != out]
    texts: list[str] = []
    for number in range(size):
        # Every passage of the article needs a fact of its own, so keep one back for each that is still to come.
        most = min(level.facts, len(relations) - (size - 1 - number))
        if most < 1:
            break
        named = number == 0 or rng.random() < 0.15
        sentences: list[str] = []
        for position in range(rng.randint(1, most)):
            fact = _make_fact(rng, names, relations.pop(), subject, subjects, extras)
            fact.kind = "fact" if named else "pronoun"
            subject.facts.append(fact)
            says_name = named and (position == 0 or rng.random() < 0.2)
            sentences.append(_state(rng, subject, fact, says_name, level))
        texts.append(" ".join(sentences))
    return texts


def _make_fact(
    rng: random.Random,
    names: _Names,
    relation: Relation,
    subject: _Subject,
    subjects: list[_Subject],
    extras: dict[str, list[str]],
) -> _Fact:
    year = names.year() if relation.dated else ""
    others = [s for s in subjects if s.kind == relation.value and s is not subject]
    if others and rng.random() < 0.75:
        target = others[int(rng.random() * len(others))]
        return _Fact(relation, target.name, target, year)
    met = extras.setdefault(relation.value, [])
    if relation.value in ("city", "company", "person") and met and rng.random() < 0.4:
        return _Fact(relation, met[int(rng.random() * len(met))], None, year)
    value = names.value(relation.value)
    met.append(value)
    return _Fact(relation, value, None, year)


def _state(rng: random.Random, subject: _Subject, fact: _Fact, says_name: bool, level: Level) -> str:
    if level.bare:
        return f"{subject.opening()} {fact.value}."
    template = fact.relation.statements[int(rng.random() * len(fact.relation.statements))]
    first = template.startswith("{s}")
    if says_name:
        name = subject.opening() if first else subject.name
    else:
        name = subject.pronoun if first else subject.pronoun.lower()
    return template.format(s=name, v=fact.value, y=fact.year)


def _ask(rng: random.Random, subjects: list[_Subject], level: Level) -> list[Question]:
    questions: list[Question] = []
    for subject in subjects:
        for fact in subject.facts:
            answer = _answer(subject, fact)
            if level.bare:
                text = f"{subject.opening()} {fact.value}."
                questions.append(Question("fact", f"{subject.opening()}?", text))
                continue
            ask = fact.relation.questions[int(rng.random() * len(fact.relation.questions))]
            text = ask.format(s=subject.name, v=fact.value, y=fact.year)
            questions.append(Question(fact.kind, text, answer))
            if level.hops and fact.target is not None and fact.relation.bridge:
                questions += [_hop(rng, subject, fact, second) for second in fact.target.facts]
    rng.shuffle(questions)
    return questions


def _answer(subject: _Subject, fact: _Fact) -> str:
    return fact.relation.answer.format(s=subject.opening(), v=fact.value, y=fact.year)


def _hop(rng: random.Random, subject: _Subject, first: _Fact, second: _Fact) -> Question:
    """Ask ``second`` (a fact of the subject that ``first`` names) without naming that subject."""
    assert first.target is not None
    ask = second.relation.questions[int(rng.random() * len(second.relation.questions))]
    bridge = first.relation.bridge.format(s=subject.name)
    who = "who" if first.target.kind in WHO else "which"
    clause = second.relation.answer.format(s=who, v=second.value, y=second.year)
    question = ask.format(s=bridge, v=second.value, y=second.year)
    return Question("two-hop", question, f"{_answer(subject, first)[:-1]}, {clause}")


def _ask_unknown(rng: random.Random, names: _Names, subjects: list[_Subject], many: int) -> list[Question]:
    """Up to ``many`` questions about strangers, unstated relations and bridges that lead nowhere."""
    out = []
    for _ in range(many):
        subject = subjects[int(rng.random() * len(subjects))]
        stated, phrase, kind = _stated(subject), subject.name, subject.kind
        chance = rng.random()
        if chance < 0.3:
            stated, phrase = set(), names.entity(kind)[0]
        elif chance < 0.65:
            bridges = [fact for fact in subject.facts if fact.relation.bridge]
            if bridges:
                fact = bridges[int(rng.random() * len(bridges))]
                kind, phrase = fact.relation.value, fact.relation.bridge.format(s=subject.name)
                stated = _stated(fact.target) if fact.target is not None else set()
        free = [relation for relation in RELATIONS[kind] if relation.key not in stated]
        if free:
            relation = free[int(rng.random() * len(free))]
            ask = relation.questions[-1 if relation.dated else int(rng.random() * len(relation.questions))]
            out.append(Question("unknown", ask.format(s=phrase), UNKNOWN_ANSWER))
    return out


def _stated(subject: _Subject) -> set[str]:
    keys = {fact.relation.key for fact in subject.facts}
    # "moved to Oslo" leaves open whether someone lives there still: neither is asked where the other is stated.
    return keys | {"lives", "moved"} if keys & {"lives", "moved"} else keys
