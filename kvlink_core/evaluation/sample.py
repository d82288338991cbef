"""A sample corpus with questions, from held-out worlds: what the demo, the page and newcomers play with."""

from __future__ import annotations

import json
from pathlib import Path

from kvlink_core.training.worlds import TEST_SEEDS, make_world


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
        # One of each kind first, so that a short list still shows all kinds.
        ordered = sorted(world.questions, key=lambda q: [p.kind for p in world.questions].index(q.kind))
        by_kind = {q.kind: q for q in reversed(ordered)}
        chosen = [*by_kind.values(), *(q for q in ordered if q not in by_kind.values())][:questions]
        asked += [{"question": q.question, "answer": q.answer, "kind": q.kind, "documents": ids} for q in chosen]
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus.jsonl", corpus), ("questions.jsonl", asked)):
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return len(corpus), len(asked)
