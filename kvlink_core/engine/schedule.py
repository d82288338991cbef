"""How many tokens a step computes, and whose."""

from __future__ import annotations

from collections.abc import Sequence

#: How much of a new measurement goes into an average.
_NEW = 0.2

#: Tokens of prompts that a step may always compute: less would cost more than it spares.
_LEAST = 16


class Pace:
    """How many tokens of prompts and documents go with a decode step, so that it does not take too long.

    Requests that wait for their next token should not notice that others are being prefilled. What a step with nothing
    but decoding takes, and what a token of a prompt adds, is measured as steps are made.

    Args:
        step_tokens: the most tokens of one step.
        stretch: how many times as long as one without, a step with prefill may take; ``None`` for any.
    """

    def __init__(self, step_tokens: int, stretch: float | None) -> None:
        self._step_tokens = step_tokens
        self._stretch = stretch
        self._step_s: float | None = None  # with one token for each request that decodes
        self._token_s: float | None = None  # for each token of a prompt
        self._guessed = True  # no step that only decodes was seen yet

    def prefill(self, decoding: int, waiting: int) -> int:
        """Tokens of prompts and documents for a step in which ``decoding`` requests decode.

        Where more are ``waiting`` for their first token than decode, their prompts come first: a few at a time they
        would be computed slower, beside steps that are nearly as long for a few as for all.
        """
        room = max(1, self._step_tokens - decoding)
        if waiting > decoding or self._stretch is None:
            return room
        if self._step_s is None or self._token_s is None:
            return min(room, _LEAST)
        return min(room, max(_LEAST, int((self._stretch - 1) * self._step_s / self._token_s)))

    def note(self, seconds: float, *, decoding: int, prefilled: int) -> None:
        """A step took so long."""
        if not prefilled:
            self._step_s = seconds if self._guessed else _mixed(self._step_s, seconds)
            self._guessed = False
        elif not decoding:
            self._token_s = _mixed(self._token_s, seconds / prefilled)
        elif self._guessed:
            rest = seconds - prefilled * (self._token_s or 0.0)
            self._step_s = _mixed(self._step_s, max(rest, seconds / 10))
        else:
            rest = seconds - (self._step_s or 0.0)
            self._token_s = _mixed(self._token_s, max(rest, seconds / 10) / prefilled)


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else (1 - _NEW) * old + _NEW * new


def share(budget: int, remaining: Sequence[int]) -> list[int]:
    """Divide a step's tokens among those that want some.

    Half of them are the oldest's, so that it makes progress whatever comes; the rest goes to those that need least to
    be done, so that a short question does not wait for a long document.

    Args:
        budget: tokens to give.
        remaining: what each wants, the oldest first.

    Returns:
        What each gets.
    """
    given = [0] * len(remaining)
    if not remaining:
        return given
    given[0] = min(remaining[0], -(-budget // 2))
    budget -= given[0]
    for i in sorted(range(len(remaining)), key=lambda i: (remaining[i] - given[i], i)):
        more = min(remaining[i] - given[i], budget)
        given[i] += more
        budget -= more
    return given
