"""The embedded model on held-out worlds, through encode, link, prefill and decode."""

from __future__ import annotations

import itertools

import pytest

from kvlink_core.engine import SamplingParams
from kvlink_core.errors import InputError
from kvlink_core.evaluation.worlds import Condition, Graded, accuracy, evaluate, held_out
from kvlink_core.models import LoadedModel, load_model
from kvlink_core.session import AnswerRequest, Session
from kvlink_core.training.worlds import TEST_SEEDS
from kvlink_core.types import Document, Message


@pytest.fixture(scope="module")
def embedded() -> LoadedModel:
    return load_model()


def test_the_shipped_model_answers_held_out_questions(embedded: LoadedModel) -> None:
    """The targets are 95 % and 93 % over 2,000 questions; of 40, two wrong ones are within chance of that."""
    conditions = [Condition("full"), Condition("link-tokens")]
    results = evaluate(embedded, conditions, 40)
    assert {r.kind for r in results} == {"fact", "pronoun", "two-hop"}
    for condition in conditions:
        right, asked = accuracy(results, condition=condition.name)
        assert asked == 40
        assert right >= 38, [r for r in results if not r.right]


def test_without_its_documents_the_model_knows_nothing(embedded: LoadedModel) -> None:
    """Answers come from the documents, not from the weights: asked over another world's passages, none is right."""
    session = Session(embedded)
    for (_, questions), (other, _) in itertools.pairwise(held_out(200)):
        documents = [Document("", p) for p in other.passages]
        answer = session.start(
            AnswerRequest([Message("user", questions[0].question)], documents, None, SamplingParams(max_tokens=48))
        )
        assert answer.text().strip() != questions[0].answer


def test_exactly_the_asked_number_of_questions_from_the_held_out_range() -> None:
    worlds = list(held_out(50))
    assert sum(len(questions) for _, questions in worlds) == 50
    assert TEST_SEEDS.start == 0


def test_k_beyond_the_models_is_refused(embedded: LoadedModel) -> None:
    with pytest.raises(InputError, match="5 link tokens"):
        evaluate(embedded, [Condition("link-tokens", 6)], 1)


def test_accuracy_counts() -> None:
    rows = [Graded("full", kind, 2, "?", "A.", answer) for kind, answer in [("x", "A."), ("x", "B."), ("y", " A.\n")]]
    assert accuracy(rows) == (2, 3)
    assert accuracy(rows, kind="x") == (1, 2)
    assert accuracy(rows, condition="other") == (0, 0)
