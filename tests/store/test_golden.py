"""Stores of earlier versions stay readable: a committed one, written from FORMAT.md alone, and one written now."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from golden_store import CASES, DOCUMENTS, MICROS, make

from kvlink_core.compress import DTYPES
from kvlink_core.fingerprint import Fingerprint
from kvlink_core.store import DocumentStore
from kvlink_core.store.lifecycle import Scope, StoreKeeper, collect, compact, list_documents, rebuild, verify
from kvlink_core.store.rows import to_micros
from kvlink_core.types import DocumentCache

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(params=["version 1", "written now"])
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "version 1":
        shutil.copytree(GOLDEN, tmp_path / "golden")
    else:
        make(tmp_path / "golden")
    return tmp_path / "golden"


def check(golden: Path, case: str) -> None:
    """The store holds, for the codec of ``case``, exactly what is expected of it, bit for bit."""
    codec, dtype, params = CASES[case]
    expected = json.loads((golden / "expected.json").read_text())[case]
    spec = codec + (":" + ",".join(f"{k}={v}" for k, v in sorted(params.items())) if params else "")
    held = [json.loads(path.read_text()) for path in (golden / "store/fingerprints").iterdir()]
    (fields,) = [f for f in held if f["dtype"] == dtype]
    with DocumentStore.open(
        str(golden / "store"), fingerprint=Fingerprint.from_mapping(fields), namespace="golden", codec=spec
    ) as store:
        rows = store.lookup([*DOCUMENTS, "gone"])
        assert list(rows) == list(DOCUMENTS)
        assert {to_micros(row.created_at) for row in rows.values()} == {MICROS}
        assert store.token_ids(list(rows.values())) == [list(c) for c in _tokens(expected)]
        for (name, tokens), found in zip(DOCUMENTS.items(), store.load(list(rows.values())), strict=True):
            assert isinstance(found, DocumentCache)
            assert found.keys.dtype == found.values.dtype == DTYPES[dtype]
            assert (found.keys.shape, found.values.shape) == ((2, 3, tokens, 5), (2, 3, tokens, 3))
            for field in ("keys", "values"):
                data = getattr(found, field).contiguous().view(torch.uint8).numpy().tobytes()
                assert data.hex() == expected[name][field]


def _tokens(expected: dict[str, dict[str, str]]) -> list[list[int]]:
    found = [bytes.fromhex(expected[name]["token_ids"]) for name in DOCUMENTS]
    return [[int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)] for data in found]


@pytest.mark.parametrize("case", CASES)
def test_every_codec_is_read(golden: Path, case: str) -> None:
    check(golden, case)


def test_it_is_looked_after_like_any_store(golden: Path) -> None:
    with StoreKeeper.open(str(golden / "store")) as keeper:
        assert list_documents(keeper, Scope("golden")).total == len(DOCUMENTS) * len(CASES)
        verified = verify(keeper)
        assert (verified.problems, verified.payloads) == ([], len(DOCUMENTS) * len(CASES))
        rebuilt = rebuild(keeper, from_shards=True)
        assert (rebuilt.documents, rebuilt.lost, rebuilt.failures) == (len(DOCUMENTS) * len(CASES), [], {})
        # Two shards cannot become one here, since no two have a codec and a dtype in common; so they are written anew.
        assert replace(compact(keeper, dry_run=False), nbytes=0).failures == []
        collect(keeper, timedelta(0), dry_run=False)
        assert verify(keeper).problems == []
    for case in CASES:
        check(golden, case)
