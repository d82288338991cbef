"""Tales mean what they say, rows hold what the product would lay out, and what is exported loads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from kvlink_core.encode import DocumentEncoder
from kvlink_core.evaluation.tales import answers, held_out
from kvlink_core.linking import get_linker
from kvlink_core.models import load_model
from kvlink_core.models.describe import EMBEDDED_DIRECTORY
from kvlink_core.training import lexicon as lx
from kvlink_core.training.family.network import FamilyLlama, export
from kvlink_core.training.family.rows import MODES, STAGES, TalePacker
from kvlink_core.training.family.tales import KINDS, Tale, TaleQuestion, make_tale
from kvlink_core.training.llama import Shape, dense_mask
from kvlink_core.types import Document, Message

TOKENIZER = EMBEDDED_DIRECTORY / "tokenizer.json"
SMALL = Shape(width=32, layers=2, heads=4, kv_heads=2, inner=32)


def read(tale: Tale) -> dict[str, set[str]]:
    """Every sentence with its subject's name in place, by a reader who knows only the rule of the three pronouns."""
    last: dict[str, str] = {}
    facts: dict[str, set[str]] = {}
    for passage in tale.passages:
        for sentence in re.findall(r"[^.]+\.", passage):
            word, rest = sentence.split(maxsplit=1)
            if word not in ("She", "He", "It"):
                pronoun = "She" if word in lx.WOMEN else "He" if word in lx.MEN else "It"
                last[pronoun] = word
            else:
                word = last[word]
            facts.setdefault(word, set()).add(f"{word} {rest}")
    return facts


def test_a_reader_finds_every_answer() -> None:
    for seed in range(150):
        tale = make_tale(seed)
        said = set().union(*read(tale).values())
        for question in tale.questions:
            first, _, second = question.answer.partition(", ")
            if second:
                target = first.rsplit(" ", 1)[1]
                assert f"{first}." in said
                assert f"{target} {second.split(maxsplit=1)[1]}" in said
            else:
                assert question.answer in said


def test_a_question_has_several_candidates() -> None:
    """What the tales are for: most pronoun questions have the same words about another subject elsewhere."""
    several = asked = 0
    for seed in range(150):
        tale = make_tale(seed, (12, 20))
        for question in tale.questions:
            if question.kind == "pronoun":
                start = " ".join(question.answer.split()[1:-1])
                pronoun = "It" if question.answer.split()[0] in lx.COMPANIES else "She|He"
                asked += 1
                several += len(re.findall(rf"\b(?:{pronoun}) {start} ", " ".join(tale.passages))) > 1
    assert several / asked > 0.75


def test_tales_are_a_function_of_their_seed() -> None:
    assert make_tale(7) == make_tale(7)
    assert make_tale(7) != make_tale(8)
    assert {q.kind for seed in range(30) for q in make_tale(seed).questions} == set(KINDS)
    assert all(q.kind == "fact" for q in make_tale(3, STAGES[0].passages, STAGES[0].level).questions)


@pytest.mark.parametrize("variant", ["k0", "k5", "link-only", "wrap"])
def test_a_row_is_what_the_product_computes(tmp_path: Path, variant: str) -> None:
    """Logits after each question, of the masked row and through linking, with an exported model."""
    model = FamilyLlama(SMALL, seed=1)
    weights = {k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    export(SMALL, weights, variant, EMBEDDED_DIRECTORY, tmp_path / "m", "m")
    loaded = load_model(str(tmp_path / "m"), dtype="float32")
    mode = "k5" if variant == "link-only" else variant
    tale = make_tale(2, (4, 5))
    tale = Tale(tale.passages, tale.questions[:3])
    packer = TalePacker(TOKENIZER, own_links=variant == "link-only")
    rows = next(iter(packer.rows([(tale, [0, 1, 2])], [mode])))
    tokens, at = torch.from_numpy(rows.tokens).long(), torch.from_numpy(rows.answers[0]).long()
    used = int((tokens[2, 0] > 0).sum())
    ids, positions, context, document, question = tokens[:, :, :used]
    with torch.no_grad():
        logits = model(ids, positions, dense_mask(context, document, question), at)[0]
    starts = [int((rows.answers[2, 0] == slot).argmax()) for slot in range(3)]
    linker = get_linker({"k0": "reposition", "wrap": "soft-wrap"}.get(variant, "link-tokens"))
    documents = [loaded.layout.document_tokens(Document(str(i), p)) for i, p in enumerate(tale.passages)]
    caches = DocumentEncoder(loaded).encode(documents)
    for slot, asked in zip(starts, tale.questions, strict=True):
        prompt = loaded.layout.build([Message("user", asked.question)], documents, links=linker.links(loaded.layout))
        linked = linker.link(loaded, prompt, caches, reserve=1)
        expected = linked.compute(linked.token_ids[linked.pending], linked.pending)
        got = logits[slot]
        if variant == "link-only":  # their rows are the output's too: the product's logits of these tokens differ
            keep = [i for i in range(3072) if i not in range(8, 13)]
            got, expected = got[keep], expected[keep]
        assert torch.allclose(got, expected, atol=1e-5 * float(expected.abs().max()))


def test_the_products_path_answers(tmp_path: Path) -> None:
    weights = FamilyLlama(SMALL).state_dict()
    export(SMALL, weights, "k1", EMBEDDED_DIRECTORY, tmp_path / "m", "m")
    tales, asked = held_out(2, 2, (4, 5))
    model = load_model(str(tmp_path / "m"))
    out = answers(model, ["full", "link-tokens"], tales[0], [a.question for a in asked if a.tale == 0])
    assert [len(row) for row in out] == [2, 2]
    assert asked[2].number == len(tales[0].questions)
    assert set(MODES) >= {"full", "k0", "k1", "k5", "wrap"}
    assert isinstance(asked[0].question, TaleQuestion)
