"""One cell's answer to one question: how far its distributions are from those of ``full``, and what it says itself.

Both come of one walk. The cell is led along given tokens (teacher forcing), and its distribution is taken before each;
up to the first place where it would choose another token, that is also its own greedy answer, which goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvlink_core.linking import LinkedCache

Now = Callable[[], float]

_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Walk:
    """What was seen on the way.

    Attributes:
        logits: float32 ``[tokens, vocabulary]``, before each token that was followed.
        followed: these tokens; the last may be one that ends an answer.
        token_ids: the greedy answer, without the token that ended it; ``None`` where none was wanted.
        first_s: seconds from the start of the walk to the first token.
    """

    logits: torch.Tensor
    followed: tuple[int, ...]
    token_ids: tuple[int, ...] | None
    first_s: float


@dataclass(frozen=True, slots=True)
class Closeness:
    """How a walk compares with that of ``full`` along the same tokens.

    Attributes:
        kl: KL divergence of the cell's distribution from ``full``'s, in nats, the mean over tokens.
        top1: share of tokens at which both find the same token the most likely.
        nll: negative log likelihood of the tokens under the cell, in nats, the mean over tokens.
        tokens: how many.
    """

    kl: float
    top1: float
    nll: float
    tokens: int


def greedy(linked: LinkedCache, *, max_tokens: int, stop_ids: frozenset[int], now: Now = time.perf_counter) -> Walk:
    """Answer freely. The logits are those before each token of the answer, the one that ends it included."""
    started = now()
    pending = linked.pending
    logits = [linked.compute(linked.token_ids[pending], pending)]
    chosen = [int(logits[0].argmax())]
    first_s = now() - started
    while chosen[-1] not in stop_ids and len(chosen) < max_tokens:
        logits.append(_step(linked, len(chosen) - 1, chosen[-1]))
        chosen.append(int(logits[-1].argmax()))
    return Walk(torch.stack(logits), tuple(chosen), _without_end(chosen, stop_ids), first_s)


def follow(
    linked: LinkedCache,
    token_ids: Sequence[int],
    *,
    answer: bool,
    max_tokens: int,
    stop_ids: frozenset[int],
    now: Now = time.perf_counter,
) -> Walk:
    """Follow ``token_ids``, then answer freely from where it would have gone another way.

    Args:
        linked: freshly linked, with slots for ``max_tokens`` and for all that is followed.
        token_ids: at least one; may end with one of ``stop_ids``.
        answer: whether the cell's own answer is wanted.
        max_tokens, stop_ids: as for the answer of ``full``.
        now: a clock whose device has finished its work.
    """
    started = now()
    pending = linked.pending
    logits = [linked.compute(linked.token_ids[pending], pending)]
    chosen = [int(logits[0].argmax())]
    first_s = now() - started
    for at, token in enumerate(token_ids[:-1]):
        logits.append(_step(linked, at, token))
        chosen.append(int(logits[-1].argmax()))
    stacked = torch.stack(logits)
    if not answer:
        return Walk(stacked, tuple(token_ids), None, first_s)
    own = []
    for token, given in zip(chosen, token_ids, strict=True):
        own.append(token)
        if token != given or token in stop_ids:
            break
    own = own[:max_tokens]
    while own[-1] not in stop_ids and len(own) < max_tokens:
        # What was followed beyond this place stands in later slots, which are written anew before they are read.
        own.append(int(_step(linked, len(own) - 1, own[-1]).argmax()))
    return Walk(stacked, tuple(token_ids), _without_end(own, stop_ids), first_s)


def _step(linked: LinkedCache, at: int, token: int) -> torch.Tensor:
    """Logits after the answer's token number ``at``."""
    return linked.compute(torch.tensor([token]), torch.tensor([linked.prompt.length + at]))


def _without_end(chosen: Sequence[int], stop_ids: frozenset[int]) -> tuple[int, ...]:
    return tuple(chosen[:-1] if chosen[-1] in stop_ids else chosen)


def closeness(found: torch.Tensor, full: torch.Tensor, token_ids: Sequence[int]) -> Closeness:
    """Compare distributions, given as logits.

    Args:
        found, full: ``[tokens, vocabulary]``, of the cell and of ``full``, before each token.
        token_ids: what was followed.
    """
    divergence = likelihood = agreed = 0.0
    followed = torch.as_tensor(token_ids, device=found.device)
    # Some tokens at a time: in float64 a vocabulary of 128,000 is 1 MB a token, several times over.
    for start in range(0, len(token_ids), _AT_ONCE):
        p_logits, q_logits, tokens = (each[start : start + _AT_ONCE] for each in (full, found, followed))
        log_p, log_q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
        p = log_p.exp()
        # A token that full rules out altogether (a logit of -inf) adds nothing, whatever the cell thinks of it.
        divergence += float(torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum())
        likelihood += float(log_q.gather(1, tokens[:, None]).sum())
        agreed += float((q_logits.argmax(-1) == p_logits.argmax(-1)).sum())
    count = len(token_ids)
    # Rounding can leave less than nothing of two equal distributions.
    return Closeness(kl=max(0.0, divergence / count), top1=agreed / count, nll=-likelihood / count, tokens=count)
