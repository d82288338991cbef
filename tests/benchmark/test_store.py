"""``kvlink bench store``, on little: what it measures is what it says, and is there."""

from __future__ import annotations

import json
from pathlib import Path

from command import Kvlink

from kvlink_core.benchmark.reading import AGAINST, LOAD, READ, Reading, ReadingCase, measure_reading

CASE = ReadingCase("tiny", 4, 2, layers=2, kv_heads=2, head_dim=4, dtype="bfloat16", tokens=5)


def test_every_way_is_run_as_often(tmp_path: Path) -> None:
    (found,) = measure_reading(tmp_path, [CASE], 3, lambda *_: None)
    assert {way: len(times) for way, times in found.seconds.items()} == dict.fromkeys([READ, *AGAINST], 3)
    assert found.seconds.keys() == found.processor.keys()
    assert found.nbytes == 4 * CASE.nbytes == 4 * 2 * 2 * 2 * 5 * 4 * 2


def test_ratios_are_of_neighbouring_runs() -> None:
    seconds = {way: [2.0, 4.0, 8.0] for way in AGAINST} | {READ: [1.0, 8.0, 8.0]}
    found = Reading(CASE, 1, seconds, {way: [1.0] * 3 for way in seconds})
    assert found.medians[READ] == 8.0
    assert found.ratios[LOAD] == 1.0  # of 0.5, 2 and 1: more is faster
    assert set(found.processor_ratios.values()) == {1.0}


def test_the_catalog(kvlink: Kvlink, tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    done = kvlink("bench", "store", "--no-reading", "--rows", "1000", "--json", str(output))
    assert done.returncode == 0, done.stderr
    assert "20 documents by id" in done.stdout
    figures = json.loads(output.read_text())
    assert (figures["format"], figures["catalog"]["rows"], figures["reading"]) == ("kvlink-bench-store/1", 1000, [])
    assert kvlink("bench", "store", "--json", "/nowhere/x").returncode == 2
