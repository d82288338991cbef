"""What ``kvlink bench ttft`` found, and its JSON (described for readers in docs/benchmarks.md).

Every derived figure in the file is checked against the seconds of the runs when it is read.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvlink_core.models import LoadedModel

Part = Literal["load", "decode", "rotate", "copy", "prefill", "sample"]

#: Where the time of a linked first token goes, in the order in which it passes.
PARTS: tuple[Part, ...] = ("load", "decode", "rotate", "copy", "prefill", "sample")

_STEPS = ("load", "decode", "link", "link_forward", "unrotated", "prefill", "sample")

Kind = Literal["full", "linker", "floor", "stock"]
Seconds = list[float]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Case(_Record):
    """A prompt's shape.

    Attributes:
        context_tokens: document tokens in all.
        document_tokens: tokens of each document; the last one may be shorter.
        query_tokens: tokens after the documents.
        links: link tokens after each document, for the linkers that want them.
    """

    context_tokens: int = Field(5000, ge=1)
    document_tokens: int = Field(500, ge=1)
    query_tokens: int = Field(32, ge=1)
    links: int = Field(5, ge=1)

    @property
    def document_lengths(self) -> tuple[int, ...]:
        """Tokens of each document."""
        whole, rest = divmod(self.context_tokens, self.document_tokens)
        return (self.document_tokens,) * whole + (rest,) * bool(rest)


class Row(_Record):
    """One candidate at one case.

    Attributes:
        name: the linker as it was named; of a floor, which linkers it is the floor of.
        kind: what it is; ``floor`` is the engine's own forward, ``stock`` that of transformers.
        source: where a linker's caches came from; ``None`` for what uses none.
        prompt_tokens, computed_tokens: of the prompt, and of these computed.
        seconds: to the first token (or of the forward pass), of each counted run.
        median_s, min_s: of ``seconds``.
        of_full, x_floor, x_stock: ratios of medians; ``None`` where there is nothing to compare with. A linker is held
            against the floors that compute the same tokens.
    """

    name: str
    kind: Kind
    source: Literal["memory", "disk"] | None
    prompt_tokens: int
    computed_tokens: int
    seconds: Seconds = Field(min_length=1)
    median_s: float
    min_s: float
    of_full: float | None = None
    x_floor: float | None = None
    x_stock: float | None = None

    @classmethod
    def of(cls, seconds: Sequence[float], **fields: Any) -> Row:
        """A row of ``seconds``, without ratios."""
        return cls(seconds=list(seconds), median_s=statistics.median(seconds), min_s=min(seconds), **fields)

    @property
    def label(self) -> str:
        """The row's name in tables."""
        return self.name + (", from disk" if self.source == "disk" else "")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _same(self.label, "median_s", self.median_s, statistics.median(self.seconds))
        _same(self.label, "min_s", self.min_s, min(self.seconds))
        return self


class Breakdown(_Record):
    """Where the time of one linker goes, from runs of their own whose steps were timed one by one.

    Attributes:
        name, source: of the row that it explains.
        measured: seconds of each run of what was timed: ``load`` (reading and decoding), ``decode``, ``link``,
            ``link_forward`` (the model's part of ``link``), ``unrotated`` (``link`` with the rotation left out, its
            forward passes not counted), ``prefill``, ``sample``.
        parts: seconds by part (``PARTS``), from the medians of ``measured``.
        sum_s: of ``parts``.
        sum_of_whole: ``sum_s`` over the median of the row.
    """

    name: str
    source: Literal["memory", "disk"]
    measured: dict[str, Seconds]
    parts: dict[Part, float]
    sum_s: float
    sum_of_whole: float

    @property
    def label(self) -> str:
        """As ``Row.label``."""
        return self.name + (", from disk" if self.source == "disk" else "")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if set(self.measured) != set(_STEPS) or not all(self.measured.values()):
            raise ValueError(f"the breakdown of {self.label!r} needs runs of {', '.join(_STEPS)}")
        for part, seconds in parts_of(self.measured).items():
            _same(self.label, part, self.parts.get(part, math.nan), seconds)
        _same(self.label, "sum_s", self.sum_s, sum(self.parts.values()))
        return self


