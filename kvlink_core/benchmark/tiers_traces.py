"""Sequences of documents that are asked for: made up, and from real sets of questions with their documents."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from kvlink_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Trace:
    """Documents by number, in the order in which they are asked for.

    Attributes:
        name: for people.
        keys: a document for each request for one.
        sizes: tokens of each document, by number.
        total: tokens of the documents whose hits count; sizes of caches are parts of it.
        once: documents from this number on are asked for once, in a scan, and do not count.
    """

    name: str
    keys: Sequence[int]
    sizes: Sequence[int]
    total: int
    once: int

    @property
    def counted(self) -> int:
        """Requests that count."""
        return sum(key < self.once for key in self.keys)


def zipf_trace(
    *, documents: int = 10_000, requests: int = 100_000, exponent: float = 1.0, scans: int = 10, scanned: int = 2_000,
    seed: int = 0,
) -> Trace:  # fmt: skip
    """Requests by Zipf's law over documents of 20 to 4,000 tokens (log-normal, median 250), with scans in between.

    Args:
        documents: that are asked for again.
        requests: for these.
        exponent: the k-th document is asked for in proportion to ``k ** -exponent``.
        scans: evenly spread.
        scanned: documents of each, none of which is asked for again.
        seed: of everything.
    """
    rng = random.Random(seed)
    weights = list(accumulate((k + 1) ** -exponent for k in range(documents)))
    drawn = rng.choices(range(documents), cum_weights=weights, k=requests)
    sizes = [min(4000, max(20, round(rng.lognormvariate(5.52, 0.8)))) for _ in range(documents + scans * scanned)]
    keys: list[int] = []
    new = documents
    for part in range(scans or 1):
        keys += drawn[part * requests // (scans or 1) : (part + 1) * requests // (scans or 1)]
        if scans:
            keys += range(new, new + scanned)
            new += scanned
    what = f"Zipf({exponent:g}), {requests:,} requests for {documents:,} documents"
    what += f", {scans} scans of {scanned:,}" if scans else ""
    return Trace(what, keys, sizes, sum(sizes[:documents]), documents)


Text = tuple[str | None, str]


def read_questions(path: Path) -> list[list[Text]]:
    """The documents, as title and text, of each question of a file: JSON Lines with ``documents``, or SQuAD's JSON.

    Raises:
        ConfigError: it cannot be read as either.
    """
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            content = file.read()
        if ".jsonl" in path.suffixes:
            rows: list[Any] = [json.loads(line) for line in content.splitlines() if line.strip()]
            return [[(d.get("title"), str(d["text"])) for d in row["documents"]] for row in rows]
        return [
            [(str(article["title"]), str(paragraph["context"]))]
            for article in json.loads(content)["data"]
            for paragraph in article["paragraphs"]
            for _ in paragraph["qas"]
        ]
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{str(path)!r} is neither JSON Lines with 'documents' nor like SQuAD's: {type(error).__name__}: {error}.",
            param="qa",
        ) from error


def question_traces(path: Path, count: Callable[[Text], int], *, asked: int = 20_000, seed: int = 0) -> Iterator[Trace]:
    """Two orders of a file's questions: as they stand, and as a service may see them.

    The latter: ``asked`` questions drawn by Zipf's law (1.0) over the shuffled file. Documents are distinct passages.

    Args:
        path: see ``read_questions``.
        count: tokens of a passage.
        asked: questions of the second one.
        seed: of the second one.
    """
    numbers: dict[Text, int] = {}
    questions = [[numbers.setdefault(text, len(numbers)) for text in texts] for texts in read_questions(path)]
    sizes = [count(text) for text in numbers]
    rng = random.Random(seed)
    shuffled = rng.sample(questions, len(questions))
    weights = list(accumulate(1 / (k + 1) for k in range(len(shuffled))))
    drawn = rng.choices(shuffled, cum_weights=weights, k=asked) if shuffled else []
    name = path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")
    for order, sequence in (("file order", questions), (f"{asked:,} drawn", drawn)):
        keys = [key for question in sequence for key in dict.fromkeys(question)]
        yield Trace(f"{name}, {order}", keys, sizes, sum(sizes), len(sizes))
