"""Opens a data set from a local path, whatever its format, and cuts its examples to shape."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

from kvlink_core.errors import ConfigError, CorpusError
from kvlink_core.evaluation.examples import Dataset, Example, Shape, Task, words
from kvlink_core.evaluation.reading.entries import entries, opened
from kvlink_core.evaluation.reading.fields import Fields
from kvlink_core.evaluation.reading.formats import Source, format_of
from kvlink_core.evaluation.worlds import held_out
from kvlink_core.text import is_unicode
from kvlink_core.training.family.tales import make_tale
from kvlink_core.training.worlds import TEST_SEEDS
from kvlink_core.types import Document

CONTINUE = "Continue the text."

_ENDINGS = re.compile(r"(\.jsonl?|\.txt|\.md|\.src(\.cleaned)?)?(\.gz)?$")
_NAME = re.compile(r"[\w.@+-]+")


def open_dataset(
    source: str,
    *,
    limit: int | None = None,
    shape: Shape | None = None,
    task: Task | None = None,
    evidence: Path | None = None,
) -> Dataset:
    """Read examples.

    Args:
        source: a file; ``NAME=FILE`` to call it otherwise than the file; ``worlds`` or ``tales`` for generated ones.
        limit: take the first so many that can be taken; nothing beyond them is read.
        shape: what is made of them.
        task: overrides what the format says: what ``ctxs`` holds may be summarised, too.
        evidence: TriviaQA's folder of that name; the default is beside the folder of the file.

    Raises:
        CorpusError: naming file and line.
        ConfigError: a task that there is not.
    """
    if task is not None and task not in get_args(Task):
        raise ConfigError(f"there is no task {task!r}; there are {', '.join(get_args(Task))}.", param="task")
    shape = shape or Shape()
    left_out: Counter[str] = Counter()
    found: list[Example] = []
    seen: set[str] = set()
    name, _, seed = source.partition(":")
    generated = name in GENERATED
    if generated:
        if seed and not seed.isdecimal():
            raise ConfigError(f"{source!r} is not of the form {name}:SEED.", param="data")
        examples = GENERATED[name](limit or GENERATED_QUESTIONS, int(seed or 0))
    else:
        name, path = _named(source)
        examples = _of_file(path, Source(path, evidence), shape, left_out)
    for number, example in enumerate(examples):
        shaped = shape.apply(example)
        if isinstance(shaped, str):
            left_out[shaped] += 1
            continue
        identity = shaped.id or f"{number}"
        if identity in seen:
            identity = f"{identity}~{number}"  # told apart by its number: the same question twice is still two
        seen.add(identity)
        found.append(replace(shaped, id=identity, task=task or shaped.task))
        if len(found) == limit:
            break
    if not found:
        why = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise CorpusError(f"{source} has no question to ask{f' (left out: {why})' if why else ''}.")
    at = f"@{shape.gold_at}" if shape.gold_at is not None else ""
    return Dataset(name + at, tuple(found), left_out, generated)


def _named(source: str) -> tuple[str, Path]:
    """What a data set is called, and its file."""
    name, equals, rest = source.partition("=")
    if equals and _NAME.fullmatch(name):
        return name, Path(rest)
    path = Path(source)
    return _ENDINGS.sub("", path.name) or path.name, path


def _worlds(questions: int, seed: int) -> Iterator[Example]:
    """Held-out worlds: what the embedded model was trained for."""
    for number, (world, asked) in enumerate(held_out(questions, first_seed=TEST_SEEDS.start + seed), seed):
        documents = tuple(Document(str(i), p) for i, p in enumerate(world.passages))
        for i, question in enumerate(asked):
            yield Example(f"w{number}-{i}", question.question, documents, (question.answer,), kind=question.kind)


def _tales(questions: int, seed: int) -> Iterator[Example]:
    """Held-out tales, of which a later passage means nothing without an earlier one (docs/quality.md)."""
    left = questions
    for number in itertools.count(seed):
        tale = make_tale(TEST_SEEDS.start + number)
        documents = tuple(Document(str(i), p) for i, p in enumerate(tale.passages))
        for i, question in enumerate(tale.questions[:left]):
            yield Example(f"t{number}-{i}", question.question, documents, (question.answer,), kind=question.kind)
        left -= len(tale.questions[:left])
        if not left:
            return


#: Sources that are no files, by name: questions, and the first seed, which may be named as ``worlds:SEED``.
GENERATED: Mapping[str, Callable[[int, int], Iterator[Example]]] = {"worlds": _worlds, "tales": _tales}

#: How many questions are generated unless told otherwise.
GENERATED_QUESTIONS = 2000


def _of_file(path: Path, source: Source, shape: Shape, left_out: Counter[str]) -> Iterator[Example]:
    if path.is_dir():
        raise CorpusError(f"{path} is a folder; name a file in it.")
    stem = path.name.removesuffix(".gz")
    if ".src" in stem:
        yield from _parallel(path)
    elif stem.endswith((".txt", ".md")):
        with opened(path) as file:
            text = file.read()
        if not is_unicode(text):
            raise CorpusError(f"{path} has half of a surrogate pair in it.")
        yield from _of_text(text, path.stem, shape)
    else:
        for entry in entries(path):
            row = Fields.of(entry.value, entry.where)
            if row.has("text") and not row.has("question"):
                yield from _of_text(row.text("text"), row.identity("id", "_id") or "", shape)
                continue
            yield from format_of(row).read(row, source)
            left_out.update(source.left_out)
            source.left_out.clear()


def _of_text(text: str, name: str, shape: Shape) -> Iterator[Example]:
    """Plain text: its first pieces are documents, and what follows them is the continuation, again and again."""
    pieces = words(text, shape.text_words)
    each = (shape.documents or 5) + 1
    for start in range(0, len(pieces) - 1, each):
        *documents, last = pieces[start : start + each]
        if start and len(documents) + 1 < each:
            break  # a shorter rest would be another kind of question; of a short text it is all there is
        yield Example(
            f"{name}#{start // each}" if name else "",
            CONTINUE,
            tuple(Document(str(i), piece.strip()) for i, piece in enumerate(documents)),
            task="text",
            continuation=last.strip(),
        )


def _parallel(path: Path) -> Iterator[Example]:
    """MultiNews as its authors publish it: sources and summaries in two files, line by line."""
    head, _, tail = path.name.partition(".src")
    names = (f"{head}.tgt{tail}", f"{head}.tgt{tail.replace('.cleaned', '')}")
    other = next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)
    if other is None:
        raise CorpusError(f"{path} has its summaries in {path.with_name(names[0])}, which is not there.")
    with opened(path) as sources, opened(other) as targets:
        for number, (text, summary) in enumerate(itertools.zip_longest(sources, targets), 1):
            if text is None or summary is None:
                raise CorpusError(f"{path}, line {number}: {other.name} has another number of lines.")
            row = Fields({"document": text, "summary": summary, "id": number}, f"{path}, line {number}")
            if not text.strip():
                continue
            yield from format_of(row).read(row, Source(path))
