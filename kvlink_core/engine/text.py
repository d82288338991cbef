"""From tokens to text that can be sent: whole UTF-8 characters only, and nothing that may belong to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from kvlink_core.prompt import PromptLayout


class TextStream:
    """Turns one answer's tokens into pieces of text.

    The pieces of one answer, joined, are the decoded answer up to the first stop string.
    """

    def __init__(self, layout: PromptLayout, stop: Sequence[str]) -> None:
        self._layout = layout
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        self._step = layout.decode_stream()
        self._decoded = ""
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now certain, often "". Sets ``stopped`` at a stop string."""
        self._token_ids.append(token_id)
        piece = self._step(token_id)
        return self._release(piece) if piece else ""

    def finish(self) -> str:
        """No more tokens: whatever was held back, bytes that never became a character as U+FFFD."""
        if self.stopped:
            return ""
        rest = self._layout.decode(self._token_ids)[len(self._decoded) :]
        return self._release(rest) + ("" if self.stopped else self._take_held())

    def _take_held(self) -> str:
        held, self._held = self._held, ""
        return held

    def _release(self, piece: str) -> str:
        self._decoded += piece
        text = self._take_held() + piece
        hits = [at for s in self._stop if (at := text.find(s)) >= 0]
        if hits:
            self.stopped = True
            return text[: min(hits)]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ends ``text``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
