"""What can be said about a person, company, city or thing: statements, questions and the one right answer.

Templates use ``{s}`` for the subject, ``{v}`` for the value and ``{y}`` for a year. A statement's ``{s}`` may become a
pronoun; an answer always starts with ``{s}``, so that ``"{s} works for Norvik."`` can be continued to
``"..., which is based in Oslo."``. No two relations of one subject kind share a statement's wording: a reader can tell
which relation a sentence states.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One relation: ``value`` names the kind of value (a lexicon list, ``year`` or an entity kind)."""

    key: str
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str
    #: noun phrase for "the value of this relation of {s}", for two-hop questions; empty if the value is no entity
    bridge: str = ""
    #: a second value (a year) belongs to the fact
    dated: bool = False


RELATIONS: dict[str, tuple[Relation, ...]] = {
    "person": (
        Relation(
            "lives",
            "city",
            ("{s} lives in {v}.", "{s} has a home in {v}.", "{s} settled in {v} years ago."),
            ("Where does {s} live?", "In which city does {s} live?"),
            "{s} lives in {v}.",
            bridge="the city where {s} lives",
        ),
        Relation(
            "moved",
            "city",
            ("{s} moved to {v} in {y}.", "In {y} {s} moved to {v}."),
            ("Where did {s} move in {y}?", "When did {s} move to {v}?", "Where and when did {s} move?"),
            "{s} moved to {v} in {y}.",
            dated=True,
        ),
        Relation(
            "works",
            "company",
            ("{s} works for {v}.", "{s} has a job at {v}.", "{s} is employed by {v}."),
            ("Which company does {s} work for?", "Who employs {s}?", "Where does {s} work?"),
            "{s} works for {v}.",
            bridge="the company that {s} works for",
        ),
        Relation(
            "born",
            "year",
            ("{s} was born in {v}.",),
            ("When was {s} born?", "In which year was {s} born?"),
            "{s} was born in {v}.",
        ),
        Relation(
            "job",
            "job",
            ("{s} is {v}.", "{s} became {v} early on."),
            ("What does {s} do for a living?", "What is the job of {s}?"),
            "{s} is {v}.",
        ),
        Relation(
            "plays",
            "instrument",
            ("{s} plays the {v}.", "{s} practises the {v} every evening."),
            ("Which instrument does {s} play?", "What does {s} play?"),
            "{s} plays the {v}.",
        ),
        Relation(
            "speaks",
            "language",
            ("{s} speaks {v}.", "{s} is fluent in {v}."),
            ("Which language does {s} speak?", "What language does {s} speak?"),
            "{s} speaks {v}.",
        ),
        Relation(
            "pet",
            "pet",
            ("{s} keeps {v}.", "{s} takes care of {v}."),
            ("Which animal does {s} keep?", "What pet does {s} have?"),
            "{s} keeps {v}.",
        ),
        Relation(
            "studied",
            "study",
            ("{s} studied {v}.", "{s} has a degree in {v}."),
            ("What did {s} study?", "Which subject did {s} study?"),
            "{s} studied {v}.",
        ),
    ),
    "company": (
        Relation(
            "based",
            "city",
            ("{s} is based in {v}.", "{s} has its head office in {v}."),
            ("Where is {s} based?", "In which city is {s} based?"),
            "{s} is based in {v}.",
            bridge="the city where {s} is based",
        ),
        Relation(
            "makes",
            "product",
            ("{s} makes {v}.", "{s} sells {v} all over the world."),
            ("What does {s} make?", "Which goods does {s} make?"),
            "{s} makes {v}.",
        ),
        Relation(
            "founded",
            "year",
            ("{s} was founded in {v}.", "{s} opened for business in {v}."),
            ("When was {s} founded?", "In which year was {s} founded?"),
            "{s} was founded in {v}.",
        ),
        Relation(
            "led",
            "person",
            ("{s} is led by {v}.", "{s} is run by {v}."),
            ("Who leads {s}?", "Who runs {s}?"),
            "{s} is led by {v}.",
            bridge="the head of {s}",
        ),
    ),
    "city": (
        Relation(
            "known",
            "sight",
            ("{s} is known for its {v}.", "{s} is famous for its {v}."),
            ("What is {s} known for?", "What is {s} famous for?"),
            "{s} is known for its {v}.",
        ),
        Relation(
            "river",
            "river",
            ("{s} lies on the river {v}.", "{s} was built along the river {v}."),
            ("On which river does {s} lie?", "Which river does {s} lie on?"),
            "{s} lies on the river {v}.",
        ),
        Relation(
            "governed",
            "person",
            ("{s} is governed by {v}.", "{s} has elected {v} as mayor."),
            ("Who governs {s}?", "Who is the mayor of {s}?"),
            "{s} is governed by {v}.",
            bridge="the mayor of {s}",
        ),
        Relation(
            "railway",
            "year",
            ("{s} got its first railway in {v}.", "{s} has had a railway since {v}."),
            ("When did {s} get its first railway?", "Since when has {s} had a railway?"),
            "{s} got its first railway in {v}.",
        ),
    ),
    "thing": (
        Relation(
            "owner",
            "person",
            ("{s} belongs to {v}.", "{s} is owned by {v}."),
            ("Who owns {s}?", "Who does {s} belong to?"),
            "{s} belongs to {v}.",
            bridge="the owner of {s}",
        ),
        Relation(
            "made",
            "year",
            ("{s} was made in {v}.", "{s} dates from {v}."),
            ("When was {s} made?", "In which year was {s} made?"),
            "{s} was made in {v}.",
        ),
        Relation(
            "kept",
            "place",
            ("{s} is kept in {v}.", "{s} can be seen in {v}."),
            ("Where is {s} kept?", "In which place is {s} kept?"),
            "{s} is kept in {v}.",
        ),
        Relation(
            "material",
            "material",
            ("{s} is made of {v}.", "{s} was cut from {v}."),
            ("What is {s} made of?", "Which material is {s} made of?"),
            "{s} is made of {v}.",
        ),
    ),
}

#: entity kinds that a two-hop answer joins with "who"; all others take "which"
WHO = frozenset({"person"})
