"""What the proofs found, as JSON and as tables in Markdown to paste into a page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvlink_core.benchmark.results import Hardware
from serve.prove.fault_run import FaultResult
from serve.prove.load_run import LoadResult


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine(hardware: Hardware) -> str:
    """Where it was measured, in a line."""
    busy = hardware.others_busy
    others = "" if busy is None else f"; others kept {busy:.1f} cores busy"
    return f"{hardware.cores} cores of {hardware.cpu}, {hardware.memory_gib} GiB{others}"


def counted(counts: Mapping[str, int]) -> str:
    """Counts by name, in a cell."""
    return ", ".join(f"{count} x {name}" for name, count in sorted(counts.items())) or "0"


def fault_table(results: Sequence[FaultResult]) -> str:
    """A row for each kind of fault."""
    header = (
        "fault", "times", "requests", "right", "**wrong**", "clear errors", "**lost**", "felt by",
        "longest gap s", "well again after s, median (max)", "held when idle, before / after", "holds",
    )  # fmt: skip
    return markdown(header, [_fault_row(result) for result in results])


def _fault_row(result: FaultResult) -> list[str]:
    if result.skipped is not None or result.before is None or result.after is None:
        return [result.what, "0", *[""] * 9, f"not tried: {result.skipped}"]
    recovered = "never"
    if result.recovery_s:
        recovered = f"{statistics.median(result.recovery_s):.1f} ({max(result.recovery_s):.1f})"
    before, after = result.before, result.after
    held = f"{before.sockets} / {after.sockets} connections, {before.handles} / {after.handles} handles"
    if any(after.gauges.values()):
        held += "; " + ", ".join(f"{name} {value:g}" for name, value in after.gauges.items() if value)
    return [
        result.what, str(result.times), str(result.requests), str(result.right), str(result.wrong),
        counted(result.errors), counted(result.lost), str(result.felt), f"{result.gap_s:.1f}", recovered, held,
        "yes" if not result.faults else "**no**: " + "; ".join(result.faults),
    ]  # fmt: skip


def fault_page(results: Sequence[FaultResult], hardware: Hardware, command: str) -> str:
    """The table with its command and its machine."""
    return f"`{command}`\n\n{machine(hardware)}.\n\n{fault_table(results)}"


def load_page(capacity: float, results: Sequence[LoadResult], hardware: Hardware, command: str) -> str:
    """Latencies, then memory, with the command and the machine."""
    header = (
        "of capacity", "requests/s", "sent", "right", "**wrong**", "errors", "**lost**", "TTFT p50/p95/p99 ms",
        "ITL p50/p99 ms", "whole p50/p95/p99 ms", "goodput/s", "holds",
    )  # fmt: skip
    rows = [
        [
            f"{r.share:g}", f"{r.rate:.2f}", str(r.sent), str(r.right), str(r.wrong), counted(r.errors),
            counted(r.lost), *(" / ".join(f"{v:.0f}" for v in times) for times in (r.ttft_ms, r.itl_ms, r.e2e_ms)),
            f"{r.goodput:.2f}", "yes" if not r.faults else "**no**: " + "; ".join(r.faults),
        ]
        for r in results
    ]  # fmt: skip
    memory = [
        [f"{r.share:g}", m.process, f"{m.begin / 2**20:.1f}", f"{m.end / 2**20:.1f}", f"{m.drift:+.2%}"]
        for r in results
        for m in r.memory
    ]
    seconds = results[0].seconds if results else 0
    return (
        f"`{command}`\n\n{machine(hardware)}. Capacity {capacity:.2f} answers a second; {seconds:g} s each.\n\n"
        + markdown(header, rows)
        + "\n"
        + markdown(("of capacity", "process", "MiB at 20 to 40 %", "MiB at the end", "drift"), memory)
    )


def save(path: Path, **content: Any) -> None:
    """Write JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=_plain) + "\n", "utf-8")


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, Hardware) else asdict(value)
