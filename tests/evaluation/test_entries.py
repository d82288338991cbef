"""JSON files entry by entry: the same as in one piece, wherever the window of the file ends; damage named by line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvlink_core.errors import CorpusError
from kvlink_core.evaluation.reading import entries as module
from kvlink_core.evaluation.reading.entries import entries


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"   \n", "is empty"),
        (b"{\"question\": ", "line 1: not JSON"),
        (b"[\n{\"a\": 1},\n{\"a\" 2}]", "line 3: not JSON"),
        (b"[\n{\"question\": \"q\", \"documents\": [{\"text\": \"t\"}]}\n", "line 3: the file is cut off"),
        (b"[{} {}]", "neither ',' nor"),
        (b"{\"question\": \"q\xff\"}", "not text in UTF-8"),
        (gzip.compress(b"{}" * 999)[:20], "damaged or cut off"),
        (b"\x1f\x8bnot gzip", "damaged or cut off"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{\"question\": " + b"9" * 5000 + b"}", "too many digits"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        list(entries(path))


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
_OBJECTS = st.lists(st.dictionaries(st.text(max_size=4), _JSON, max_size=4), min_size=1, max_size=5)


@given(
    _OBJECTS, st.integers(1, 24), st.sampled_from(["lines", "array", "pretty", "nested", "nested last"]), st.booleans()
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_whatever_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], chunk: int, form: str, ascii_only: bool
) -> None:
    """Read through windows of a few characters, every file gives what ``json`` gives of it in one piece."""
    monkeypatch.setattr(module, "_CHUNK", chunk)
    rows = [{f"_{key}": value for key, value in row.items()} for row in rows]  # none is called data by chance
    whole = {
        "array": rows,
        "pretty": rows,
        "nested": {"data": rows, "version": 1.1},
        "nested last": {"Version": [1, {"data": 2}], "n": 12, "Data": rows},
    }
    if form == "lines":
        text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    else:
        text = json.dumps(whole[form], ensure_ascii=ascii_only, indent=2 if form == "pretty" else None)
    path = tmp_path / "data"
    path.write_text(text.encode("utf-8", "surrogatepass").decode("utf-8", "replace"), "utf-8", newline="")
    assert [entry.value for entry in entries(path)] == json.loads(json.dumps(rows))
