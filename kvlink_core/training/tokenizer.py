"""Builds the embedded model's tokenizer: byte-level BPE, trained on generated worlds and some ordinary English.

Any text round-trips. ``FastEncoder`` is a cache in front of it for the training loop: byte-level BPE never merges
across the pieces that its pre-tokenizer cuts, so the ids of a text are the concatenated ids of its pieces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvlink_core.training import lexicon
from kvlink_core.training.worlds import TRAIN_SEEDS, make_world

VOCABULARY = 3072
BOS, END, USER, ASSISTANT, SYSTEM = "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
MEM_START, MEM_END, PAD = "<|mem_start|>", "<|mem_end|>", "<|pad|>"
LINKS = tuple(f"<|link_{i}|>" for i in range(5))
SPECIAL_TOKENS = (BOS, END, USER, ASSISTANT, SYSTEM, MEM_START, MEM_END, PAD, *LINKS)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _corpus(worlds: int) -> Iterator[str]:
    for seed in range(TRAIN_SEEDS.start, TRAIN_SEEDS.start + worlds):
        world = make_world(seed)
        yield from (f"Passage: {text}\n" for text in world.passages)
        for question in world.questions:
            yield question.question
            yield question.answer
        if seed % 10 == 0:
            yield from lexicon.ORDINARY_ENGLISH
            yield from (f" {year}" for year in range(1900, 2020))


def build_tokenizer(worlds: int = 3000) -> PreTrainedTokenizerFast:
    """Train the tokenizer; the result depends on ``worlds`` only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(worlds), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in (BOS, END, PAD)],
        chat_template=CHAT_TEMPLATE,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,
    )


class FastEncoder:
    """``encode(text)`` equals the tokenizer's ids without special tokens; pieces are looked up, not re-merged."""

    # ByteLevel's own pattern, for ASCII (other text goes to the tokenizer).
    _PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")

    def __init__(self, tokenizer_file: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self._ids: dict[str, list[int]] = {}

    def id(self, token: str) -> int:
        """The id of one token of the vocabulary."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise KeyError(token)
        return int(found)

    def _slow(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text (no special tokens in it)."""
        if not text.isascii():
            return self._slow(text)
        ids: list[int] = []
        for piece in self._PIECES.findall(text):
            known = self._ids.get(piece)
            if known is None:
                known = self._slow(piece)
                if len(self._ids) < 200_000:
                    self._ids[piece] = known
            ids += known
        return ids
