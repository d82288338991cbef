"""From rows to tables, comparisons and pictures, on rows made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvlink_core.errors import ConfigError
from kvlink_core.evaluation.compare import Side, compare, differing_settings, open_side
from kvlink_core.evaluation.plot import draw_quality
from kvlink_core.evaluation.records import Row, RunConfig
from kvlink_core.evaluation.summary import summarise
from kvlink_core.evaluation.tables import markdown

CELLS = (("m", "full", ""), ("m", "epic", "raw"), ("m", "epic", "int4"))


def config(**changes: Any) -> RunConfig:
    fields: dict[str, Any] = {
        "models": [{"source": "m", "label": "m", "digest": "1"}],
        "data": [{"name": "d", "task": "qa", "questions": 4, "digest": "2"}],
        "linkers": ["epic"],
        "codecs": ["raw", "int4"],
        "cells": CELLS,
        "template": "{question}",
        "system": {},
        "max_tokens": 9,
        "follow": "full",
        "device": "cpu",
        "dtype": None,
    }
    return RunConfig.model_validate(fields | changes)


def row(cell: tuple[str, str, str], number: int, em: float, **fields: Any) -> Row:
    model, linker, codec = cell
    known = {
        "dataset": "d",
        "id": f"q{number}",
        "kind": "x" if number < 2 else "y",
        "scores": {"em": em},
        "ttft_s": 1.0,
    }
    return Row.model_validate({"model": model, "linker": linker, "codec": codec, **known, **fields})


def rows() -> list[Row]:
    """Four questions; ``full`` is right on three in 2 s, EPIC on two in 1 s and on one in 0.5 s."""
    right = {"": (1, 1, 1, 0), "raw": (1, 1, 0, 0), "int4": (0, 1, 0, 0)}
    seconds = {"": 2.0, "raw": 1.0, "int4": 0.5}
    found = []
    for number in range(4):
        for cell in CELLS:
            codec = cell[2]
            extra = {
                "kl": 0.1 * number,
                "top1": 0.5,
                "document_tokens": 10,
                "stored_bytes": 80 if codec == "raw" else 20,
            }
            fields = extra if codec else {}
            found.append(row(cell, number, right[codec][number], **{"ttft_s": seconds[codec], **fields}))
    return found


def test_a_summary_by_hand() -> None:
    found = {(s.linker, s.codec): s for s in summarise(rows())}
    full, raw, int4 = (found[cell[1:]] for cell in CELLS)
    assert [s.measures["em"].mean for s in (full, raw, int4)] == [0.75, 0.5, 0.25]
    assert raw.measures["kl"].mean == pytest.approx(0.15)
    assert "kl" not in full.measures
    assert (full.of_full, raw.of_full, int4.of_full) == (1, 0.5, 0.25)
    assert (full.bytes_per_token, raw.bytes_per_token, int4.bytes_per_token) == (None, 8, 2)
    assert all(s.measures["em"].low <= s.measures["em"].mean <= s.measures["em"].high for s in found.values())


def test_kinds_are_groups_and_skipped_questions_are_counted() -> None:
    given = [*rows(), *(row(cell, 7, 0, skipped="context_length_exceeded", scores={}, ttft_s=None) for cell in CELLS)]
    found = [s for s in summarise(given, by="kind") if s.linker == "full"]
    assert [(s.group, s.questions, s.skipped, s.measures["em"].mean) for s in found] == [
        ("d: x", 2, 0, 1.0),
        ("d: y", 2, 1, 0.5),
    ]


def test_the_page_has_a_line_for_each_cell() -> None:
    lines = markdown(summarise(rows())).splitlines()
    assert lines[0] == "d: 4 questions"
    assert lines[2].startswith("| linker | codec | EM % | KL, nats | top-1 % | TTFT ms |")
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| full", "| epic", "| epic"]
    assert "| 75.0 [" in lines[4]


def saved(path: Path, asked: RunConfig, given: list[Row]) -> Path:
    path.mkdir()
    (path / "run.json").write_text(asked.model_dump_json())
    (path / "answers.jsonl").write_text("".join(r.model_dump_json(exclude_defaults=True) + "\n" for r in given))
    return path


def side(path: Path, name: str) -> Side:
    return open_side(f"{path}#{name}" if name else str(path))


def test_two_cells_of_a_run(tmp_path: Path) -> None:
    run = saved(tmp_path / "a", config(), rows())
    (found,) = compare(side(run, "full"), side(run, "epic/int4"), measures=["em"])
    assert (found.first, found.second, found.group) == ("full", "epic/int4", "d")
    assert (found.first_mean, found.second_mean) == (0.75, 0.25)
    assert found.found.difference.mean == -0.5
    assert (found.found.questions, found.found.unequal) == (4, 2)
    assert found.found.p == 0.5  # of four ways to exchange two losses, two are as far from even


def test_two_runs_cell_by_cell_on_common_questions(tmp_path: Path) -> None:
    first = saved(tmp_path / "a", config(), rows())
    other = [r.model_copy(update={"model": "n", "scores": {"em": 1.0}}) for r in rows() if r.id != "q0"]
    asked = config(
        models=[{"source": "n", "label": "n", "digest": "9"}], cells=[("n", *cell[1:]) for cell in CELLS],
        max_tokens=5, data=[{"name": "d", "task": "qa", "questions": 3, "digest": "7"}],
    )  # fmt: skip
    second = saved(tmp_path / "b", asked, other)
    found = compare(side(first, ""), side(second, ""), measures=["em", "kl"])
    assert [(c.first, c.second, c.measure) for c in found] == [
        ("m/full", "n/full", "em"),
        ("m/epic/raw", "n/epic/raw", "em"),
        ("m/epic/raw", "n/epic/raw", "kl"),
        ("m/epic/int4", "n/epic/int4", "em"),
        ("m/epic/int4", "n/epic/int4", "kl"),
    ]
    assert {c.found.questions for c in found} == {3}
    assert found[1].found.difference.mean == pytest.approx(2 / 3)
    said = differing_settings(config(), asked)
    assert said[0] == "max_tokens differs: 9 and 5."
    assert "data set d is not the same (4 and 3 questions)" in said[1]


def test_kinds_can_be_compared(tmp_path: Path) -> None:
    run = saved(tmp_path / "a", config(), rows())
    found = compare(side(run, "full"), side(run, "epic/raw"), by="kind", measures=["em"])
    assert [(c.group, c.found.difference.mean) for c in found] == [("d: x", 0.0), ("d: y", -0.5)]


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    run = saved(tmp_path / "a", config(), rows())
    with pytest.raises(ConfigError, match="no such cell; there are m/full, m/epic/raw"):
        side(run, "concat")
    with pytest.raises(ConfigError, match="several cells are called so: m/epic/raw, m/epic/int4"):
        side(run, "epic")
    with pytest.raises(ConfigError, match="name a cell of both"):
        compare(side(run, "full"), side(run, ""))
    with pytest.raises(ConfigError, match="no measure 'bleu'"):
        compare(side(run, "full"), side(run, "full"), measures=["bleu"])
    with pytest.raises(ConfigError, match="no question in common"):
        compare(side(run, "full"), side(run, "full"), measures=["rouge_l"])
    with pytest.raises(ConfigError, match=r"not the folder of a run.*run\.json"):
        open_side(str(tmp_path))
    (run / "run.json").write_text(json.dumps({"format": "kvlink-eval/2"}))
    with pytest.raises(ConfigError, match="not written by this version"):
        open_side(str(run))


def test_the_picture_names_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    for name in ("a.svg", "b.svg"):
        draw_quality(summarise(rows()), ["em", "kl"], tmp_path / name, footer="the footer")
    text = (tmp_path / "a.svg").read_text()
    for word in ("full", "epic", "raw", "int4", "the footer", "d: EM %", "KL, nats (less is better)", "both faster"):
        assert word in text, word
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    draw_quality(summarise(rows(), by="kind"), ["top1"], tmp_path / "c.png", footer="")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot write"):
        draw_quality(summarise(rows()), ["em"], tmp_path / "none" / "d.svg", footer="")
