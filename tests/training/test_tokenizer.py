"""The tokenizer round-trips any text, and the training loop's cache in front of it changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kvlink_core.training.export import export_tokenizer
from kvlink_core.training.tokenizer import SPECIAL_TOKENS, FastEncoder, build_tokenizer
from kvlink_core.training.worlds import make_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    export_tokenizer(build_tokenizer(worlds=100), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Maria Lopez lives in Oslo.",
        "  two  spaces\n\n\ttab ",
        "Ünïcode → 日本語 🙂",
        "it's 3,14 (or so)...",
        "\x00\x7f",
    ],
)
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_single_and_stable(tokenizer: PreTrainedTokenizerBase) -> None:
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(13))
    for token in SPECIAL_TOKENS:
        assert len(tokenizer(token, add_special_tokens=False).input_ids) == 1
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|bos|>", "<|end|>", "<|pad|>")


def test_nothing_is_added_around_plain_text(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer("Oslo").input_ids == tokenizer("Oslo", add_special_tokens=False).input_ids


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|system|>S<|end|><|user|>Q<|end|><|assistant|>"
    with pytest.raises(Exception, match="roles are"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_fast_encoder_equals_the_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    fast = FastEncoder(folder / "tokenizer.json")
    texts = ["it's (1,2) don't  x \n y", "a\n\n b", "naïve café", "x_y-z's 12ab", "tab\there", " \n"]
    for seed in range(60):
        world = make_world(seed)
        texts += [f"Passage: {text}\n" for text in world.passages]
        texts += [text for question in world.questions for text in (question.question, question.answer)]
    for text in texts:
        # Twice: the second look-up comes from the cache.
        assert fast.encode(text) == tokenizer(text, add_special_tokens=False).input_ids
        assert fast.encode(text) == tokenizer(text, add_special_tokens=False).input_ids
    with pytest.raises(KeyError):
        fast.id("<|nothing|>")
