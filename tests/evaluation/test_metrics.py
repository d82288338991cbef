"""Scores by hand, and against independent ways to compute them."""

from __future__ import annotations

import string
import sys
from collections import Counter
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlink_core.errors import ConfigError
from kvlink_core.evaluation import metrics
from kvlink_core.evaluation.metrics import exact, normalised, rouge_l, scores, subspan, token_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat, sat!", "cat sat"),
        ("a an the", ""),
        ("another theatre", "another theatre"),
        ("U.S. Open", "us open"),
        ("well-known", "wellknown"),
        (" A\tb\n\nthe c ", "b c"),
        ("Röntgen\u2019s", "röntgen\u2019s"),  # only ASCII punctuation goes, as in the original
        ("the-the", "thethe"),
    ],
)
def test_normalised_by_hand(text: str, expected: str) -> None:
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("answer", "wanted", "em", "f1", "whole"),
    [
        ("It was Wilhelm Conrad Röntgen.", "Wilhelm Conrad Röntgen", 1, 3 / 4, 0),  # precision 3/5, recall 1
        ("Röntgen", "Wilhelm Conrad Röntgen", 0, 1 / 2, 0),
        ("the United States", "United States", 1, 1, 1),
        ("party", "art", 1, 0, 0),
        ("a b b", "b b c", 0, 4 / 5, 0),  # without the article: b b, and b b c
        ("", "x", 0, 0, 0),
        ("", "The", 1, 1, 1),
        ("anything", "The", 0, 0, 0),  # nothing is left of it, which the usual script finds everywhere
        ("1,000 m", "1000 m", 1, 1, 1),
    ],
)
def test_scores_by_hand(answer: str, wanted: str, em: float, f1: float, whole: float) -> None:
    assert scores("qa", answer, [wanted]) == {"em": em, "f1": pytest.approx(f1, abs=1e-12), "exact": whole}


def test_the_best_of_all_references_counts_for_each_metric() -> None:
    assert scores("qa", "Paris, France", ["Lyon", "Paris", "France Paris"]) == {"em": 1, "f1": 1, "exact": 0}
    assert scores("qa", "x", []) == {}
    assert scores("text", "x", ["x"]) == {}


_WORDS = st.lists(st.sampled_from(["the", "a", "cat", "Cat", "sat", "on", "mat!", "--", "x.y"]), max_size=7)


@given(_WORDS, _WORDS)
def test_f1_against_matching_words_one_by_one(one: list[str], other: list[str]) -> None:
    """The definition: pair off equal words, then the harmonic mean of two shares."""

    def tokens(text: str) -> list[str]:
        kept = "".join(c for c in text.lower() if c not in string.punctuation).split()
        return [word for word in kept if word not in ("a", "an", "the")]

    found, right = tokens(" ".join(one)), tokens(" ".join(other))
    left, matched = list(right), 0
    for word in found:
        if word in left:
            left.remove(word)
            matched += 1
    if found and right:
        precision, recall = matched / len(found), matched / len(right)
        expected = 2 * precision * recall / (precision + recall) if matched else 0.0
    else:
        expected = float(not found and not right)
    answer, wanted = " ".join(one), " ".join(other)
    assert token_f1(answer, wanted) == pytest.approx(expected)
    assert exact(answer, wanted) == float(found == right)
    joined = (" ".join(found), " ".join(right))
    assert subspan(answer, wanted) == float(joined[1] in joined[0] if joined[1] else not joined[0])


_PLAIN = st.lists(st.sampled_from(["river", "lake", "sky", "blue", "7", "red"]), max_size=8)


@given(_PLAIN, _PLAIN)
@settings(max_examples=60, deadline=None)
def test_rouge_l_against_the_longest_common_subsequence(one: list[str], other: list[str]) -> None:
    @lru_cache
    def longest(i: int, j: int) -> int:
        if i == len(one) or j == len(other):
            return 0
        same = 1 + longest(i + 1, j + 1) if one[i] == other[j] else 0
        return max(same, longest(i + 1, j), longest(i, j + 1))

    common = longest(0, 0)
    expected = 2 * common / (len(one) + len(other)) if common else 0.0
    assert rouge_l(" ".join(one), " ".join(other)) == pytest.approx(expected)


def test_rouge_l_by_hand() -> None:
    """Stems count: police kill(ed) the gunm(a)n. Three of four words in order, of four and five."""
    assert rouge_l("police kill the gunman", "police killed the gunman") == 1
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    assert scores("summary", "the gunman kill police", ["x", "police killed the gunman"])["rouge_l"] == pytest.approx(
        0.5
    )


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics._rouge.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvlink\[eval\]'"):
        metrics.check_metrics("summary")
    metrics.check_metrics("qa")


def test_counter_is_what_squad_uses() -> None:
    """SQuAD's script on its own terms, for one case with repeated words on both sides."""
    found, right = ["b", "b", "c", "c"], ["b", "c", "c", "c"]
    same = sum((Counter(found) & Counter(right)).values())
    precision, recall = same / 4, same / 4
    assert token_f1("b b c c", "b c c c") == pytest.approx(2 * precision * recall / (precision + recall))
