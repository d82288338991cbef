"""docs/linkers.md: its example works as it stands, and its table has every linker with its parameters."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from oracles import blended, document_slots
from strategies import difference, linked_by, logits_of, prompt_for

from kvlink_core.errors import ConfigError
from kvlink_core.linking import get_linker, linker_names, unregister_linker
from kvlink_core.models import LoadedModel

PAGE = (Path(__file__).parents[2] / "docs" / "linkers.md").read_text("utf-8")
CODE, TEST = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def tails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example, imported from a file of its own, which registers it."""
    (tmp_path / "tails_example.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("tails_example")
    yield
    unregister_linker("tails")
    del sys.modules["tails_example"]


def test_the_example_passes_its_own_test(tails: None, tiny_model: LoadedModel) -> None:
    names: dict[str, object] = {}
    exec(compile(TEST, "docs/linkers.md", "exec"), names)
    test = names["test_tails_follows_its_oracle"]
    assert callable(test)
    test(tiny_model)


def test_the_examples_identities_and_errors(tails: None, tiny_model: LoadedModel) -> None:
    prompt = prompt_for(tiny_model, "tails")
    for spec, same in (("tails:k=0", "reposition"), ("tails:k=99", "full")):
        ours, theirs = (logits_of(linked_by(tiny_model, s, prompt)) for s in (spec, same))
        assert difference(ours, theirs) <= 1e-5
    documents = document_slots(prompt)
    beginnings = blended(tiny_model.network, prompt, [], stale=lambda layer: documents - document_slots(prompt, 4))
    assert difference(logits_of(linked_by(tiny_model, "tails", prompt)), beginnings) > 1e-3
    with pytest.raises(ConfigError, match="from 0 up, not -1"):
        get_linker("tails:k=-1")


def test_the_table_has_every_linker_and_its_parameters() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \|([^|]*)\|([^|]*)\|", PAGE, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(linker_names())
    for name, _, parameters in rows:
        defaults = {p.name: str(p.default) for p in inspect.signature(type(get_linker(name))).parameters.values()}
        assert dict(re.findall(r"`(\w+)`[^`]*?\(default ([\d.]+)", parameters)) == defaults


def test_every_linker_names_its_paper_in_its_file() -> None:
    for name in linker_names():
        module = inspect.getmodule(type(get_linker(name)))
        assert module is not None
        cited = set(re.findall(r"arXiv (\d{4}\.\d{5})", module.__doc__ or ""))
        (row,) = re.findall(rf"^\| `{name}` \|.*$", PAGE, re.MULTILINE)
        shown = set(re.findall(r"arxiv.org/abs/(\d{4}\.\d{5})", row))
        assert shown <= cited
        assert bool(shown) is (name != "full")
