"""Two runs, or two cells of one, question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvlink_core.errors import ConfigError
from kvlink_core.evaluation.grid import Cell
from kvlink_core.evaluation.records import Row, RunConfig, read_config, read_rows
from kvlink_core.evaluation.statistics import RESAMPLES, Difference, paired
from kvlink_core.evaluation.summary import MEASURES, By, group_of, measure_of


@dataclass(frozen=True, slots=True)
class Side:
    """What is compared.

    Attributes:
        config: of its run.
        cells: its cells that are meant, by linker and codec; one, where a cell was named.
        rows: of these, by cell and question.
        named: whether a cell was named.
    """

    config: RunConfig
    cells: tuple[Cell, ...]
    rows: Mapping[tuple[Cell, tuple[str, str]], Row]
    named: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """One measure of two cells on the questions of one group that both have.

    Attributes:
        group, measure: compared.
        first, second: the cells' names, without the model where both have the same.
        first_mean, second_mean: over these questions.
        found: the difference, second less first.
    """

    group: str
    measure: str
    first: str
    second: str
    first_mean: float
    second_mean: float
    found: Difference


def open_side(source: str) -> Side:
    """A run's folder, or one cell of it as ``FOLDER#CELL``, where ``CELL`` is a linker, or has a codec or a model too.

    Raises:
        ConfigError: no run, no such cell, or several.
    """
    folder, marked, name = source.partition("#")
    path = Path(folder)
    config, rows = read_config(path), read_rows(path)
    cells = [Cell(*cell) for cell in config.cells]
    if marked:
        cells = _named(cells, name, source)
    wanted = {(row.cell, row.question): row for row in rows if row.cell in cells and row.skipped is None}
    return Side(config, tuple(cells), wanted, bool(marked))


def _named(cells: Sequence[Cell], name: str, source: str) -> list[Cell]:
    def called(cell: Cell) -> tuple[str, ...]:
        return cell.name, "/".join(part for part in (cell.linker, cell.codec) if part), cell.linker

    for width in range(3):
        found = [cell for cell in cells if called(cell)[width] == name]
        if len(found) == 1:
            return found
        if found:
            raise ConfigError(f"{source}: several cells are called so: {', '.join(cell.name for cell in found)}.")
    raise ConfigError(f"{source}: no such cell; there are {', '.join(cell.name for cell in cells)}.")


def compare(
    first: Side,
    second: Side,
    *,
    by: By = "dataset",
    measures: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[Comparison]:
    """Compare on the questions that both have.

    Cells are compared with those of the same linker and codec, or the two that were named.

    Raises:
        ConfigError: nothing to compare: no common cell, no common question, no such measure.
    """
    if unknown := [name for name in measures or () if name not in MEASURES]:
        raise ConfigError(f"there is no measure {unknown[0]!r}; there are {', '.join(MEASURES)}.", param="metric")
    pairs = _pairs(first, second)
    found = [
        comparison
        for one, other in pairs
        for comparison in _compared(first, second, one, other, by, measures or MEASURES, seed, resamples)
    ]
    if not found:
        raise ConfigError("the two have no question in common that both have a measure of; nothing to compare.")
    return found


def _pairs(first: Side, second: Side) -> list[tuple[Cell, Cell]]:
    if first.named != second.named:
        raise ConfigError("name a cell of both, or of neither: FOLDER#CELL.")
    if first.named:
        return [(first.cells[0], second.cells[0])]
    alone = len(first.config.models) == len(second.config.models) == 1
    pairs = [
        (one, other)
        for one in first.cells
        for other in second.cells
        if (one.linker, one.codec) == (other.linker, other.codec) and (alone or one.model == other.model)
    ]
    if not pairs:
        raise ConfigError("the two runs have no cell in common; name one of each: FOLDER#CELL.")
    return pairs


def _compared(
    first: Side,
    second: Side,
    one: Cell,
    other: Cell,
    by: By,
    measures: Sequence[str],
    seed: int,
    resamples: int,
) -> list[Comparison]:
    questions = [question for cell, question in first.rows if cell == one and (other, question) in second.rows]
    groups: dict[str, list[tuple[Row, Row]]] = {}
    for question in questions:
        pair = first.rows[one, question], second.rows[other, question]
        groups.setdefault(group_of(pair[0], by), []).append(pair)
    first_name, second_name = _short(one, other), _short(other, one)
    found = []
    for group, pairs in groups.items():
        for measure in measures:
            values = [(measure_of(a, measure), measure_of(b, measure)) for a, b in pairs]
            known = np.array([v for v in values if None not in v], dtype=np.float64)
            if len(known):
                difference = paired(known[:, 0], known[:, 1], seed=seed, resamples=resamples)
                means = known.mean(axis=0)
                found.append(
                    Comparison(group, measure, first_name, second_name, float(means[0]), float(means[1]), difference)
                )
    return found


def _short(cell: Cell, beside: Cell) -> str:
    return cell.name if cell.model != beside.model else cell.name.removeprefix(f"{cell.model}/")


def differing_settings(first: RunConfig, second: RunConfig) -> list[str]:
    """What two runs were asked differently besides models and cells, to be told with a comparison."""
    said = [
        f"{name} differs: {getattr(first, name)!r} and {getattr(second, name)!r}."
        for name in ("template", "max_tokens", "follow", "device", "dtype")
        if getattr(first, name) != getattr(second, name)
    ]
    theirs = {data.name: data for data in second.data}
    for data in first.data:
        other = theirs.get(data.name)
        if other is not None and other.digest != data.digest:
            said.append(f"data set {data.name} is not the same ({data.questions} and {other.questions} questions).")
        if other is not None and first.system.get(data.name) != second.system.get(data.name):
            said.append(f"the system text over {data.name} differs.")
    return said
