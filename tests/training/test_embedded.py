"""The directory that ships: complete, small enough, and able to answer held-out questions."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvlink_core
from kvlink_core.training.batches import MODES
from kvlink_core.training.checkpoint import PART_BYTES, load_checkpoint, save_checkpoint
from kvlink_core.training.embedded import held_out, learning_rate
from kvlink_core.training.llama import Shape, TrainingLlama, dense_mask
from kvlink_core.training.measure import evaluate, report
from kvlink_core.training.tokenizer import LINKS, MEM_END, MEM_START, FastEncoder
from kvlink_core.training.worlds import TEST_SEEDS

FOLDER = Path(kvlink_core.__file__).parent / "embedded"


def test_the_directory_is_complete_and_small() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "kvlink.json",
        "MODEL_CARD.md",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12_000_000


def test_kvlink_json_names_the_tokens_of_the_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    kvlink = json.loads((FOLDER / "kvlink.json").read_text(encoding="utf-8"))
    assert kvlink["mem_start"] == tokenizer.convert_tokens_to_ids([MEM_START])
    assert kvlink["mem_end"] == tokenizer.convert_tokens_to_ids([MEM_END])
    assert kvlink["link_tokens"] == {"k": 5, "ids": tokenizer.convert_tokens_to_ids(list(LINKS)), "per_place": False}


def test_it_answers_held_out_questions_in_every_mode() -> None:
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    config = theirs.config
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (8192, True)
    shape = Shape(config.vocab_size, config.hidden_size, config.num_hidden_layers, inner=config.intermediate_size)
    model = TrainingLlama(shape)
    model.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight"})

    def forward(ids, positions, context, document, question, at):  # type: ignore[no-untyped-def]
        return model(ids, positions, dense_mask(context, document, question), at)

    held = held_out(FastEncoder(FOLDER / "tokenizer.json"), TEST_SEEDS, worlds=3)
    with torch.no_grad():
        total = sum(evaluate(forward, rows, torch.device("cpu"), rows_each=1, crop=True) for rows in held)
    result = report(total)
    for name, _ in MODES:
        assert result[name]["n"] >= 20
        assert result[name]["all"] >= 0.9


def test_checkpoints_come_back_whole_across_parts(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(PART_BYTES // 4 + 10, dtype=torch.float32), "b": torch.ones(3, dtype=torch.bfloat16)}
    save_checkpoint(tmp_path, tensors, {"step": 7})
    loaded, state = load_checkpoint(tmp_path)
    assert state == {"step": 7, "parts": 2}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate(1.0, passed / 1000, decay_from=0.5) for passed in range(1001)]
    assert rates[0] < 0.05
    assert rates[100] == rates[499] == 1.0
    assert all(a >= b for a, b in pairwise(rates[500:]))
    assert rates[-1] <= 0.011
