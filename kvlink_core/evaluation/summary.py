"""What a run came to: means with 95 % bootstrap intervals, for each data set (or kind of question) and cell."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from kvlink_core.evaluation.examples import Task
from kvlink_core.evaluation.grid import FULL, Cell
from kvlink_core.evaluation.records import Row, RunConfig
from kvlink_core.evaluation.statistics import RESAMPLES, bootstrap

By = Literal["dataset", "kind"]

#: How close a cell is to ``full``; the other measures are scores of answers.
CLOSENESS = ("kl", "top1", "nll")

#: In the order of tables.
MEASURES = ("em", "f1", "exact", "rouge_l", *CLOSENESS)

#: Measures of which less is better.
LESS_IS_BETTER = ("kl", "nll")

#: The first measure of a task, which plots show.
MAIN: Mapping[Task, str] = {"qa": "em", "summary": "rouge_l", "text": "top1"}


class Estimate(BaseModel):
    """A mean over questions, and its 95 % interval."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: float
    low: float
    high: float


class CellSummary(BaseModel):
    """One cell over the questions of one group.

    Attributes:
        group: the data set, or data set and kind.
        model, linker, codec: the cell.
        questions: that were asked.
        skipped: that could not be, e.g. because they do not fit the model's context.
        measures: by name, those that some question has; a mean over the questions that have it.
        ttft_s, decode_s: median seconds to the first token, and of these for decoding documents.
        of_full: median over questions of the seconds to the first token, relative to ``full`` on the same question.
        computed_tokens, prompt_tokens: mean per question.
        bytes_per_token: of documents, as the codec has them; ``None`` for ``full``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    group: str
    model: str
    linker: str
    codec: str
    questions: int
    skipped: int
    measures: Mapping[str, Estimate]
    ttft_s: float | None
    decode_s: float | None
    of_full: float | None
    computed_tokens: float
    prompt_tokens: float
    bytes_per_token: float | None

    @property
    def cell(self) -> Cell:
        """The cell."""
        return Cell(self.model, self.linker, self.codec)


def measure_of(row: Row, name: str) -> float | None:
    """A row's value of a measure; ``None`` where it has none."""
    value = getattr(row, name) if name in CLOSENESS else row.scores.get(name)
    return None if value is None else float(value)


def group_of(row: Row, by: By) -> str:
    """The group that a row belongs to."""
    return row.dataset if by == "dataset" else f"{row.dataset}: {row.kind or 'other'}"


def summarise(
    rows: Sequence[Row], *, by: By = "dataset", seed: int = 0, resamples: int = RESAMPLES
) -> list[CellSummary]:
    """Summaries by group and cell, in the order in which they first come.

    Intervals of one group draw the same questions for every cell that answered all of them.
    """
    groups: dict[tuple[str, Cell], list[Row]] = {}
    for row in rows:
        groups.setdefault((group_of(row, by), row.cell), []).append(row)
    full_s = {(row.model, *row.question): row.ttft_s for row in rows if row.linker == FULL}
    return [
        _summary(group, cell, members, full_s, seed, resamples)
        for (group, cell), members in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def _summary(
    group: str,
    cell: Cell,
    rows: Sequence[Row],
    full_s: Mapping[tuple[str, str, str], float | None],
    seed: int,
    resamples: int,
) -> CellSummary:
    asked = [row for row in rows if row.skipped is None]
    measures = {}
    for name in MEASURES:
        values = [value for row in asked if (value := measure_of(row, name)) is not None]
        if values:
            found = bootstrap(values, seed=seed, resamples=resamples)
            measures[name] = Estimate(mean=found.mean, low=found.low, high=found.high)
    ratios = [
        row.ttft_s / full
        for row in asked
        if row.ttft_s is not None and (full := full_s.get((row.model, *row.question))) is not None
    ]
    tokens = sum(row.document_tokens for row in asked)
    return CellSummary(
        group=group,
        model=cell.model,
        linker=cell.linker,
        codec=cell.codec,
        questions=len(asked),
        skipped=len(rows) - len(asked),
        measures=measures,
        ttft_s=_median([row.ttft_s for row in asked]),
        decode_s=_median([row.decode_s for row in asked]),
        of_full=statistics.median(ratios) if ratios else None,
        computed_tokens=statistics.mean(row.computed_tokens for row in asked) if asked else 0.0,
        prompt_tokens=statistics.mean(row.prompt_tokens for row in asked) if asked else 0.0,
        bytes_per_token=sum(row.stored_bytes for row in asked) / tokens if cell.codec and tokens else None,
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def main_measure(config: RunConfig, dataset: str) -> str:
    """The measure that stands for a data set where one must."""
    return next(MAIN[data.task] for data in config.data if data.name == dataset)
