"""``kvlink bench serve``, end to end on a tiny shape; percentiles and targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Kvlink

from kvlink_core.benchmark.serving import Measured
from kvlink_core.benchmark.serving_results import ServingReport, percentile, targets

TINY = (
    "bench",
    "serve",
    "--model",
    "random:llama-tiny",
    "--documents",
    "3",
    "--document-tokens",
    "20",
    "--clients",
    "2",
)


def test_everything_is_measured_and_written(kvlink: Kvlink, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    done = kvlink(*TINY, "--requests", "3", "--answer-tokens", "4", "--cold", "2", "--quick", "--json", str(path))
    assert done.returncode == 0, done.stderr
    report = ServingReport.model_validate_json(path.read_text())
    assert report.quick
    assert {len(runs) for runs in report.decode_s.values()} == {2}
    assert len(report.decode_s) == 6
    assert {name: len(runs) for name, runs in report.first_token_s.items()} == {"link-tokens": 16, "full": 4}
    one, many = report.document_bytes.values()
    # 60 tokens of 2 layers, 2 heads of 16 numbers, keys and values in float32
    assert one == many == 60 * 2 * 2 * 16 * 2 * 4
    assert all(gap > 0 for gaps in report.gaps_s.values() for gap in gaps)
    assert json.loads(path.read_text())["format"] == "kvlink-bench-serve/1"
    assert "tokens/s, batch / one at a time" in done.stdout
    assert "not to be quoted" in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--repeats", "3"), "need --quick"),
        (("--documents", "9999", "--document-tokens", "500", "--quick"), "exceed the model's 131,072"),
    ],
)
def test_what_cannot_be_measured_is_refused(kvlink: Kvlink, options: tuple[str, ...], said: str) -> None:
    done = kvlink(*TINY, *options)
    assert done.returncode == 2
    assert said in done.stderr


def test_targets_are_ratios_of_medians() -> None:
    names = [
        f"{what}{own}" for own in ("", ", own documents") for what in ("engine", "bare in place", "bare DynamicCache")
    ]
    decode = dict(zip(names, ([2.0, 1.0, 9.0], [4.0, 4.0], [5.0], [3.0], [2.0], [1.0]), strict=True))
    measured = Measured(
        decode=decode,
        throughput={"batch": [80.0], "one at a time": [10.0]},
        first_tokens={"link-tokens": [1.0, 2.0, 3.0], "full": [40.0]},
        gaps={"with cold documents": [1.0] * 98 + [5.0, 9.0], "without": [1.0]},
        document_bytes={"one": 10, "many": 10},
    )
    found = [(round(t.figure, 3), t.met) for t in targets(measured)]
    assert found == [(0.5, True), (0.4, True), (1.5, False), (1.0, True), (8.0, True), (0.05, True), (5.0, False)]


def test_percentiles() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([float(i) for i in range(1, 101)], 99) == 99.0
    assert percentile([1.0], 99) == 1.0
