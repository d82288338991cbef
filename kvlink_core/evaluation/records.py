"""A run on disk: what was asked in ``run.json``, what came of it in ``answers.jsonl``, one line per question and cell.

Lines are written as they come, those of one question together. A run that was ended in between goes on behind the last
question that is whole; one that asks for something else than ``run.json`` says is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from kvlink_core.errors import ConfigError
from kvlink_core.evaluation.examples import Task
from kvlink_core.evaluation.grid import Cell

RUN, ANSWERS = "run.json", "answers.jsonl"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelUsed(_Record):
    """A model: where it came from, what the run calls it, and a digest of all that its answers depend on."""

    source: str
    label: str
    digest: str


class DataUsed(_Record):
    """A data set: its name, its task, how many questions, and a digest of them all."""

    name: str
    task: Task
    questions: int
    digest: str


class RunConfig(_Record):
    """All that the answers of a run depend on. What differs is refused when a run is resumed.

    Attributes:
        format: of this file.
        models, data: used.
        linkers, codecs: as they were asked for, all cells of them in ``cells``.
        cells: model, linker and codec of each.
        template: of the question, with ``{question}``.
        system: text of the system turn for each data set by name; empty for none.
        max_tokens: of an answer.
        follow: what is teacher-forced: ``full``'s own answer, or the data's first reference.
        device, dtype: as for ``load_model``; ``dtype`` may be the model's own.
    """

    format: Literal["kvlink-eval/1"] = "kvlink-eval/1"
    models: tuple[ModelUsed, ...]
    data: tuple[DataUsed, ...]
    linkers: tuple[str, ...]
    codecs: tuple[str, ...]
    cells: tuple[tuple[str, str, str], ...]
    template: str
    system: Mapping[str, str]
    max_tokens: int
    follow: Literal["full", "reference"]
    device: str
    dtype: str | None

    def cells_of(self, label: str) -> list[Cell]:
        """The cells of one model, in order."""
        return [Cell(*cell) for cell in self.cells if cell[0] == label]


class Row(_Record):
    """One question under one cell.

    Attributes:
        model, linker, codec: the cell.
        dataset, id, kind: the question.
        skipped: why it was not asked; all that follows is then missing.
        answer: the greedy answer, where one was wanted.
        scores: of the answer, by metric.
        kl, top1, nll, tokens: see ``Closeness``; the first two are missing for ``full`` itself.
        ttft_s: seconds to the first token: decode, link, prefill.
        decode_s: of these, for decoding the documents.
        prompt_tokens, computed_tokens: of the prompt, and of it computed.
        document_tokens, stored_bytes: of all its documents, and of their caches as the codec has them.
    """

    model: str
    linker: str
    codec: str
    dataset: str
    id: str
    kind: str = ""
    skipped: str | None = None
    answer: str | None = None
    scores: Mapping[str, float] = {}
    kl: float | None = None
    top1: float | None = None
    nll: float | None = None
    tokens: int = 0
    ttft_s: float | None = None
    decode_s: float | None = None
    prompt_tokens: int = 0
    computed_tokens: int = 0
    document_tokens: int = 0
    stored_bytes: int = 0

    @property
    def cell(self) -> Cell:
        """The cell."""
        return Cell(self.model, self.linker, self.codec)

    @property
    def question(self) -> tuple[str, str]:
        """Data set and id."""
        return self.dataset, self.id


class RunDirectory:
    """The files of a run that is under way. A context manager; nobody else writes meanwhile.

    Args:
        path: made where it is not there.
        config: what this run asks for.

    Raises:
        ConfigError: another run is in there, asked for something else or is still writing; or the folder cannot be
            written to.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config
        self._file: IO[bytes] | None = None
        self.done: dict[str, set[tuple[str, str]]] = {}

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._file = (self.path / ANSWERS).open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._start()
        except BlockingIOError as error:
            self.__exit__(None, None, None)
            raise ConfigError(f"another run is writing to {self.path}; wait for it or write elsewhere.") from error
        except OSError as error:
            self.__exit__(None, None, None)
            raise ConfigError(f"cannot write to {self.path}: {error.strerror}.") from error
        except ConfigError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def append(self, rows: Sequence[Row]) -> None:
        """Write all rows of one question and one model.

        Raises:
            ConfigError: they cannot be written.
        """
        assert self._file is not None, "only inside the context"
        lines = (row.model_dump_json(exclude_defaults=True) + "\n" for row in rows)
        try:
            self._file.write("".join(lines).encode())
            self._file.flush()
        except OSError as error:
            raise ConfigError(f"cannot write to {self.path}: {error.strerror}; run again to go on.") from error
        self.done.setdefault(rows[0].model, set()).add(rows[0].question)

    def _start(self) -> None:
        assert self._file is not None
        if (self.path / RUN).exists():
            _refuse_change(self.path, read_config(self.path), self.config)
        elif self._file.tell():
            raise ConfigError(f"{self.path} has {ANSWERS} and no {RUN}: not a run to go on with; write elsewhere.")
        else:
            beside = self.path / f"{RUN}.new"
            beside.write_text(self.config.model_dump_json(indent=1) + "\n", "utf-8")
            os.replace(beside, self.path / RUN)
        whole = 0
        for rows, end in _questions(self.path, self.config):
            self.done.setdefault(rows[0].model, set()).add(rows[0].question)
            whole = end
        self._file.truncate(whole)


