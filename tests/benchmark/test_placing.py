"""Ways to place documents agree with each other, and the command shows them."""

from __future__ import annotations

import pytest
import torch
from command import Kvlink

from kvlink_core.benchmark.placing import PlacingCase, measure_placing

CASE = PlacingCase(layers=3, kv_heads=2, head_dim=16, documents=2, tokens=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ways_agree(dtype: torch.dtype) -> None:
    rows = measure_placing(CASE, "cpu", dtype, repeats=2)
    assert [row.name for row in rows] == ["plain", "each alone", "all at once"]
    assert max(row.difference for row in rows) <= 1e-6
    assert all(len(row.seconds) == 2 for row in rows)


def test_the_command(kvlink: Kvlink) -> None:
    done = kvlink("bench", "place", "--layers", "2", "--documents", "2", "--repeats", "1")
    assert done.returncode == 0
    assert "all at once" in done.stdout
    refused = kvlink("bench", "place", "--dtype", "float7")
    assert refused.returncode == 2
    assert "float7" in refused.stderr
