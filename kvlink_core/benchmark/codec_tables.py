"""The figures of ``kvlink bench codec`` as rows of text, for a terminal and for a page alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvlink_core.benchmark.codec_results import CodecReport, Quality, QualityRow, Speed, SpeedRow
from kvlink_core.benchmark.tables import count

#: What reading bfloat16 bytes from a fast local disk gives: decoding is to be no slower (gigabytes a second).
DISK_GB_S = 2.0

#: Goals: at most this share of bfloat16, and fewer points of exact match lost than this.
GOALS = ((1 / 4, 0.5), (1 / 8, 1.0))

#: Above this there is no work: the cache is a view of the bytes, or these of the cache.
_NO_WORK_GB_S = 200.0


@dataclass(frozen=True, slots=True)
class Grid:
    """A table: what it shows, column names, and a cell for each."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def grids(report: CodecReport) -> list[Grid]:
    """All tables of a report."""
    speed = [speed_grid(report.speed)] if report.speed else []
    return [*(quality_grid(quality) for quality in report.quality), *speed]


def quality_grid(quality: Quality) -> Grid:
    """One line for each codec on one material."""
    graded = any(row.exact for row in quality.rows)
    header = ["codec", "bytes a token", "of bf16", "error of K", "of V", "of logits", "KL, nats", "top 1 the same"]
    rows = []
    for row in quality.rows:
        cells = [
            row.codec,
            f"{row.bytes_per_token:,.0f}",
            f"{row.share:.3f}",
            *(error(e) for e in (row.keys_error, row.values_error, row.logits_error)),
            f"{abs(row.divergence):.1e}" if row.divergence else "0",  # rounding can leave it below zero
            f"{100 * row.top1:.2f} %",
        ]
        rows.append(cells + (_exact(row) if graded else []))
    model = quality.model
    title = f"{quality.name}, {Path(model.source).name} in {model.dtype} on {model.device}: {quality.description}"
    return Grid(title, [*header, *(["exact match", "points gained (95 %)"] if graded else [])], rows)


def speed_grid(speed: Speed) -> Grid:
    """One line for each codec, columns for each number of threads."""
    numbers = list(dict.fromkeys(row.threads for row in speed.rows))
    shape, hardware = speed.shape, speed.hardware
    where = hardware.gpu or hardware.cpu
    many = len(numbers) > 1
    header = ["codec", "of bf16"]
    for number in numbers:
        after = f", {count(number, 'thread')}" if many else ""
        header += [f"encode{after}", f"decode{after}"]
    rows = []
    for codec in dict.fromkeys(row.codec for row in speed.rows):
        own = [next(r for r in speed.rows if (r.codec, r.threads) == (codec, number)) for number in numbers]
        cells = [codec, f"{own[0].stored_bytes / shape.nbytes:.3f}"]
        for row in own:
            cells += [rate(row.encode_gb_s), rate(row.decode_gb_s)]
        rows.append(cells)
    title = (
        f"{where}: GB of bfloat16 cache a second; {shape.layers} layers, {shape.kv_heads} heads of {shape.head_dim}, "
        f"{shape.tokens:,} tokens; medians of {len(speed.rows[0].decode_s)}"
    )
    return Grid(title, header, rows)


def verdicts(report: CodecReport) -> list[str]:
    """Which codecs reach which goal, in sentences."""
    said = []
    for quality in report.quality:
        for share, points in GOALS:
            graded = [row for row in quality.rows if row.exact]
            met = [row for row in graded if row.share <= share and row.exact and row.exact.low > -points]
            if graded:
                names = ", ".join(f"`{row.codec}` ({row.share:.3f})" for row in met) or "none of these"
                said.append(
                    f"{quality.name}, at most {share:g} of bfloat16, and less than {points:g} points lost with 95 % "
                    f"confidence: {names}."
                )
    if report.speed and not report.speed.hardware.gpu:
        fastest: dict[str, SpeedRow] = {}
        for row in report.speed.rows:
            if row.codec not in fastest or row.decode_gb_s > fastest[row.codec].decode_gb_s:
                fastest[row.codec] = row
        names = ", ".join(f"`{name}`" for name, row in fastest.items() if row.decode_gb_s >= DISK_GB_S)
        said.append(f"decoded at {DISK_GB_S:g} GB/s or more, by the faster number of threads: {names or 'none'}.")
    return said


def rate(gb_s: float) -> str:
    """Gigabytes a second, three digits at most."""
    if gb_s > _NO_WORK_GB_S:
        return "a view"
    return f"{gb_s:.0f}" if gb_s >= 100 else f"{gb_s:.1f}" if gb_s >= 10 else f"{gb_s:.2f}"


def error(share: float) -> str:
    """A relative error in percent."""
    return "0" if share == 0 else f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"


def _exact(row: QualityRow) -> list[str]:
    exact = row.exact
    if exact is None:
        return ["-", "-"]
    return [
        f"{100 * exact.right / exact.questions:.2f} %",
        f"{exact.points:+.2f} ({exact.low:+.2f} to {exact.high:+.2f})",
    ]
