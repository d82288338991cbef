"""``kvlink eval run``: every question under every cell, written as it comes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from kvlink_core.errors import ConfigError
from kvlink_core.evaluation.asking import Asked, Asking, Skipped
from kvlink_core.evaluation.encodings import BYTES_PER_TOKEN_ID
from kvlink_core.evaluation.examples import Dataset, Example
from kvlink_core.evaluation.grid import Contender
from kvlink_core.evaluation.metrics import check_metrics
from kvlink_core.evaluation.records import DataUsed, ModelUsed, RunConfig, RunDirectory
from kvlink_core.models import load_model

#: The system text with which the paper's own evaluation begins (arXiv 2502.16002, its published code).
PAPER_SYSTEM = (
    "You are a intelligent AI assistant. Please answer questions based on the user's instruction. "
    "Below are some reference documents that may help you in answering the user's question."
)

#: The paper's prompt has the question as it is in the user's turn.
PAPER_TEMPLATE = "{question}"

#: The paper's limit on an answer.
PAPER_MAX_TOKENS = 200

#: Questions whose documents are planned together: until they have so many tokens.
_WINDOW_TOKENS = 8192

#: Called with a model's label, questions done and questions in all, of all models.
Progress = Callable[[str, int, int], None]


def make_config(
    models: Sequence[Contender],
    datasets: Sequence[Dataset],
    *,
    linkers: Sequence[str] | None,
    codecs: Sequence[str],
    template: str = PAPER_TEMPLATE,
    system: str | None = None,
    max_tokens: int = PAPER_MAX_TOKENS,
    follow: str = "full",
    device: str = "cpu",
    dtype: str | None = None,
) -> RunConfig:
    """All that answers depend on, checked.

    Args:
        models: from ``contenders``.
        datasets: with different names.
        linkers, codecs: as they were asked for; ``None`` for all linkers.
        template: of the question.
        system: ``None`` for the paper's, or none for generated worlds, where nothing was trained with one.
        max_tokens: of an answer.
        follow: ``full`` or ``reference``.
        device, dtype: as for ``load_model``.

    Raises:
        ConfigError: two data sets of one name, a template without its question, answers that cannot be scored.
    """
    names = [dataset.name for dataset in datasets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two data sets are called {twice[0]!r}; name one with --data NAME=FILE.", param="data")
    if template.count("{question}") != 1:
        raise ConfigError("a template has {question} in it, once.", param="template")
    if follow not in ("full", "reference"):
        raise ConfigError(f"what is followed is 'full' or 'reference', not {follow!r}.", param="follow")
    for dataset in datasets:
        check_metrics(dataset.examples[0].task)
    return RunConfig(
        models=tuple(ModelUsed(source=m.source, label=m.label, digest=m.digest) for m in models),
        data=tuple(
            DataUsed(name=d.name, task=d.examples[0].task, questions=len(d.examples), digest=_digest(d))
            for d in datasets
        ),
        linkers=tuple(linkers or ("all",)),
        codecs=tuple(codecs),
        cells=tuple((cell.model, cell.linker, cell.codec) for model in models for cell in model.cells),
        template=template,
        system={d.name: _system(d) if system is None else system for d in datasets},
        max_tokens=max_tokens,
        follow="full" if follow == "full" else "reference",
        device=device,
        dtype=dtype,
    )


def _system(dataset: Dataset) -> str:
    return "" if dataset.generated else PAPER_SYSTEM


def _digest(dataset: Dataset) -> str:
    found = hashlib.sha256()
    for example in dataset.examples:
        found.update(json.dumps(asdict(example)).encode())
    return found.hexdigest()[:16]


def run(
    directory: RunDirectory,
    models: Sequence[Contender],
    datasets: Sequence[Dataset],
    *,
    memory_bytes: int,
    progress: Progress = lambda label, done, total: None,
) -> None:
    """Ask what has not been asked yet; every question is on disk before the next is asked.

    Args:
        directory: entered, made for these models and data sets.
        models, datasets: as for ``make_config``.
        memory_bytes: for document caches that are kept from question to question.
        progress: told of every question.

    Raises:
        KVLinkError: a model that cannot be loaded, or a linker that it cannot run after all.
    """
    config = directory.config
    questions = [(dataset.name, example) for dataset in datasets for example in dataset.examples]
    total = len(models) * len(questions)
    done = sum(len(each) for each in directory.done.values())
    for model in models:
        there = directory.done.get(model.label, set())
        progress(model.label, done, total)
        if len(there) == len(questions):
            continue
        loaded = load_model(model.source, device=config.device, dtype=config.dtype)
        asking = Asking(loaded, model.cells, config, memory_bytes=memory_bytes)
        for window in _windows(asking, questions):
            asking.plan([d for asked in window if isinstance(asked, Asked) for d in asked.documents])
            for asked in window:
                if (asked.dataset, asked.example.id) not in there:
                    directory.append(asking.rows(asked))
                    done += 1
                    progress(model.label, done, total)


def _windows(asking: Asking, questions: Sequence[tuple[str, Example]]) -> Iterator[list[Asked | Skipped]]:
    """Questions laid out, some at a time. Where a window ends depends on the data alone."""
    window: list[Asked | Skipped] = []
    tokens = 0
    for dataset, example in questions:
        asked = asking.lay_out(dataset, example)
        window.append(asked)
        if isinstance(asked, Asked):
            tokens += sum(len(each) for each in asked.documents) // BYTES_PER_TOKEN_ID
        if tokens >= _WINDOW_TOKENS:
            yield window
            window, tokens = [], 0
    yield window
