"""docs/pruning.md: its table has every scorer, and the paper that its file names."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from kvlink_core.compress import get_codec, scorer_names
from kvlink_core.compress.scorers import get_scorer

PAGE = (Path(__file__).parents[2] / "docs" / "pruning.md").read_text("utf-8")


def test_the_table_has_every_scorer_and_its_paper() -> None:
    rows = dict(re.findall(r"^\| `([a-z-]+)`(?: \(default\))? \| (.*arxiv.*|any, .*) \|$", PAGE, re.MULTILINE))
    assert sorted(rows) == list(scorer_names())
    for name, row in rows.items():
        module = inspect.getmodule(type(get_scorer(name)))
        assert module is not None
        cited = set(re.findall(r"arXiv (\d{4}\.\d{5})", module.__doc__ or ""))
        assert set(re.findall(r"arxiv.org/abs/(\d{4}\.\d{5})", row)) == cited
    (default,) = re.findall(r"^\| `([a-z-]+)` \(default\)", PAGE, re.MULTILINE)
    assert get_codec("raw:keep=0.5").params["scorer"] == default


def test_the_codecs_that_it_shows_can_be_made() -> None:
    shown = set(re.findall(r"\b(?:raw|int4|int8|fp8|lossless):[a-z0-9=,.-]+", PAGE))
    assert len(shown) >= 2
    for spec in shown:
        get_codec(spec)
