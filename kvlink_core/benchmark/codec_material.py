"""What codecs are tried on: documents, and prompts over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvlink_core.evaluation.worlds import held_out
from kvlink_core.linking import Linker, get_linker
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Prompt, Segment
from kvlink_core.training.worlds import Question
from kvlink_core.types import Document, Message


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt over some documents: its linker, and the question to be graded or the continuation to be followed."""

    prompt: Prompt
    linker: Linker
    question: Question | None = None
    continuation: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """Documents, as token ids, that prompts stand on together, and these prompts."""

    documents: Sequence[Sequence[int]]
    cases: Sequence[Case]


@dataclass(frozen=True, slots=True)
class Material:
    """Groups of documents and prompts.

    Attributes:
        name: for tables.
        what: a few words on where it comes from.
    """

    name: str
    what: str
    groups: Sequence[Group] = field(repr=False)

    @property
    def prompts(self) -> int:
        """Prompts in all."""
        return sum(len(group.cases) for group in self.groups)

    @property
    def description(self) -> str:
        """A sentence for tables."""
        lengths = [len(document) for group in self.groups for document in group.documents]
        mean = sum(lengths) / len(lengths)
        return f"{self.what}: {self.prompts:,} prompts, {len(lengths):,} documents of {mean:.0f} tokens on average"


def passages(model: LoadedModel, questions: int) -> Material:
    """Held-out questions over their world's passages, each a document of its own, with the model's default linker."""
    groups = []
    linker = get_linker(model.default_linker)
    for world, asked in held_out(questions):
        documents = [model.layout.document_tokens(Document(str(i), p), i) for i, p in enumerate(world.passages)]
        groups.append(Group(documents, [_asked(model, linker, documents, q) for q in asked]))
    return Material("passages", "held-out questions, each passage a document", groups)


def long_documents(model: LoadedModel, questions: int, tokens: int) -> Material:
    """The same questions, the passages of several worlds joined to one document of up to ``tokens`` tokens.

    A world that is longer by itself stays whole.
    """
    joined: list[tuple[list[int], list[Question]]] = []
    for world, asked in held_out(questions):
        text = [t for i, p in enumerate(world.passages) for t in model.layout.document_tokens(Document(str(i), p), i)]
        if not joined or len(joined[-1][0]) + len(text) > tokens:
            joined.append(([], []))
        joined[-1][0].extend(text)
        joined[-1][1].extend(asked)
    linker = get_linker("reposition")
    groups = [Group([document], [_asked(model, linker, [document], q) for q in asked]) for document, asked in joined]
    return Material("long documents", "the same questions, several worlds in one document", groups)


def own_text(model: LoadedModel, count: int, tokens: int, following: int) -> Material:
    """Texts that the model draws itself, seeded: ``tokens`` of a document, then ``following`` to be followed."""
    linker = get_linker("reposition")
    groups = []
    for text in _drawn(model, count, tokens + following):
        document, rest = text[:tokens], text[tokens:]
        prompt = Prompt((Segment("document", tuple(document), 0, 0), Segment("suffix", (rest[0],), tokens, None)))
        groups.append(Group([document], [Case(prompt, linker, None, rest[1:])]))
    return Material("own text", "text that the model drew itself", groups)


def _asked(model: LoadedModel, linker: Linker, documents: Sequence[Sequence[int]], question: Question) -> Case:
    links = linker.links(model.layout)
    return Case(model.layout.build([Message("user", question.question)], documents, links=links), linker, question)


@torch.inference_mode()
def _drawn(model: LoadedModel, count: int, length: int) -> list[list[int]]:
    """Token ids ``[count][length]``; no text ends early."""
    draw = torch.Generator().manual_seed(0)
    begin = model.network.generation_config.bos_token_id
    ids = torch.full((count, 1), begin if isinstance(begin, int) else 0)
    texts, past = [ids], None
    while len(texts) < length:
        output = model.network(input_ids=ids.to(model.device), past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits = output.logits[:, -1].float().cpu()
        logits[:, sorted(model.stop_ids)] = -torch.inf
        ids = torch.multinomial(logits.softmax(1), 1, generator=draw)
        texts.append(ids)
    drawn: list[list[int]] = torch.cat(texts, dim=1).tolist()
    return drawn
