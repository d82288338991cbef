"""The load generator, on a service in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from local_service import local_app, served
from running_service import TEXTS, add_document
from typer import Typer
from typer.testing import CliRunner

from kvlink_core.models import LoadedModel
from kvlink_core.store import DocumentStore
from serve.load import Seen, main, quantiles, table

app = Typer()
app.command()(main)


def test_a_run(tiny_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    where = tmp_path / "store"
    store = DocumentStore.open(str(where), fingerprint=tiny_model.fingerprint, create=True)
    for name, text in TEXTS.items():
        add_document(tiny_model, store, name, text)
    store.close()
    with served(local_app(tiny_model, where)) as url:
        for mode in (["--one-at-a-time", "4"], ["--rate", "20", "--seconds", "0.5"]):
            done = CliRunner().invoke(app, ["--url", url, "--per-request", "2", "--max-tokens", "4", *mode])
            assert done.exit_code == 0, done.output
            assert "time to first token" in done.output
            assert "HTTP's share" in done.output
            assert "200:" in done.output
    assert CliRunner().invoke(app, ["--url", url]).exit_code == 2


def test_quantiles_are_by_nearest_rank() -> None:
    assert quantiles([float(n) for n in range(100, 0, -1)]) == (51.0, 91.0, 100.0, 100.0)
    assert quantiles([3.0]) == (3.0, 3.0, 3.0, 3.0)


def test_what_failed_is_counted_and_has_no_times() -> None:
    seen = [Seen("200", 0.1, 0.2, [], 0.05, 1.0), Seen("503"), Seen("cut off", 9.0, 9.0)]
    result = table(seen, 1.0)
    assert "1 answered" in str(result.title)
    assert str(result.caption) == "200: 1, 503: 1, cut off: 1; token-level hit rate 1.000"
    assert "9000.0" not in [cell for column in result.columns for cell in column.cells]
