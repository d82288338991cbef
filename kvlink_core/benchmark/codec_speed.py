"""How fast codecs encode and decode: one cache of a given shape, all codecs in turn, with one thread and with all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from kvlink_core.benchmark.codec_results import Shape, SpeedRow, gb_per_s
from kvlink_core.benchmark.rounds import Clock, Progress, Work, alternate
from kvlink_core.compress import Codec, codec_spec
from kvlink_core.types import DocumentCache


def drawn_cache(shape: Shape, device: torch.device) -> DocumentCache:
    """A cache in bfloat16 of normal numbers: keys with a mean and a size for each channel, as models have them."""
    draw = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=draw, device=device)

    full = (shape.layers, shape.kv_heads, shape.tokens, shape.head_dim)
    channels = (shape.layers, shape.kv_heads, 1, shape.head_dim)
    keys = (normal(*full) + normal(*channels)) * (normal(*channels) / 2).exp()
    return DocumentCache(torch.arange(shape.tokens), keys.to(torch.bfloat16), normal(*full).to(torch.bfloat16))


def measure_speed(
    codecs: Mapping[str, Codec],
    shape: Shape,
    device: torch.device,
    threads: Sequence[int],
    repeats: int,
    progress: Progress = lambda name, done, total: None,
) -> list[SpeedRow]:
    """Encode a cache on ``device``, and decode what came of it, which lies in ordinary memory, onto the device.

    Args:
        codecs: by the name under which the result is wanted.
        shape: of the cache.
        device: where caches are and are wanted.
        threads: how many torch computes with, once with each; set back at the end.
        repeats: counted runs of each codec.
        progress: called with what is under way.

    Raises:
        InputError: a codec that cannot store such a cache.
    """
    before = torch.get_num_threads()
    cache = drawn_cache(shape, device)
    clock = Clock(device)
    stored: dict[str, int] = {}

    def work(name: str, codec: Codec) -> Work:
        def run() -> Mapping[str, float]:
            encoding, encoded = clock.time(lambda: codec.encode(cache))
            stored[name] = sum(column.data.numel() for column in encoded.columns.values())
            decoding, _ = clock.time(lambda: codec.decode(encoded, device))
            return {"encode": encoding, "decode": decoding}

        return Work(run)

    rows = []
    try:
        for number in threads:
            torch.set_num_threads(number)
            runs = alternate({name: work(name, codec) for name, codec in codecs.items()}, repeats, progress)
            for name, codec in codecs.items():
                encode_s, decode_s = ([run[what] for run in runs[name]] for what in ("encode", "decode"))
                rows.append(
                    SpeedRow(
                        codec=name,
                        spec=codec_spec(codec),
                        threads=number,
                        stored_bytes=stored[name],
                        encode_s=encode_s,
                        decode_s=decode_s,
                        encode_gb_s=gb_per_s(shape, encode_s),
                        decode_gb_s=gb_per_s(shape, decode_s),
                    )
                )
    finally:
        torch.set_num_threads(before)
    return rows
