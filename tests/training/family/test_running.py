"""How ``python -m kvlink_core.training.family`` runs many fine-tunes, and the chunks that they share."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from kvlink_core.models.describe import EMBEDDED_DIRECTORY
from kvlink_core.training.family import feed
from kvlink_core.training.family.__main__ import in_turn


def test_all_run_no_more_at_once_than_asked_and_failures_are_named(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys, time; "
        "gpu = os.environ.get('CUDA_VISIBLE_DEVICES', '-'); "
        "began = time.monotonic(); time.sleep(0.3); "
        "pathlib.Path(sys.argv[1]).write_text(f'{gpu} {began} {time.monotonic()}'); "
        "sys.exit(int(sys.argv[2]))"
    )
    names = [f"run-{i}" for i in range(6)]
    commands = [(n, [sys.executable, "-c", script, str(tmp_path / n), "1" if n == "run-3" else "0"]) for n in names]

    assert in_turn(commands, gpus=2, at_once=1) == ["run-3"]

    times: dict[str, list[tuple[float, float]]] = {}
    for name in names:
        gpu, began, ended = (tmp_path / name).read_text().split()
        times.setdefault(gpu, []).append((float(began), float(ended)))
    assert sorted(times) == ["0", "1"]
    for spans in times.values():
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_a_chunk_that_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "CHUNK", 2)
    tokenizer = str(EMBEDDED_DIRECTORY / "tokenizer.json")
    write = feed._write_chunk
    write(tokenizer, str(tmp_path), 1, "k1")
    path = tmp_path / "k1-1.npz"
    with np.load(path) as file:
        assert file["tokens"].shape == (5, 2, 1024)
    path.write_bytes(b"kept")
    write(tokenizer, str(tmp_path), 1, "k1")
    assert path.read_bytes() == b"kept"
    assert [p.name for p in tmp_path.iterdir()] == ["k1-1.npz"]
