"""What the tests of linkers share: prompts, a run of the product, a comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvlink_core.encode import DocumentEncoder
from kvlink_core.linking import LinkedCache, get_linker
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Prompt
from kvlink_core.types import Message

_DRAW = torch.Generator().manual_seed(0)


def tokens(count: int) -> list[int]:
    """Token ids of bytes, drawn anew with each call."""
    return torch.randint(32, 127, (count,), generator=_DRAW).tolist()


#: Longer than EPIC's k and shorter, longer than windows and shorter, a lone token, and one of them twice.
_FIRST = tokens(23)
DOCUMENTS = (_FIRST, tokens(11), tokens(1), _FIRST, tokens(4))

#: So short that through windows of 7 and 9 tokens there is something of documents to be seen.
QUESTION = (Message("user", "?"),)


def prompt_for(model: LoadedModel, spec: str, documents: Sequence[Sequence[int]] = DOCUMENTS) -> Prompt:
    """The prompt that a linker wants."""
    return model.layout.build(QUESTION, documents, links=get_linker(spec).links(model.layout))


def linked_by(model: LoadedModel, spec: str, prompt: Prompt, *, reserve: int = 0) -> LinkedCache:
    """The prompt, linked."""
    linker = get_linker(spec)
    documents = [list(s.token_ids) for s in prompt.documents] if linker.uses_caches else []
    return linker.link(model, prompt, DocumentEncoder(model, max_batch_tokens=256).encode(documents), reserve=reserve)


def follow(linked: LinkedCache, expected: tuple[list[int], list[torch.Tensor]]) -> None:
    """Generate greedily beside an oracle: the same tokens, and logits within 1e-5 of the largest."""
    token_ids, positions = linked.token_ids[linked.pending], linked.pending
    for step, (token, truth) in enumerate(zip(*expected, strict=True)):
        logits = linked.compute(token_ids, positions)
        assert difference(logits, truth) <= 1e-5
        assert int(logits.argmax()) == token
        token_ids, positions = torch.tensor([token]), torch.tensor([linked.prompt.length + step])


def logits_of(linked: LinkedCache) -> torch.Tensor:
    """Logits after the prompt."""
    return linked.compute(linked.token_ids[linked.pending], linked.pending)


def difference(logits: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return float((logits - truth).abs().max() / truth.abs().max())
