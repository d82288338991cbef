"""The demonstration's last step, on a shape that costs nothing; `make demo` has the rest."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest


def test_the_ratio_is_shown_as_bench_ttft_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("demo", Path(__file__).parents[2] / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", demo)  # dataclasses look their module up
    spec.loader.exec_module(demo)
    monkeypatch.setattr(demo, "RUN", tmp_path)
    demo.show_large_shape("random:llama-tiny")
    shown = capfd.readouterr().out
    for what in ("caches in memory", "caches read from disk, checked"):
        assert re.search(rf"full [0-9.]+ s, linked [0-9.]+ s \({what}\): [0-9.]+ %", shown), shown
