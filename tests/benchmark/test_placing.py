"""Ways to place documents agree with each other, and the command shows them."""

from __future__ import annotations

import pytest
import torch
from command import Kvlink

from kvlink_core.benchmark.placing import PlacingCase, measure_placing

CASE = PlacingCase(layers=3, kv_heads=2, head_dim=16, documents=2, tokens=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ways_agree(dtype: torch.dtype) -> None:
    plain, ours = measure_placing(CASE, "cpu", dtype, repeats=2)
    assert (plain.name, ours.name) == ("plain", "as it is")
    assert ours.difference <= 1e-6
    assert len(ours.seconds) == 2


def test_the_command(kvlink: Kvlink) -> None:
    done = kvlink("bench", "place", "--layers", "2", "--documents", "2", "--repeats", "1")
    assert done.returncode == 0
    assert "as it is" in done.stdout
    refused = kvlink("bench", "place", "--dtype", "float7")
    assert refused.returncode == 2
    assert "float7" in refused.stderr
