"""What a codec costs in quality: the same prompts over decoded caches as over the caches that were encoded.

Caches are stored in bfloat16, as most models make them, whatever the model computes in; the reference reads the same
bfloat16 caches, so that all that shows is the codec. Every prompt is linked and prefilled as a request would be, then
follows the reference's own greedy answer (or a given continuation) token by token, so that distributions are compared
at the same places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from kvlink_core.compress import Codec, EncodedDocument, pruning_of
from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine import Generation, SamplingParams
from kvlink_core.evaluation.worlds import MAX_ANSWER_TOKENS, held_out
from kvlink_core.linking import Linker, get_linker
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Prompt, Segment
from kvlink_core.training.worlds import Question
from kvlink_core.types import Document, DocumentCache, Message

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Tally:
    """What was seen of one codec so far. Errors are sums of squares, of the error and of what it is held against."""

    documents: int = 0
    tokens: int = 0
    stored_bytes: int = 0
    keys: tuple[float, float] = (0.0, 0.0)
    values: tuple[float, float] = (0.0, 0.0)
    logits: tuple[float, float] = (0.0, 0.0)
    divergence: float = 0.0
    steps: int = 0
    same_choices: int = 0
    questions: int = 0
    right: int = 0

    def add_document(self, encoded: EncodedDocument, cache: DocumentCache, decoded: DocumentCache) -> None:
        """Count one document's bytes and errors, those of a pruned one over what is left of it."""
        self.documents += 1
        self.tokens += cache.tokens
        self.stored_bytes += sum(column.data.numel() for column in encoded.columns.values())
        self.keys = _added(self.keys, decoded.keys, cache.keys)
        self.values = _added(self.values, decoded.values, cache.values)

    def add_step(self, found: torch.Tensor, reference: torch.Tensor) -> None:
        """Count one next-token distribution, from its logits and the reference's, float32 ``[vocabulary]``."""
        self.logits = _added(self.logits, found, reference)
        wanted = reference.double().log_softmax(0)
        self.divergence += float((wanted.exp() * (wanted - found.double().log_softmax(0))).sum())
        self.steps += 1
        self.same_choices += int(found.argmax() == reference.argmax())


def relative(sums: tuple[float, float]) -> float:
    """The relative root mean square error."""
    return math.sqrt(sums[0] / sums[1]) if sums[1] else 0.0


