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


def save(path: Path, **content: Any) -> None:
    """Write JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=_plain) + "\n", "utf-8")


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, Hardware) else asdict(value)
