"""``kvlink bench dtype``: the same weights on both sides, errors that are errors, and a bound that can be missed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import Kvlink
from pydantic import ValidationError

from kvlink_core.benchmark import precision
from kvlink_core.benchmark.precision import Errors, PrecisionReport, PrecisionRow, errors_of, measure_precision
from kvlink_core.models.rope import RopeTables, Rotary

FIELDS = {"model_type": "llama", "dtype": "float16", "linker": "reposition", "attention": "sdpa"}


def test_errors_are_relative_to_the_truth() -> None:
    truth = torch.tensor([3.0, -4.0, 0.0, 0.0])
    largest, rms = errors_of(truth + torch.tensor([0.0, 0.0, 1.0, 0.0]), truth)
    assert largest == pytest.approx(1 / 4)
    assert rms == pytest.approx(1 / 5)
    assert errors_of(truth, truth) == (0.0, 0.0)


def test_ratios_are_of_medians() -> None:
    row = PrecisionRow.of(
        Errors(largest=[1.0, 2.0, 9.0], rms=[1.0, 1.0, 1.0]), Errors(largest=[3.0, 3.0, 0.0], rms=[1.5, 9.0, 0.0]),
        **FIELDS,
    )  # fmt: skip
    assert (row.ratio_largest, row.ratio_rms) == (1.5, 1.5)
    assert row.met
    with pytest.raises(ValidationError, match="its errors give"):
        PrecisionRow.model_validate(row.model_dump() | {"ratio_rms": 1.0})


@pytest.mark.parametrize(("largest", "rms"), [(1.6, 1.0), (1.0, 1.6)])
def test_either_ratio_can_miss_the_bound(largest: float, rms: float) -> None:
    row = PrecisionRow.of(Errors(largest=[1.0], rms=[1.0]), Errors(largest=[largest], rms=[rms]), **FIELDS)
    assert not row.met


def test_both_models_have_the_very_same_weights() -> None:
    small, exact = precision.rounded_pair("llama", torch.bfloat16, 0)
    assert (small.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    other = dict(exact.network.named_parameters())
    for name, parameter in small.network.named_parameters():
        assert torch.equal(parameter.float(), other[name]), name
    # As when a checkpoint is loaded: frequencies do not become bfloat16.
    assert {b.dtype for n, b in small.network.named_buffers() if "inv_freq" in n} == {torch.float32}


def test_the_linked_path_is_as_accurate_as_ordinary_prefill() -> None:
    names = ["llama", "gemma2", "gpt_neox", "deepseek_v3"]
    rows, failures = measure_precision(names, ["bfloat16", "float16"], seeds=6, prompts=3)
    assert not failures
    assert len(rows) == 16
    assert {row.model_type: row.attention for row in rows} == {
        "llama": "sdpa", "gemma2": "eager", "gpt_neox": "sdpa", "deepseek_v3": "sdpa",
    }  # fmt: skip
    for row in rows:
        assert row.met, (row.model_type, row.dtype, row.linker, row.ratio_largest, row.ratio_rms)
        assert len(row.linked.rms) == 18
        assert min(row.ordinary.rms) > 1e-5  # it is the smaller dtype that is judged, not float32


def test_a_path_that_is_wrong_misses_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotation that is off by one position is an error no larger than some of rounding's, in one logit or another."""
    right = Rotary.tables

    def shifted(self: Rotary, positions: torch.Tensor) -> RopeTables:
        return right(self, positions + 1)

    monkeypatch.setattr(Rotary, "tables", shifted)
    rows, _ = measure_precision(["llama"], ["float16"], seeds=2, prompts=2)
    assert rows
    assert not any(row.met for row in rows)


def test_the_command(kvlink: Kvlink, tmp_path: Path) -> None:
    done = kvlink(
        "bench", "dtype", "llama", "--dtype", "float16", "--seeds", "4", "--prompts", "2",
        "--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out.md").read_text()
    assert "**2 of 2 are within 1.5" in page
    assert "| `llama` | float16 |" in page
    assert "2 of 2 within 1.5 (reposition, link-tokens)" in done.stdout
    report = PrecisionReport.model_validate_json((tmp_path / "out.json").read_text())
    assert [(row.model_type, row.dtype, row.linker) for row in report.rows] == [
        ("llama", "float16", "reposition"), ("llama", "float16", "link-tokens"),
    ]  # fmt: skip
    assert report.command.startswith("kvlink bench dtype llama")
    assert json.loads((tmp_path / "out.json").read_text())["format"] == "kvlink-bench-dtype/1"


def test_what_misses_the_bound_or_does_not_run_is_said(kvlink: Kvlink, monkeypatch: pytest.MonkeyPatch) -> None:
    right = precision.linked_logits
    monkeypatch.setattr(precision, "linked_logits", lambda *args: right(*args) * 1.1)
    done = kvlink("bench", "dtype", "llama", "--dtype", "float16", "--seeds", "1", "--prompts", "1")
    assert done.returncode == 1
    assert "over" in done.stdout
    assert "0 of 2 within 1.5" in done.stdout

    def fail(*_: object) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(precision, "linked_logits", fail)
    done = kvlink("bench", "dtype", "llama", "--dtype", "float16", "--seeds", "1", "--prompts", "1")
    assert done.returncode == 0
    assert "note: llama, float16: RuntimeError: no kernel for this" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bloom"], "'bloom' does not link exactly"),
        (["llamma"], "'llamma' was never checked"),
        (["llama", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["llama", "--json", "/nowhere/x"], "cannot write to '/nowhere/x'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(kvlink: Kvlink, arguments: list[str], said: str) -> None:
    done = kvlink("bench", "dtype", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