def parts_of(measured: Mapping[str, Sequence[float]]) -> dict[Part, float]:
    """Seconds by part from the runs of what was timed (see ``Breakdown.measured``), by their medians.

    Rotation is what linking takes beyond linking without it, and reading what loading takes beyond decoding.
    """
    median = {name: statistics.median(seconds) for name, seconds in measured.items()}
    placing = median["link"] - median["link_forward"]
    rotate = min(placing, max(0.0, placing - median["unrotated"]))
    decode = min(median["load"], median["decode"])
    return {
        "load": median["load"] - decode,
        "decode": decode,
        "rotate": rotate,
        "copy": placing - rotate,
        "prefill": median["link_forward"] + median["prefill"],
        "sample": median["sample"],
    }


class Point(_Record):
    """All candidates at one case."""

    case: Case
    rows: list[Row]
    breakdowns: list[Breakdown]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for row, right in zip(self.rows, with_ratios(self.rows), strict=True):
            for ratio in ("of_full", "x_floor", "x_stock"):
                _same(row.label, ratio, getattr(row, ratio), getattr(right, ratio))
        whole = {row.label: row.median_s for row in self.rows}
        for breakdown in self.breakdowns:
            if breakdown.label not in whole:
                raise ValueError(f"a breakdown of {breakdown.label!r}, which is no row")
            _same(breakdown.label, "sum_of_whole", breakdown.sum_of_whole, breakdown.sum_s / whole[breakdown.label])
        return self


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows with their ratios of medians."""
    full = next((r.median_s for r in rows if r.kind == "full"), None)

    def beside(row: Row, kind: Kind) -> float | None:
        same = (row.prompt_tokens, row.computed_tokens)
        floor = next((r for r in rows if r.kind == kind and (r.prompt_tokens, r.computed_tokens) == same), None)
        return row.median_s / floor.median_s if floor and row.kind != "full" else None

    return [
        row.model_copy(
            update={
                "of_full": row.median_s / full if full else None,
                "x_floor": beside(row, "floor"),
                "x_stock": beside(row, "stock"),
            }
        )
        for row in rows
    ]


class Hardware(_Record):
    """The machine.

    Attributes:
        cpu: model of the processor.
        cores: that this process may use.
        threads: that torch computes with.
        memory_gib: of the machine.
        gpu: model of the GPU that computed, if one did.
        gpu_memory_gib: its memory.
        load_before: the system's load average over the minute before the start, if it keeps one.
        others_busy: how many cores other processes kept busy while this one measured, if the system says.
    """

    cpu: str
    cores: int
    threads: int
    memory_gib: float | None
    gpu: str | None = None
    gpu_memory_gib: float | None = None
    load_before: float | None = None
    others_busy: float | None = None


class Model(_Record):
    """The model that was measured; ``source`` is what names it on the command line."""

    source: str
    type: str
    parameters: int
    dtype: str
    device: str

    @classmethod
    def of(cls, model: LoadedModel, source: str) -> Self:
        """What is to be said of a loaded model."""
        return cls(
            source=source,
            type=model.spec.model_type,
            parameters=sum(p.numel() for p in model.network.parameters()),
            dtype=model.fingerprint.dtype,
            device=str(model.device),
        )


class Report(_Record):
    """A whole run of ``kvlink bench ttft``.

    Attributes:
        format: of this file.
        command: that repeats it.
        started: when, in UTC, ISO 8601.
        quick: made with fewer runs than a published figure needs.
        repeats: counted runs of each candidate that were asked for.
        full_budget_s: seconds that the runs of ``full`` may take at one point.
        versions: of what computed.
        hardware, model: what it ran on, and what ran.
        warnings: why figures may not be right, and what was not measured.
        points: by case, in ascending context length.
    """

    format: Literal["kvlink-bench-ttft/1"]
    command: str
    started: str
    quick: bool
    repeats: int
    full_budget_s: float
    versions: dict[str, str]
    hardware: Hardware
    model: Model
    warnings: list[str]
    points: list[Point] = Field(min_length=1)


def _same(label: str, what: str, stated: float | None, computed: float | None) -> None:
    if (stated is None) != (computed is None) or (
        stated is not None and computed is not None and not math.isclose(stated, computed, rel_tol=1e-6, abs_tol=1e-9)
    ):
        raise ValueError(f"{what} of {label!r} is {stated}, and its runs give {computed}")
