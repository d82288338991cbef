"""Scores of an answer against what it should be, each from 0 to 1, the best over all reference answers.

Texts are compared as SQuAD's own script does: lower case, without punctuation and the articles a, an and the, any white
space as one space.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from kvlink_core.errors import ConfigError
from kvlink_core.evaluation.examples import Task

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """The text as SQuAD compares it (arXiv 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(answer: str, wanted: str) -> float:
    """1 where both are the same once normalised."""
    return float(normalised(answer) == normalised(wanted))


def subspan(answer: str, wanted: str) -> float:
    """1 where what is wanted stands somewhere in the answer, both normalised (lost-in-the-middle, arXiv 2307.03172).

    Letters count, not words: "art" is in "party". What is nothing once normalised is in nothing but itself; the usual
    script finds it in every answer.
    """
    whole, part = normalised(answer), normalised(wanted)
    return float(part in whole if part else not whole)


def token_f1(answer: str, wanted: str) -> float:
    """Harmonic mean of precision and recall over the words of both, normalised and counted."""
    found, right = normalised(answer).split(), normalised(wanted).split()
    if not found or not right:
        return float(found == right)
    common = sum((Counter(found) & Counter(right)).values())
    return 2 * common / (len(found) + len(right))


def rouge_l(answer: str, wanted: str) -> float:
    """F-measure of the longest common subsequence of words, by the ``rouge-score`` package with its stemmer.

    Raises:
        ConfigError: the package is not installed.
    """
    score: float = _rouge().score(wanted, answer)["rougeL"].fmeasure
    return score


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(
            "ROUGE-L needs the package rouge-score, which is not installed; pip install 'kvlink[eval]'.", param="data"
        ) from error
    return RougeScorer(["rougeL"], use_stemmer=True)


def check_metrics(task: Task) -> None:
    """Learn before the work, not after it, whether the answers of a task can be scored. Raises as ``rouge_l``."""
    if rouge_l in _METRICS[task].values():
        _rouge()


#: By task; the first is the one that plots show.
_METRICS: Mapping[Task, Mapping[str, Callable[[str, str], float]]] = {
    "qa": {"em": subspan, "f1": token_f1, "exact": exact},
    "summary": {"rouge_l": rouge_l, "f1": token_f1},
    "text": {},
}


def scores(task: Task, answer: str, wanted: Sequence[str]) -> dict[str, float]:
    """Every metric of the task; none without reference answers."""
    if not wanted:
        return {}
    return {name: max(metric(answer, each) for each in wanted) for name, metric in _METRICS[task].items()}