def read_config(path: Path) -> RunConfig:
    """What a run asked for.

    Raises:
        ConfigError: there is no run, or not of this version.
    """
    try:
        return RunConfig.model_validate_json((path / RUN).read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} is not the folder of a run of `kvlink eval run`: no {RUN} in it.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"]) or "the file"
        raise ConfigError(f"{path / RUN} was not written by this version: {where}: {first['msg']}.") from error


def read_rows(path: Path) -> list[Row]:
    """All rows of whole questions, of a run that is done or not.

    Raises:
        ConfigError: as ``read_config``, or a line that is no row, naming it.
    """
    config = read_config(path)
    return [row for rows, _ in _questions(path, config) for row in rows]


def _questions(path: Path, config: RunConfig) -> Iterator[tuple[list[Row], int]]:
    """The rows of one question and model after the other, and where in the file they end.

    What is cut off at the end of the file is left out; anywhere else it is an error.
    """
    cells = {model.label: config.cells_of(model.label) for model in config.models}
    group: list[Row] = []
    at = 0
    with (path / ANSWERS).open("rb") as file:
        for number, line in enumerate(file, 1):
            at += len(line)
            if not line.endswith(b"\n"):
                return
            try:
                row = Row.model_validate_json(line)
            except ValidationError as error:
                raise ConfigError(f"{path / ANSWERS}, line {number}: not a row of a run.") from error
            group.append(row)
            wanted = cells.get(row.model, [])
            if row.question != group[0].question or [r.cell for r in group] != wanted[: len(group)]:
                raise ConfigError(f"{path / ANSWERS}, line {number}: {row.cell.name} was not expected here.")
            if len(group) == len(wanted):
                yield group, at
                group = []


def _refuse_change(path: Path, before: RunConfig, now: RunConfig) -> None:
    """Raises ``ConfigError`` naming the first thing that differs."""
    old, new = (_flat(json.loads(config.model_dump_json())) for config in (before, now))
    changed = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    if changed:
        name = changed[0]
        raise ConfigError(
            f"{path} holds another run: {name} was {_shown(old.get(name))} and is now {_shown(new.get(name))}. "
            "Ask as before to go on with it, or name another folder with --out.",
            param="out",
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, each in value.items() for k, v in _flat(each, f"{name}.{key}" if name else key).items()}
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return {k: v for i, each in enumerate(value) for k, v in _flat(each, f"{name}[{i}]").items()}
    return {name: value}


def _shown(value: Any) -> str:
    shown = ", ".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else repr(value)
    return shown if len(shown) <= 100 else f"{shown[:100]}..."
