"""Packed rows against an independent oracle: transformers' Llama over each single prompt with DESIGN's mask."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvlink_core.training.batches import IGNORED, MODES, Packer, evaluation_rows, make_tag, plain, stack
from kvlink_core.training.export import export_tokenizer, export_weights
from kvlink_core.training.llama import Shape, TrainingLlama, dense_mask
from kvlink_core.training.measure import evaluate, report, to_device
from kvlink_core.training.tokenizer import FastEncoder, build_tokenizer
from kvlink_core.training.worlds import make_world

SHAPE = Shape(width=64, layers=3, heads=4, kv_heads=2, inner=96)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer(worlds=100)
    export_tokenizer(tokenizer, folder)
    model = TrainingLlama(Shape(len(tokenizer), 64, 3, 4, 2, 96), seed=3)
    export_weights(model.shape, model.state_dict(), tokenizer, folder)
    return folder


def oracle_prompt(tokenizer, passages, question, mode):  # type: ignore[no-untyped-def]
    """Ids and boolean mask of one prompt, written from DESIGN section 3 and kvlink.json, not from the packer."""
    k = MODES[mode][1]
    text = "<|bos|><|user|><|mem_start|>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    owner = [-1] * len(ids)
    for number, passage in enumerate(passages):
        document = tokenizer(f"Passage: {passage}\n", add_special_tokens=False).input_ids
        ids += document
        owner += [number if k >= 0 else -1] * len(document)
        for link in range(max(k, 0)):
            ids.append(tokenizer.convert_tokens_to_ids(f"<|link_{link}|>"))
            owner.append(-1)
    ids += tokenizer(f"<|mem_end|>{question}<|end|><|assistant|>", add_special_tokens=False).input_ids
    owner += [-1] * (len(ids) - len(owner))
    mask = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    for row in range(len(ids)):
        for column in range(row + 1):
            mask[row, column] = owner[row] < 0 or owner[row] == owner[column]
    return ids, owner, mask


@pytest.mark.parametrize("mode", range(len(MODES)), ids=[name for name, _ in MODES])
def test_packed_logits_equal_single_prompts(folder: Path, mode: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = TrainingLlama(Shape(len(tokenizer), 64, 3, 4, 2, 96))
    weights = {k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    ours.load_state_dict(weights)
    packer = Packer(FastEncoder(folder / "tokenizer.json"), whole=True)
    worlds = [make_world(seed, (2, 5)) for seed in range(2)]
    row = next(packer.rows([(plain(world, 4), mode, 0) for world in worlds]))
    tokens, answers, _ = to_device(stack([row]), CPU)
    tokens = tokens[:, :, : int((tokens[2] > 0).sum())]  # without the padding
    with torch.no_grad():
        logits = ours(tokens[0], tokens[1], dense_mask(tokens[2], tokens[3], tokens[4]), answers[0])[0]
    slot = 0
    for world in worlds:
        for question in world.questions[:4]:
            ids, owner, _ = oracle_prompt(tokenizer, world.passages, question.question, mode)
            answer = tokenizer(question.answer, add_special_tokens=False).input_ids
            ids, owner = ids + answer, owner + [-1] * len(answer)
            index = torch.arange(len(ids))
            own = torch.tensor(owner)
            mask = (index[:, None] >= index) & ((own[:, None] < 0) | (own[:, None] == own))
            bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            with torch.no_grad():
                expected = theirs(torch.tensor([ids]), attention_mask=bias[None, None]).logits[0]
            chosen = (answers[2, 0] == slot) & (answers[1, 0] != IGNORED)
            assert answers[1, 0][chosen].tolist() == [*answer, tokenizer.eos_token_id]
            expected = expected[-len(answer) - 1 :]
            torch.testing.assert_close(logits[chosen], expected, rtol=1e-4, atol=1e-4)
            slot += 1
    assert slot >= 4


def test_evaluation_counts_every_question_once(folder: Path) -> None:
    encoder = FastEncoder(folder / "tokenizer.json")
    seeds = range(5)
    rows = evaluation_rows(encoder, seeds, mode=1, most=5)
    worlds = [make_world(seed) for seed in seeds]
    asked = sum(min(5, len(world.questions)) for world in worlds)
    unknown = sum(len(world.unknown[:1]) for world in worlds)
    assert (rows.tags >= 0).sum() == asked + unknown

    def perfect(ids, positions, ctx, doc, question, at):  # type: ignore[no-untyped-def]
        labels = torch.from_numpy(rows.answers[1]).long().clamp(min=0)
        logits = torch.nn.functional.one_hot(labels, 4000).float()
        logits[0, 0] = 0.0  # one wrong token spoils one question
        logits[0, 0, 1] = 1.0
        return logits

    result = report(evaluate(perfect, rows, CPU, rows_each=rows.tags.shape[0]))
    assert result["link5"]["n"] == asked
    assert result["link5"]["all"] == pytest.approx((asked - 1) / asked, abs=1e-4)


def test_tags_are_distinct() -> None:
    assert len({make_tag(m, k, g) for m in range(4) for k in range(4) for g in range(16)}) == 4 * 4 * 16
