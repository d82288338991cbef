"""A small data set and runs over it with the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvlink_core.evaluation.grid import contenders
from kvlink_core.evaluation.reading import open_dataset
from kvlink_core.evaluation.records import RunDirectory
from kvlink_core.evaluation.run import make_config, run

Evaluate = Callable[..., Path]

LINKERS = ("reposition", "link-tokens", "epic:k=2")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Five questions over documents of which some come again and again."""
    texts = ["the cat sat", "a dog ran far away", "it rains", "no news today", "blue skies over here"]
    rows = [
        {
            "id": f"q{i}",
            "question": f"what {i}?",
            "answers": ["cat"],
            "documents": [{"text": texts[j % 5]} for j in range(i, i + 2 + i % 3)],
            "kind": "odd" if i % 2 else "even",
        }
        for i in range(5)
    ]
    path = tmp_path / "small.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def evaluate(tiny_model_dir: Path, questions: Path) -> Evaluate:
    """Runs a grid on the tiny model over the small data; keyword arguments change the configuration."""

    def go(
        out: Path,
        *,
        linkers: Sequence[str] = LINKERS,
        codecs: Sequence[str] = ("raw", "int8"),
        models: Sequence[Path] = (tiny_model_dir,),
        data: Sequence[str] | None = None,
        after: Callable[[int], None] = lambda done: None,
        **options: Any,
    ) -> Path:
        grid = contenders([str(model) for model in models], linkers, codecs)
        datasets = [open_dataset(source) for source in data or [str(questions)]]
        asked = {"max_tokens": 6, "system": ""} | options
        config = make_config(grid, datasets, linkers=linkers, codecs=codecs, **asked)
        with RunDirectory(out, config) as directory:
            run(
                directory, grid, datasets, memory_bytes=2**20,
                progress=lambda label, done, total: after(done),
            )  # fmt: skip
        return out

    return go
