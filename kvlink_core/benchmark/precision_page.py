"""The figures of ``kvlink bench dtype`` as a page: ``docs/dtypes.md``."""

from __future__ import annotations

import statistics

from kvlink_core.benchmark.precision import PrecisionReport, PrecisionRow

_HEAD = """\
# Accuracy in bfloat16 and float16

<!-- Written by `{command}`. -->

How far logits are from a float32 pass with the same (rounded) weights, as max |difference| / max |logit|: of one
ordinary masked pass in the dtype, and of the linked path in that dtype. Medians over {models} tiny random models with
{prompts} prompts each; [benchmarks.md](benchmarks.md) says how it is measured. The ratio of medians, linked over
ordinary, is to be {bound:g} at most.

{versions}; CPU.
**{met} of {total} are within {bound:g}; the median ratio is {median:.2f}, the largest {largest:.2f} ({worst}).**
Ratios below 1 mean that linking is the more accurate: keys are rotated in float32 whatever the dtype.

| model type | dtype | ordinary | `reposition` | ratio | ordinary, with links | `link-tokens` | ratio |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def render(report: PrecisionReport) -> str:
    """The page, in Markdown."""
    rows = {(r.model_type, r.dtype, r.linker): r for r in report.rows}
    worst = max(report.rows, key=lambda r: r.ratio_largest)
    versions = ", ".join(f"{k} {v}" for k, v in report.versions.items() if k != "kvlink")
    text = _HEAD.format(
        command=report.command,
        models=report.seeds,
        prompts=report.prompts,
        bound=report.bound,
        versions=versions[:1].upper() + versions[1:],
        met=sum(r.met for r in report.rows),
        total=len(report.rows),
        median=statistics.median(r.ratio_largest for r in report.rows),
        largest=worst.ratio_largest,
        worst=f"`{worst.model_type}`, {worst.dtype}, `{worst.linker}`",
    )
    for model_type, dtype in dict.fromkeys((r.model_type, r.dtype) for r in report.rows):
        cells = [_cells(rows.get((model_type, dtype, linker))) for linker in ("reposition", "link-tokens")]
        text += f"| `{model_type}` | {dtype} | {' | '.join(cells)} |\n"
    return text


def _cells(row: PrecisionRow | None) -> str:
    if row is None:
        return "- | - | -"
    ordinary, linked = statistics.median(row.ordinary.largest), statistics.median(row.linked.largest)
    return f"{ordinary:.1e} | {linked:.1e} | {row.ratio_largest:.2f}"
