"""Golden files of codecs, which the oracle made after FORMAT.md: they are read, and written, bit for bit."""

from __future__ import annotations

import json
from typing import Any

import codec_golden
import pytest
import torch
from codec_oracle import same_bits

from kvlink_core.compress import DTYPES, CacheShape, EncodedColumn, EncodedDocument, make_codec
from kvlink_core.types import DocumentCache

FILES = sorted(codec_golden.DIRECTORY.glob("*.json"))


def bytes_of(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def cache_of(golden: dict[str, Any], which: str) -> DocumentCache:
    sizes = golden["layers"], golden["kv_heads"], golden["tokens"]
    keys, values = (
        bytes_of(golden[which][name]).view(DTYPES[golden["dtype"]]).view(*sizes, golden[dim])
        for name, dim in (("k", "head_dim"), ("v", "value_dim"))
    )
    return DocumentCache(torch.arange(golden["tokens"]), keys, values)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))],
)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_golden_file_is_read_and_written(path: Any, device: str) -> None:
    golden = json.loads(path.read_text())
    codec = make_codec(golden["codec"]["name"], golden["codec"]["params"])
    assert codec.columns == tuple(golden["columns"])
    stored = {
        name: EncodedColumn(bytes_of("".join(values)), tuple(len(v) // 2 for v in values))
        for name, values in golden["columns"].items()
    }
    shape = CacheShape(
        *(golden[name] for name in ("layers", "kv_heads", "tokens", "head_dim", "value_dim", "dtype"))
    )  # fmt: skip
    limits = codec.value_bytes(shape)
    for name, column in stored.items():
        assert all(limits[name][0] <= length <= limits[name][1] for length in column.lengths)

    decoded = codec.decode(EncodedDocument(shape, torch.arange(shape.tokens), stored), torch.device(device))
    expected = cache_of(golden, "decodes_to")
    assert decoded.keys.device.type == device
    assert same_bits(decoded.keys.cpu(), expected.keys)
    assert same_bits(decoded.values.cpu(), expected.values)

    if golden["codec"]["params"]["zstd"] == 0:  # frames may differ from writer to writer
        given = cache_of(golden, "encoded_from")
        encoded = codec.encode(DocumentCache(given.token_ids, given.keys.to(device), given.values.to(device)))
        assert {name: c.data.tolist() for name, c in encoded.columns.items()} == {
            name: c.data.tolist() for name, c in stored.items()
        }
        assert {name: c.lengths for name, c in encoded.columns.items()} == {n: c.lengths for n, c in stored.items()}


def test_the_golden_files_are_what_the_oracle_makes() -> None:
    made = {name: codec_golden.text(content) for name, content in codec_golden.files()}
    assert made == {path.stem: path.read_text() for path in FILES}
    assert len(made) == 18


def test_they_hold_the_odd_cases() -> None:
    """An odd number of four-bit codes, groups cut short, a clipped number, frames beside plain values."""
    shapes = json.loads((codec_golden.DIRECTORY / "int4-float32-channel-3.json").read_text())
    assert shapes["kv_heads"] * shapes["tokens"] * shapes["head_dim"] % 2 == 1
    assert shapes["tokens"] % shapes["codec"]["params"]["group"] != 0
    assert (
        float(cache_of(shapes, "encoded_from").keys.max()) > 2.9e38 > float(cache_of(shapes, "decodes_to").keys.max())
    )
    frames = json.loads((codec_golden.DIRECTORY / "int8-bfloat16-frames.json").read_text())["columns"]
    assert {len(v) // 2 for v in frames["k"]} != {3 * 5 * 7}
    assert all(v.startswith("28b52ffd") for v in frames["k"])
