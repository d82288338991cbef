"""What a codec costs in quality: the same prompts over decoded caches as over the caches that were encoded.

Caches are stored in bfloat16, as most models make them, whatever the model computes in; the reference reads the same
bfloat16 caches, so that all that shows is the codec. Every prompt is linked as a request would be. Then its own tokens
and those that are to be followed, the reference's own greedy answer or a given continuation, run in one pass, which
gives the distribution after each of them: at the same places for all codecs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvlink_core.benchmark.codec_material import Case, Group, Material
from kvlink_core.compress import Codec, EncodedDocument, pruning_of
from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine import Generation, SamplingParams
from kvlink_core.evaluation.worlds import MAX_ANSWER_TOKENS
from kvlink_core.models import LoadedModel
from kvlink_core.types import DocumentCache

Progress = Callable[[int, int], None]

#: Of an error, and of what it is held against, the sums of squares.
Squares = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one prompt showed.

    Attributes:
        logits: error of the logits.
        divergence: sum over the places of KL(reference || found), in nats.
        steps, same_choices: places, and those where the most likely token is the same.
        right: whether the answer is the expected one, without a question ``None``.
    """

    logits: Squares
    divergence: float
    steps: int
    same_choices: int
    right: bool | None


@dataclass(slots=True)
class Tally:
    """What was seen of one codec so far. ``bf16_bytes`` are those of the caches before they were encoded."""

    documents: int = 0
    tokens: int = 0
    stored_bytes: int = 0
    bf16_bytes: int = 0
    keys: Squares = (0.0, 0.0)
    values: Squares = (0.0, 0.0)
    logits: Squares = (0.0, 0.0)
    divergence: float = 0.0
    steps: int = 0
    same_choices: int = 0
    questions: int = 0
    right: int = 0
    gained: int = 0
    lost: int = 0

    def add_document(self, encoded: EncodedDocument, cache: DocumentCache, decoded: DocumentCache) -> None:
        """Count one document's bytes and errors. Of a pruned cache the error is that of the tokens that it has."""
        self.documents += 1
        self.tokens += cache.tokens
        self.stored_bytes += sum(column.data.numel() for column in encoded.columns.values())
        self.bf16_bytes += 2 * (cache.keys.numel() + cache.values.numel())
        keys, values = _left_of(cache, decoded)
        self.keys = _added(self.keys, squares(decoded.keys, keys))
        self.values = _added(self.values, squares(decoded.values, values))

    def add_outcome(self, outcome: Outcome, reference_right: bool | None) -> None:
        """Count one prompt."""
        self.logits = _added(self.logits, outcome.logits)
        self.divergence += outcome.divergence
        self.steps += outcome.steps
        self.same_choices += outcome.same_choices
        if outcome.right is not None:
            self.questions += 1
            self.right += outcome.right
            self.gained += outcome.right and not reference_right
            self.lost += bool(reference_right) and not outcome.right


def relative(sums: Squares) -> float:
    """The relative root mean square error."""
    return math.sqrt(sums[0] / sums[1]) if sums[1] else 0.0


def squares(found: torch.Tensor, reference: torch.Tensor) -> Squares:
    """Of the error of ``found``, and of ``reference``."""
    wanted = reference.double()
    return float((found.double() - wanted).square().sum()), float(wanted.square().sum())


def _added(a: Squares, b: Squares) -> Squares:
    return a[0] + b[0], a[1] + b[1]


def compare(
    model: LoadedModel, material: Material, codecs: Mapping[str, Codec], progress: Progress = lambda done, total: None
) -> dict[str, Tally]:
    """Run ``material`` over the caches of every codec. Caches that are equal bit for bit run once.

    Args:
        model: computes; the caches that it makes are stored in bfloat16.
        material: made with this model.
        codecs: by the name under which the result is wanted.
        progress: called with prompts done and prompts in all.

    Raises:
        InputError: a codec that cannot store what this model makes.
    """
    tallies = {name: Tally() for name in codecs}
    encoder = DocumentEncoder(model)
    done = 0
    for group in material.groups:
        caches = [_as(cache, torch.bfloat16) for cache in encoder.encode(group.documents)]
        contexts = [caches]
        context_of: dict[str, int] = {}
        for name, codec in codecs.items():
            encoded = [codec.encode(cache) for cache in _made_for(codec, model, group, caches)]
            decoded = [codec.decode(document, model.device) for document in encoded]
            for each in zip(encoded, caches, decoded, strict=True):
                tallies[name].add_document(*each)
            context_of[name] = next((i for i, c in enumerate(contexts) if _same(c, decoded)), len(contexts))
            if context_of[name] == len(contexts):
                contexts.append(decoded)
        loaded = [[_as(cache, model.dtype) for cache in context] for context in contexts]
        for case in group.cases:
            reference = Reference.of(model, case, loaded[0])
            outcomes = [reference.itself()] + [reference.outcome(model, case, context) for context in loaded[1:]]
            for name, tally in tallies.items():
                tally.add_outcome(outcomes[context_of[name]], reference.right)
            done += 1
            progress(done, material.prompts)
    return tallies


def _as(cache: DocumentCache, dtype: torch.dtype) -> DocumentCache:
    return replace(cache, keys=cache.keys.to(dtype), values=cache.values.to(dtype))


