"""A sample corpus with questions, from held-out worlds: what the demo, the page and newcomers play with."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from kvlink_core.training.worlds import TEST_SEEDS, Question, make_world


def write_sample(directory: Path, *, worlds: int, questions: int, first_seed: int = 0) -> tuple[int, int]:
    """Write ``corpus.jsonl`` (id, text) and ``questions.jsonl`` (question, answer, kind, documents).

    A world's passages have the ids ``w<seed>-<number>``; a question names all passages of its world, in order.

    Returns:
        (documents, questions) written.
    """
    corpus: list[dict[str, object]] = []
    asked: list[dict[str, object]] = []
    for seed in range(TEST_SEEDS.start + first_seed, TEST_SEEDS.start + first_seed + worlds):
        world = make_world(seed)
        ids = [f"w{seed}-{number}" for number in range(1, len(world.passages) + 1)]
        corpus += [{"id": i, "text": text} for i, text in zip(ids, world.passages, strict=True)]
        asked_here = _by_turns(world.questions, start=seed)[:questions]
        asked += [{"question": q.question, "answer": q.answer, "kind": q.kind, "documents": ids} for q in asked_here]
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus.jsonl", corpus), ("questions.jsonl", asked)):
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return len(corpus), len(asked)


def _by_turns(questions: Sequence[Question], *, start: int) -> list[Question]:
    """The questions, one of each kind in turn, so that a short list shows all kinds; ``start`` rotates the kinds."""
    kinds = sorted({q.kind for q in questions})
    kinds = kinds[start % len(kinds) :] + kinds[: start % len(kinds)]
    queues = [[q for q in questions if q.kind == kind] for kind in kinds]
    return [q for turn in itertools.zip_longest(*queues) for q in turn if q is not None]
