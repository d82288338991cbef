"""``kvlink bench dtype``: is the linked path in bfloat16 and float16 as good as the same model's ordinary prefill?

Both are held against the same truth: one pass in float32 over the whole prompt, documents hidden from each other, of a
model with the very weights that the smaller dtype has, already rounded. What is left is the error of computing, not of
storing weights. Tiny random models with wide weights exaggerate it, for both alike; the ratio is what counts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import AutoModelForCausalLM

from kvlink_core.benchmark.hardware import describe_versions
from kvlink_core.conformance.check import TOLERANCE, loaded, prompt_of
from kvlink_core.conformance.oracle import oracle_logits
from kvlink_core.conformance.tiny import random_model, tiny_config
from kvlink_core.conformance.walk import quiet
from kvlink_core.encode import DocumentEncoder
from kvlink_core.linking import get_linker
from kvlink_core.models.causal_lm import CausalLM, attention_of, prepare
from kvlink_core.prompt import Prompt

#: What the ratio of errors may be at most.
BOUND = 1.5

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

#: Linkers whose oracle is the masked pass, and the link tokens after each document that they are tried with.
LINKERS = {"reposition": 0, "link-tokens": 2}

Attention = Literal["sdpa", "eager"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Errors(_Record):
    """Errors of logits against the truth, one per seed and prompt.

    Attributes:
        largest: max |difference| over max |logit|.
        rms: root mean square of the difference over that of the logits.
    """

    largest: list[float] = Field(min_length=1)
    rms: list[float] = Field(min_length=1)


class PrecisionRow(_Record):
    """One architecture in one dtype.

    Attributes:
        model_type, dtype, linker: what was measured.
        attention: of the ordinary prefill: ``sdpa``, or ``eager`` where that does not compute this model's attention.
        ordinary, linked: errors of the two, in the same order.
        ratio_largest, ratio_rms: of their medians, linked over ordinary.
    """

    model_type: str
    dtype: str
    linker: str
    attention: Attention
    ordinary: Errors
    linked: Errors
    ratio_largest: float
    ratio_rms: float

    @classmethod
    def of(cls, ordinary: Errors, linked: Errors, **fields: Any) -> PrecisionRow:
        """A row of these errors."""
        largest, rms = _ratios(ordinary, linked)
        return cls(ordinary=ordinary, linked=linked, ratio_largest=largest, ratio_rms=rms, **fields)

    @property
    def met(self) -> bool:
        """Whether both ratios are within the bound."""
        return self.ratio_largest <= BOUND and self.ratio_rms <= BOUND

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        stated, computed = (self.ratio_largest, self.ratio_rms), _ratios(self.ordinary, self.linked)
        if not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(stated, computed, strict=True)):
            raise ValueError(f"the ratios of {self.model_type!r} are {stated}, and its errors give {computed}")
        return self


class PrecisionReport(_Record):
    """A whole run of ``kvlink bench dtype``.

    Attributes:
        format: of this file.
        command, versions: what was run, on what.
        bound: what the ratios may be at most.
        seeds, prompts: random models of each architecture, and prompts for each model.
        rows: in the order asked for.
        failures: by ``architecture, dtype`` why there is no row.
    """

    format: Literal["kvlink-bench-dtype/1"]
    command: str
    versions: dict[str, str]
    bound: float
    seeds: int
    prompts: int
    rows: list[PrecisionRow]
    failures: dict[str, str]


def measure_precision(
    model_types: Sequence[str],
    dtypes: Sequence[str],
    *,
    seeds: int,
    prompts: int,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> tuple[list[PrecisionRow], dict[str, str]]:
    """Measure some architectures.

    Args:
        model_types: names of Hugging Face; those that link exactly in float32.
        dtypes: keys of ``DTYPES``.
        seeds, prompts: random models of each architecture, and random prompts for each model.
        progress: called with (what is under way, cells done, cells in all).

    Returns:
        A row for each architecture, dtype and linker; and by ``architecture, dtype`` why there is none: some
        architectures do not compute in every dtype.
    """
    rows: list[PrecisionRow] = []
    failures: dict[str, str] = {}
    cells = [(model_type, dtype) for model_type in model_types for dtype in dtypes]
    with quiet():
        for number, (model_type, dtype) in enumerate(cells):
            progress(f"{model_type}, {dtype}", number, len(cells))
            try:
                rows += _cell(model_type, dtype, seeds, prompts)
            # Broad on purpose: classes made by others fail in a dtype that they were not made for in as many ways.
            except Exception as error:
                failures[f"{model_type}, {dtype}"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    progress("", len(cells), len(cells))
    return rows, failures


def precision_report(
    rows: Sequence[PrecisionRow], failures: Mapping[str, str], *, seeds: int, prompts: int, command: str
) -> PrecisionReport:
    """The report of what ``measure_precision`` returned."""
    return PrecisionReport(
        format="kvlink-bench-dtype/1",
        command=command,
        versions=describe_versions(),
        bound=BOUND,
        seeds=seeds,
        prompts=prompts,
        rows=list(rows),
        failures=dict(failures),
    )


def _cell(model_type: str, dtype: str, seeds: int, prompts: int) -> list[PrecisionRow]:
    found: dict[str, tuple[list[tuple[float, float]], list[tuple[float, float]]]] = {n: ([], []) for n in LINKERS}
    attention: Attention = "sdpa"
    for seed in range(seeds):
        small, exact = rounded_pair(model_type, DTYPES[dtype], seed)
        attention = _attention(exact)
        for linker, links in LINKERS.items():
            ordinary, linked = found[linker]
            for number in range(prompts):
                prompt = prompt_of(links=links, seed=1000 * seed + number)
                truth = oracle_logits(exact, prompt, [], isolate=True)
                usual = oracle_logits(small, prompt, [], isolate=True, attention=attention)
                ordinary.append(errors_of(usual, truth))
                linked.append(errors_of(linked_logits(small, linker, prompt), truth))
    return [
        PrecisionRow.of(
            *(Errors(largest=[e[0] for e in errors], rms=[e[1] for e in errors]) for errors in pairs),
            model_type=model_type,
            dtype=dtype,
            linker=linker,
            attention=attention,
        )
        for linker, pairs in found.items()
    ]


def rounded_pair(model_type: str, dtype: torch.dtype, seed: int) -> tuple[CausalLM, CausalLM]:
    """A tiny random model in ``dtype``, and one in float32 with its very weights."""
    weights = random_model(tiny_config(model_type), seed=seed).network.state_dict()
    small = _with_weights(model_type, dtype, weights)
    return small, _with_weights(model_type, torch.float32, small.network.state_dict())


def _with_weights(model_type: str, dtype: torch.dtype, weights: Mapping[str, torch.Tensor]) -> CausalLM:
    config = tiny_config(model_type)  # of its own: transformers notes dtype and attention in it
    attention, masking = attention_of(config)
    network = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    network.load_state_dict(weights)
    return prepare(network, masking)


def linked_logits(lm: CausalLM, linker: str, prompt: Prompt) -> torch.Tensor:
    """Float32 logits ``[vocabulary]`` after the prompt, by the product's own path."""
    model = loaded(lm)
    caches = DocumentEncoder(model).encode([list(s.token_ids) for s in prompt.documents])
    linked = get_linker(linker).link(model, prompt, caches, reserve=1)
    return linked.compute(linked.token_ids[linked.pending], linked.pending)


def _attention(lm: CausalLM) -> Attention:
    """What the ordinary prefill attends by: ``sdpa``, unless that leaves out something that this model needs."""
    prompt = prompt_of(links=0)
    eager = oracle_logits(lm, prompt, [], isolate=True)
    try:
        fused = oracle_logits(lm, prompt, [], isolate=True, attention="sdpa")
    except ValueError:  # transformers refuses what it knows sdpa to lack
        return "eager"
    largest, _ = errors_of(fused, eager)
    return "sdpa" if largest <= TOLERANCE else "eager"


def errors_of(logits: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """The two measures of ``Errors``."""
    off, truth = (logits - truth).double(), truth.double()
    return float(off.abs().max() / truth.abs().max()), float(off.square().mean().sqrt() / truth.square().mean().sqrt())


def _ratios(ordinary: Errors, linked: Errors) -> tuple[float, float]:
    def ratio(of: Sequence[float], over: Sequence[float]) -> float:
        return statistics.median(of) / statistics.median(over)

    return ratio(linked.largest, ordinary.largest), ratio(linked.rms, ordinary.rms)
