"""Rows: packed as far as they hold, positions anew in each example, the same whoever asks."""

from __future__ import annotations

from pathlib import Path

import torch

from kvlink_core.models import LoadedModel
from kvlink_core.training.recipes.config import Source
from kvlink_core.training.recipes.examples import Reader
from kvlink_core.training.recipes.rows import RowDataset, collate


def dataset(model: LoadedModel, data: Path, seed: int = 0) -> RowDataset:
    sources = [
        Source(path=data / "qa.jsonl", kind="qa", weight=3),
        Source(path=data / "text.jsonl", kind="text", segment_tokens=24, target_tokens=16),
    ]
    readers = [Reader(s, model.layout, model.layout.link_tokens, 300, (256,), None) for s in sources]
    return RowDataset(readers, 40, 300, seed)


def test_rows_by_number(tiny_model: LoadedModel, data: Path) -> None:
    one, other = dataset(tiny_model, data), dataset(tiny_model, data)
    late = other[17]  # asked for first, as one who resumes does
    assert late == [one[i] for i in range(40)][17]
    assert [dataset(tiny_model, data, seed=1)[i] for i in range(9)] != [one[i] for i in range(9)]


def test_packing(tiny_model: LoadedModel, data: Path) -> None:
    rows = [dataset(tiny_model, data)[i] for i in range(20)]
    assert all(sum(p.tokens for p in row) <= 300 for row in rows)
    assert max(len(row) for row in rows) > 1
    batch = collate(rows)
    starts = (batch["positions"] == 0) & (batch["context"] > 0)
    assert int(starts.sum()) == sum(len(row) for row in rows)
    for number, row in enumerate(rows):
        said = batch["labels"][number][batch["labels"][number] != -100].tolist()
        assert said == [t for p in row for t in p.example.token_ids[p.example.target :]]
        places = torch.nonzero(batch["labels"][number] != -100).flatten()
        assert torch.equal(batch["input_ids"][number][places + 1][:-1], batch["labels"][number][places][:-1])


def test_a_text_is_cut_into_segments_with_links(tiny_model: LoadedModel, data: Path) -> None:
    source = Source(path=data / "text.jsonl", kind="text", segment_tokens=24, target_tokens=16)
    pair = Reader(source, tiny_model.layout, tiny_model.layout.link_tokens, 200, (256,), None).pair(0)
    assert pair is not None
    ids = list(pair.example.token_ids)
    text = (data / "text.jsonl").read_text().split('"')[3].encode()
    segments, at = [], 2  # after <bos> and <mem>
    while ids[at] != 262:
        segments.append(ids[at : at + 24])
        assert ids[at + 24 : at + 27] == [263, 264, 265]
        at += 27
    plain = [t for s in segments for t in s] + ids[at + 1 :]
    assert tiny_model.layout.decode(plain).encode() == text[: len(plain)]
    assert len(segments) == 5
    assert pair.example.target == at + 1