def _added(sums: tuple[float, float], found: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    wanted = reference.double()
    return sums[0] + float((found.double() - wanted).square().sum()), sums[1] + float(wanted.square().sum())


@dataclass(frozen=True, slots=True)
class _Case:
    """A prompt over some documents: its linker, and the answer that is graded or the continuation that is followed."""

    prompt: Prompt
    linker: Linker
    question: Question | None = None
    continuation: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Material:
    """Documents as token ids, each group with the prompts over it.

    Attributes:
        name, description: for tables.
        groups: documents that prompts stand on together, and these prompts.
    """

    name: str
    description: str
    groups: Sequence[tuple[Sequence[Sequence[int]], Sequence[_Case]]] = field(repr=False)

    @property
    def prompts(self) -> int:
        """Prompts in all."""
        return sum(len(cases) for _, cases in self.groups)


def passages(model: LoadedModel, questions: int) -> Material:
    """Held-out questions over their world's passages, each a document of its own, with the model's default linker."""
    groups = []
    linker = get_linker(model.default_linker)
    for world, asked in held_out(questions):
        documents = [model.layout.document_tokens(Document(str(i), p), i) for i, p in enumerate(world.passages)]
        groups.append((documents, [_asked(model, linker, documents, q) for q in asked]))
    return Material("passages", _described("held-out questions over passages", groups), groups)


def long_documents(model: LoadedModel, questions: int, tokens: int) -> Material:
    """The same questions, the passages of several worlds joined to one document of up to ``tokens`` tokens."""
    joined: list[tuple[list[int], list[Question]]] = []
    for world, asked in held_out(questions):
        text = [t for i, p in enumerate(world.passages) for t in model.layout.document_tokens(Document(str(i), p), i)]
        if not joined or len(joined[-1][0]) + len(text) > tokens:
            joined.append(([], []))
        joined[-1][0].extend(text)
        joined[-1][1].extend(asked)
    linker = get_linker("reposition")
    groups = [([document], [_asked(model, linker, [document], q) for q in asked]) for document, asked in joined]
    return Material("long", _described("the same questions, several worlds in one document", groups), groups)


def own_text(model: LoadedModel, count: int, tokens: int, following: int) -> Material:
    """Texts that the model draws itself, seeded: ``tokens`` of a document, then ``following`` to be followed."""
    linker = get_linker("reposition")
    groups = []
    for seed in range(count):
        text = _drawn(model, seed, tokens + following)
        document, rest = text[:tokens], text[tokens:]
        prompt = Prompt((Segment("document", tuple(document), 0, 0), Segment("suffix", (rest[0],), tokens, None)))
        groups.append(([document], [_Case(prompt, linker, None, rest[1:])]))
    return Material("own text", _described("the model's own text", groups), groups)


def _described(what: str, groups: Sequence[tuple[Sequence[Sequence[int]], Sequence[_Case]]]) -> str:
    lengths = [len(document) for documents, _ in groups for document in documents]
    prompts = sum(len(cases) for _, cases in groups)
    return f"{what}: {prompts} prompts, {len(lengths)} documents of {sum(lengths) / len(lengths):.0f} tokens on average"


def _asked(model: LoadedModel, linker: Linker, documents: Sequence[Sequence[int]], question: Question) -> _Case:
    links = linker.links(model.layout)
    return _Case(model.layout.build([Message("user", question.question)], documents, links=links), linker, question)


def _drawn(model: LoadedModel, seed: int, length: int) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    begin = model.network.generation_config.bos_token_id
    text = [begin if isinstance(begin, int) else 0]
    ids = torch.tensor([text], device=model.device)
    with torch.inference_mode():
        past = None
        while len(text) < length:
            output = model.network(input_ids=ids, past_key_values=past, use_cache=True)
            past = output.past_key_values
            chances = output.logits[0, -1].float().cpu().softmax(0)
            text.append(int(torch.multinomial(chances, 1, generator=draw)))
            ids = torch.tensor([text[-1:]], device=model.device)
    return text


def compare(
    model: LoadedModel, material: Material, codecs: Mapping[str, Codec], progress: Progress = lambda done, total: None
) -> dict[str, Tally]:
    """Run ``material`` over the caches of every codec.

    Args:
        model: computes; the caches that it makes are stored in bfloat16.
        material: made with this model.
        codecs: by the name under which the result is wanted.
        progress: called with prompts done and prompts in all.
    """
    tallies = {name: Tally() for name in codecs}
    encoder = DocumentEncoder(model)
    done = 0
    for documents, cases in material.groups:
        caches = [_as(cache, torch.bfloat16) for cache in encoder.encode(documents)]
        loaded = {}
        for name, codec in codecs.items():
            prune = pruning_of(codec)
            given = caches
            if prune is not None:
                given = [_as(c, torch.bfloat16) for c in DocumentEncoder(model, prune=prune).encode(documents)]
            encoded = [codec.encode(cache) for cache in given]
            decoded = [codec.decode(document, model.device) for document in encoded]
            for each in zip(encoded, given, decoded, strict=True):
                tallies[name].add_document(*each)
            loaded[name] = [_as(cache, model.dtype) for cache in decoded]
        reference = [_as(cache, model.dtype) for cache in caches]
        for case in cases:
            follow, wanted, right = _reference(model, case, reference)
            for name, tally in tallies.items():
                _follow(model, case, loaded[name], follow, wanted, right, tally)
            done += 1
            progress(done, material.prompts)
    return tallies


def _as(cache: DocumentCache, dtype: torch.dtype) -> DocumentCache:
    return replace(cache, keys=cache.keys.to(dtype), values=cache.values.to(dtype))


def _reference(
    model: LoadedModel, case: _Case, caches: Sequence[DocumentCache]
) -> tuple[list[int], list[torch.Tensor], bool]:
    """The tokens to follow, the logits before each and after the last, and whether they are the right answer."""
    follow = list(case.continuation)
    answer = ""
    if case.question is not None:
        for event in _generation(model, case, caches):
            follow += event.token_ids
            answer += event.text
    logits = list(_logits(model, case, caches, follow))
    return follow, logits, case.question is not None and answer.strip() == case.question.answer


def _follow(
    model: LoadedModel,
    case: _Case,
    caches: Sequence[DocumentCache],
    follow: Sequence[int],
    wanted: Sequence[torch.Tensor],
    right: bool,
    tally: Tally,
) -> None:
    strayed = False
    for found, reference in zip(_logits(model, case, caches, follow), wanted, strict=True):
        tally.add_step(found, reference)
        strayed |= bool(found.argmax() != reference.argmax())
    if case.question is not None:
        if strayed:  # otherwise it chooses the reference's tokens, and so gives its answer
            answer = "".join(event.text for event in _generation(model, case, caches))
            right = answer.strip() == case.question.answer
        tally.questions += 1
        tally.right += right


def _generation(model: LoadedModel, case: _Case, caches: Sequence[DocumentCache]) -> Generation:
    linked = case.linker.link(model, case.prompt, caches, reserve=MAX_ANSWER_TOKENS)
    return Generation(linked, SamplingParams(), max_tokens=MAX_ANSWER_TOKENS, stop_ids=model.stop_ids)


def _logits(
    model: LoadedModel, case: _Case, caches: Sequence[DocumentCache], follow: Sequence[int]
) -> list[torch.Tensor]:
    linked = case.linker.link(model, case.prompt, caches, reserve=len(follow))
    found = [linked.compute(linked.token_ids[linked.pending], linked.pending).cpu()]
    for position, token in enumerate(follow, case.prompt.length):
        found.append(linked.compute(torch.tensor([token]), torch.tensor([position])).cpu())
    return found
