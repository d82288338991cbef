"""Data for recipes: a few lines of each kind, and a recipe over them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvlink_core.training.recipes.config import Recipe

QA = [
    {"question": "Who?", "answer": "Anna.", "documents": ["Anna sings.", {"title": "B", "text": "Bert is deaf."}]},
    {"question": "Where to?", "answer": "To Oslo", "documents": ["She left.", "It is Oslo.", "No."]},
    {"messages": [{"role": "user", "content": "Why?"}], "answer": "So.", "documents": ["It rains."]},
]
INSTRUCT = [
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                  {"role": "assistant", "content": "Hello"}]},
    {"messages": [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you"}]},
]  # fmt: skip
TEXT = [{"text": "The river runs through the town and past the mill, where the road ends. " * 2}]
SUMMARY = [{"text": "A long report about the mill by the river.", "summary": "The mill."}]

Make = Callable[..., Recipe]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with ``qa.jsonl``, ``instruct.jsonl``, ``text.jsonl``, ``summary.jsonl`` and ``questions.jsonl``."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines: dict[str, list[dict[str, Any]]] = {
        "qa": QA,
        "instruct": INSTRUCT,
        "text": TEXT,
        "summary": SUMMARY,
        "questions": [{k: v for k, v in line.items() if k != "answer"} for line in QA],
    }
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture
def make(data: Path, tiny_model_dir: Path) -> Make:
    """A recipe over the tiny model, small enough for a test; keys in place of its own."""

    def recipe(**keys: Any) -> Recipe:
        mixture = [
            {"path": data / "qa.jsonl", "kind": "qa", "weight": 4},
            {"path": data / "text.jsonl", "kind": "text", "segment_tokens": 24, "target_tokens": 16},
        ]
        small = {
            "train": "links", "model": str(tiny_model_dir), "mixture": mixture, "links": {"k": 3}, "max_tokens": 224,
            "rows": 2, "steps": 8, "warmup_steps": 1, "learning_rate": 0.05, "dtype": "float32",
            "gradient_checkpointing": False, "save_steps": 4, "log_steps": 1,
        }  # fmt: skip
        return Recipe.model_validate({**small, **keys})

    return recipe
