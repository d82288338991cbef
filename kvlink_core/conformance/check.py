"""Judge one model: the product's own path for ``reposition`` and ``link-tokens`` against the oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from kvlink_core.conformance.oracle import oracle_logits
from kvlink_core.conformance.tiny import VOCABULARY
from kvlink_core.encode import DocumentEncoder
from kvlink_core.linking import get_linker
from kvlink_core.models import LoadedModel, ModelDescription, describe_model
from kvlink_core.models.causal_lm import CausalLM
from kvlink_core.models.loader import assemble
from kvlink_core.models.spec import spec_from_config
from kvlink_core.prompt import Prompt, Segment, SegmentKind

#: DESIGN section 3: the largest difference between logits, relative to the largest logit, in float32.
TOLERANCE = 1e-5

#: Tokens generated after the prompt, each a step of decoding on the linked cache.
STEPS = 3

#: Lengths of the documents: longer than a window, a lone token, and the first one again.
DOCUMENTS = (11, 9, 1, 11)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found.

    Attributes:
        error: largest |logit difference| over largest |logit|, over all linkers and steps.
        same_tokens: whether greedy decoding chose the oracle's tokens.
        isolation: how much hiding documents from each other changes the logits, likewise relative; near zero
            would mean that the check cannot tell right from wrong.
    """

    error: float
    same_tokens: bool
    isolation: float

    @property
    def exact(self) -> bool:
        """Whether the definition of "exact" is met, by a check that could have failed."""
        return self.error <= TOLERANCE and self.same_tokens and self.isolation > 100 * TOLERANCE


def loaded(lm: CausalLM) -> LoadedModel:
    """A network without files as a loaded model; its tokenizer is borrowed."""
    config = lm.network.config
    return assemble(replace(_borrowed(), config=config, spec=spec_from_config(config), dtype=lm.dtype), lm)


@cache
def _borrowed() -> ModelDescription:
    return describe_model("embedded")


def prompt_of(documents: tuple[int, ...] = DOCUMENTS, *, links: int, seed: int = 0) -> Prompt:
    """A prompt of random tokens, laid out as DESIGN section 3 says; the last document repeats the first."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (count,), generator=draw).tolist())

    contents = [tokens(n) for n in documents[:-1]]
    runs: list[tuple[SegmentKind, tuple[int, ...], int | None]] = [("prefix", tokens(4), None)]
    runs.append(("mem_start", tokens(1), None))
    for number, content in enumerate([*contents, contents[0]]):
        runs.append(("document", content, number))
        if links:
            runs.append(("link", tokens(links), number))
    runs += [("mem_end", tokens(1), None), ("suffix", tokens(5), None)]
    segments: list[Segment] = []
    for kind, ids, place in runs:
        segments.append(Segment(kind, ids, segments[-1].end if segments else 0, place))
    return Prompt(tuple(segments))


def check(lm: CausalLM) -> Verdict:
    """Link, decode a few tokens, and compare every step with the oracle.

    Raises:
        UnsupportedModelError: the model's configuration cannot be linked.
    """
    model = loaded(lm)
    errors, same, isolation = [], True, []
    for name, links in (("reposition", 0), ("link-tokens", 2)):
        prompt = prompt_of(links=links)
        caches = DocumentEncoder(model).encode([list(s.token_ids) for s in prompt.documents])
        linked = get_linker(name).link(model, prompt, caches, reserve=STEPS)
        token_ids, positions = linked.token_ids[linked.pending], linked.pending
        generated: list[int] = []
        for step in range(STEPS):
            ours = linked.compute(token_ids, positions).cpu()
            truth = oracle_logits(lm, prompt, generated, isolate=True).cpu()
            errors.append(_relative(ours, truth))
            same = same and int(ours.argmax()) == int(truth.argmax())
            if step == 0:
                isolation.append(_relative(oracle_logits(lm, prompt, [], isolate=False).cpu(), truth))
            generated.append(int(truth.argmax()))
            token_ids, positions = torch.tensor(generated[-1:]), torch.tensor([prompt.length + step])
    return Verdict(max(errors), same, min(isolation))


def _relative(logits: torch.Tensor, truth: torch.Tensor) -> float:
    return float((logits - truth).abs().max() / truth.abs().max())
