"""Some seconds of ``fuzz_store.py``, with fixed seeds; it runs by itself for as long as one likes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz_files import Shard, real_files
from fuzz_store import Fuzzer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Shard], bytes, Path]]:
    logging.disable(logging.CRITICAL)  # each refusal is logged, thousands here
    yield real_files(tmp_path_factory.mktemp("fuzz") / "store")
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_and_forged_files(files: tuple[list[Shard], bytes, Path], seed: int) -> None:
    fuzzer = Fuzzer(seed, files)
    for _ in range(500):
        fuzzer.run()
    outcomes = " ".join(fuzzer.counts)
    for reached in ("DocumentCache", "PayloadCorruptError", "PayloadForeignError", "table: read"):
        assert reached in outcomes
