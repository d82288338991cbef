"""Long documents become chunks: at most ``limit`` tokens each, cut at sentence borders, with stable ids.

Pure text in, pure text out. The caller says how tokens are counted, so that whatever its template puts around
a text (a title, line ends) counts against the limit as well. The same text, limit and tokenizer always give
the same chunks, and so the same ids.

A chunk ends, in this order of preference: at the end of a sentence (or paragraph, or list item); where a
single sentence is longer than the limit, at the end of a word; where a single word is, after the last
character whose tokens still fit.
"""

# ruff: noqa: RUF001  (the punctuation of other scripts is meant)

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from kvlink_core.errors import CorpusError, EmptyDocumentError

CountTokens = Callable[[str], int]

#: Between the id of a document and the number of its chunk.
CHUNK_SEPARATOR = "#"

_SENTENCE_END = re.compile(
    r"""
      (?P<stop>[.!?…]+)["'”’»)\]*_]*\s+            # a full stop, perhaps inside quotes, then a space
    | [。！？｡]+[」』”’）)]*\s*                        # scripts that put no space after a full stop
    | \n[^\S\n]*\n\s*                               # an empty line
    | \n(?=[^\S\n]*(?:[-*+•#>|]|\d{1,3}[.)])\s)     # the next line is a list item, heading, table row
    """,
    re.VERBOSE,
)

#: A full stop after one of these does not end a sentence. Missing a border only makes a sentence longer.
_ABBREVIATIONS = frozenset(
    re.findall(
        r"[a-z.]+",
        "mr mrs ms dr prof rev hon sr jr st gen col lt sgt capt cmdr adm gov sen rep pres vs etc cf al fig figs eq "
        "eqs no nos vol pp ed eds ch sec dept univ inc ltd co corp bros approx est ca jan feb mar apr jun jul aug sep "
        "sept oct nov dec mt ft e.g i.e a.m p.m u.s u.k u.n ph.d b.c a.d",
    )
)
_INITIALS = re.compile(r"(?:\w\.)*[A-Z]")
_WORD = re.compile(r"\s*\S+\s*")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document that is encoded on its own.

    ``text`` is ``document[start:end]``. ``id`` is the document's id where the document is one chunk, else
    ``"{document id}#{index}"``.
    """

    id: str
    text: str
    index: int
    start: int
    end: int


def chunk_document(document_id: str, text: str, *, limit: int, count_tokens: CountTokens) -> list[Chunk]:
    """Split a text into chunks of at most ``limit`` tokens.

    Args:
        document_id: the document's id.
        text: the whole text.
        limit: the most tokens that ``count_tokens`` may say of a chunk's text.
        count_tokens: tokens of a text as it will be encoded, with all that is put around it.

    Returns:
        At least one chunk, in order. A text within the limit is one chunk, unchanged. Of a longer one every
        character is in exactly one chunk, save white space at the cuts.

    Raises:
        EmptyDocumentError: the text is empty or only white space.
        CorpusError: the limit has no room for a single character (a title longer than the limit, say).
    """
    if not text.strip():
        raise EmptyDocumentError(f"document {document_id!r} has no text.")
    if count_tokens(text) <= limit:
        return [Chunk(document_id, text, 0, 0, len(text))]
    return [
        Chunk(f"{document_id}{CHUNK_SEPARATOR}{i}", text[start:end], i, start, end)
        for i, (start, end) in enumerate(_pack(document_id, text, limit, count_tokens))
    ]


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text are: adjoining spans that cover all of it."""
    spans, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        if match["stop"] and not _ends_sentence(text, match):
            continue
        spans.append((start, match.end()))
        start = match.end()
    if start < len(text):
        spans.append((start, len(text)))
    return spans


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    following = text[match.end() : match.end() + 1]
    if following.islower():
        return False
    if match["stop"] != ".":
        return True
    before = text[max(0, match.start() - 24) : match.start()].split()
    word = before[-1].lstrip("\"'“‘«([*_") if before else ""
    return word.lower() not in _ABBREVIATIONS and not _INITIALS.fullmatch(word)


def _pack(document_id: str, text: str, limit: int, count_tokens: CountTokens) -> list[tuple[int, int]]:
    """Spans of the chunks: as many whole sentences as fit, then the next chunk."""

    def fits(start: int, end: int) -> bool:
        piece = text[start:end].strip()
        return not piece or count_tokens(piece) <= limit

    chunks: list[tuple[int, int]] = []
    # Sentences, some of them replaced by their words on the way, in reverse: the next one is the last.
    pieces = sentence_spans(text)[::-1]
    taken = 1
    while pieces:
        start, end = pieces[-1]
        if fits(start, end):
            taken = _longest(lambda n, s=start: fits(s, pieces[-n][1]), len(pieces), taken)  # type: ignore[misc]
            end = pieces[-taken][1]
            del pieces[-taken:]
        elif len(words := [m.span() for m in _WORD.finditer(text, start, end)]) > 1:
            pieces[-1:] = words[::-1]
            taken = 1
            continue
        else:
            end = _cut_word(document_id, text, start, end, fits, limit)
            pieces[-1] = (end, pieces[-1][1])
        span = _strip(text, start, end)
        if span[0] < span[1]:
            chunks.append(span)
    return chunks


def _cut_word(document_id: str, text: str, start: int, end: int, fits: Callable[[int, int], bool], limit: int) -> int:
    """Where to cut a word that is longer than the limit: after the most characters that fit."""
    start, end = _strip(text, start, end)
    if not fits(start, start + 1):
        raise CorpusError(
            f"document {document_id!r}: a chunk of {limit} tokens has no room for text beside the document's "
            "title and template. Shorten the title or raise the chunk limit."
        )
    cut = start + _longest(lambda n: fits(start, start + n), end - start, limit)
    # A letter and the marks that combine with it stay together, unless nothing else would be left.
    safe = cut
    while safe > start and safe < end and (unicodedata.combining(text[safe]) or text[safe] in "\u200d\ufe0f"):
        safe -= 1
    return safe if safe > start else cut


def _longest(fits: Callable[[int], bool], most: int, guess: int) -> int:
    """The largest ``n`` in ``1..most`` that fits, given that 1 does.

    Doubles from the guess, then halves, so that no text much longer than what fits is ever counted. Where
    counts do not quite grow with length (they may shrink by a token when a cut word is completed), the result
    still fits; it may be one short of the largest.
    """
    fitting, too_many = 1, most + 1
    probe = min(max(guess, 2), most)
    while fitting < probe < too_many:
        if fits(probe):
            fitting, probe = probe, min(2 * probe, most)
        else:
            too_many = probe
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if fits(middle):
            fitting = middle
        else:
            too_many = middle
    return fitting


def _strip(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without white space at its ends."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end