def _same(some: Sequence[DocumentCache], others: Sequence[DocumentCache]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) and _same_tokens(a, b) for a, b in pairs)


def _same_tokens(a: DocumentCache, b: DocumentCache) -> bool:
    return a.kept is b.kept if a.kept is None or b.kept is None else torch.equal(a.kept, b.kept)


def _left_of(cache: DocumentCache, decoded: DocumentCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of ``cache`` that ``decoded`` has."""
    if decoded.kept is None:
        return cache.keys, cache.values
    index = decoded.kept.to(cache.keys.device, torch.int64).unsqueeze(3)
    keys, values = (t.gather(2, index.expand(-1, -1, -1, t.shape[3])) for t in (cache.keys, cache.values))
    return keys, values


def _made_for(
    codec: Codec, model: LoadedModel, group: Group, caches: Sequence[DocumentCache]
) -> Sequence[DocumentCache]:
    """The caches that a codec is given: one that prunes may have to see the model read the documents."""
    pruning = pruning_of(codec)
    if pruning is None:
        return caches
    return [_as(cache, torch.bfloat16) for cache in DocumentEncoder(model, prune=pruning).encode(group.documents)]


@dataclass(frozen=True, slots=True)
class Reference:
    """What a prompt gives over the caches as they were encoded.

    Attributes:
        follow: tokens after the prompt.
        logits: ``[len(follow) + 1, vocabulary]``, after the prompt and after each of them.
        right: whether the greedy answer is the expected one, without a question ``None``.
    """

    follow: Sequence[int]
    logits: torch.Tensor
    right: bool | None

    @classmethod
    def of(cls, model: LoadedModel, case: Case, caches: Sequence[DocumentCache]) -> Reference:
        """Compute it."""
        if case.question is None:
            return cls(case.continuation, logits_after(model, case, caches, case.continuation), None)
        follow = model.layout.plain_tokens(case.question.answer)
        logits = logits_after(model, case, caches, follow)
        choices = logits.argmax(1).tolist()
        if choices[:-1] == follow and choices[-1] in model.stop_ids:  # what greedy decoding would come to
            return cls(follow, logits, True)
        follow, right = _answer(model, case, caches)
        return cls(follow, logits_after(model, case, caches, follow), right)

    def itself(self) -> Outcome:
        """What the same prompt gives over the same caches."""
        _, size = squares(self.logits, self.logits)
        return Outcome((0.0, size), 0.0, len(self.logits), len(self.logits), self.right)

    def outcome(self, model: LoadedModel, case: Case, caches: Sequence[DocumentCache]) -> Outcome:
        """What the same prompt gives over other caches."""
        found = logits_after(model, case, caches, self.follow)
        same = found.argmax(1) == self.logits.argmax(1)
        right = self.right
        if right is not None and not bool(same.all()):  # else it gives the very answer of the reference
            _, right = _answer(model, case, caches)
        wanted = self.logits.double().log_softmax(1)
        divergence = float((wanted.exp() * (wanted - found.double().log_softmax(1))).sum())
        return Outcome(squares(found, self.logits), divergence, len(same), int(same.sum()), right)


def _answer(model: LoadedModel, case: Case, caches: Sequence[DocumentCache]) -> tuple[list[int], bool]:
    """Greedy decoding: tokens, and whether they are the expected answer."""
    assert case.question is not None
    linked = case.linker.link(model, case.prompt, caches, reserve=MAX_ANSWER_TOKENS)
    generation = Generation(linked, SamplingParams(), max_tokens=MAX_ANSWER_TOKENS, stop_ids=model.stop_ids)
    events = list(generation)
    text = "".join(event.text for event in events)
    return [token for event in events for token in event.token_ids], text.strip() == case.question.answer


def logits_after(
    model: LoadedModel, case: Case, caches: Sequence[DocumentCache], follow: Sequence[int]
) -> torch.Tensor:
    """Float32 logits ``[len(follow) + 1, vocabulary]`` on the CPU: after the prompt, and after each that follows."""
    linked = case.linker.link(model, case.prompt, caches, reserve=len(follow))
    token_ids = torch.cat([linked.token_ids[linked.pending], torch.tensor(follow, dtype=torch.int64)])
    length = case.prompt.length
    positions = torch.cat([linked.pending, torch.arange(length, length + len(follow))])
    with _last(model, len(follow) + 1) as seen:
        linked.compute(token_ids, positions)
    return seen[-1]


@contextmanager
def _last(model: LoadedModel, count: int) -> Iterator[list[torch.Tensor]]:
    """The logits of the last ``count`` tokens of each pass, where the engine asks for those of one.

    Meanwhile nothing is replayed, since a recorded pass gives only what it was recorded with.
    """
    graphs = model.lm.graphs
    usable = graphs is not None and graphs.usable
    seen: list[torch.Tensor] = []

    def ask(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "logits_to_keep": count}

    def keep(module: Any, args: Any, output: Any) -> None:
        seen.append(output.logits[0].float().cpu())

    hooks = [
        model.network.register_forward_pre_hook(ask, with_kwargs=True),
        model.network.register_forward_hook(keep),
    ]
    try:
        if graphs is not None:
            graphs.usable = False
        yield seen
    finally:
        if graphs is not None:
            graphs.usable = usable
        for hook in hooks:
            hook.remove()
