"""The preset of the published KVLink checkpoints, on a tiny random Llama with Llama 3.2's vocabulary and token ids."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from oracles import greedy
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine import SamplingParams
from kvlink_core.errors import ConfigError, TooManyDocumentsError
from kvlink_core.linking import get_linker
from kvlink_core.models import LoadedModel, describe_model, load_model
from kvlink_core.models.layout_file import LayoutFile, read_layout_file
from kvlink_core.presets import PRESETS
from kvlink_core.prompt import Prompt
from kvlink_core.session import AnswerRequest, Session
from kvlink_core.types import Document, Message

PRESET = "kvlink5-llama3.2"
BEGIN, HEADER, HEADER_END, TURN_END = 128000, 128006, 128007, 128009
MEM_START, MEM_END = 128254, 128255
QUESTION = [Message("system", "Be brief."), Message("user", "Where?")]
DOCUMENTS = [Document("a", "Maria is in Lima.", "Maria"), Document("b", "She moved to Oslo.")]


@lru_cache(maxsize=1)
def llama_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the control tokens where Llama 3.2 has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"unused {i}" for i in range(BEGIN - len(alphabet)))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = {
        128000: "<|begin_of_text|>", 128001: "<|end_of_text|>", 128004: "<|finetune_right_pad_id|>",
        128006: "<|start_header_id|>", 128007: "<|end_header_id|>", 128008: "<|eom_id|>", 128009: "<|eot_id|>",
        128010: "<|python_tag|>",
    }  # fmt: skip
    controls = [named.get(i, f"<|reserved_{i}|>") for i in range(128000, 128256)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=0.4,
        bos_token_id=BEGIN, eos_token_id=TURN_END, pad_token_id=128004,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    llama_tokenizer().save_pretrained(directory)
    (directory / "kvlink.json").write_text(json.dumps({"preset": PRESET, "name": "tiny-kvlink5"}))
    return directory


@pytest.fixture(scope="module")
def model(directory: Path) -> LoadedModel:
    return load_model(str(directory))


def text(words: str) -> list[int]:
    return list(llama_tokenizer().encode(words, add_special_tokens=False))


def prompt(model: LoadedModel, messages: list[Message], documents: list[Document], linker: str) -> Prompt:
    layout = model.layout
    tokens = [layout.document_tokens(d, i) for i, d in enumerate(documents)]
    return layout.build(messages, tokens, links=layout.link_tokens if linker == "link-tokens" else None)


def test_the_tokens_are_those_of_the_published_layout(model: LoadedModel) -> None:
    assert prompt(model, QUESTION, DOCUMENTS, "link-tokens").token_ids().tolist() == [
        BEGIN, HEADER, *text("system"), HEADER_END, *text("\n\nBe brief."), TURN_END,
        MEM_START,
        *text("Document [1](Title: Maria) Maria is in Lima.\n"), 128011, 128012, 128013, 128014, 128015,
        *text("Document [2](Title: ) She moved to Oslo.\n"), 128016, 128017, 128018, 128019, 128020,
        MEM_END, TURN_END,
        HEADER, *text("user"), HEADER_END, *text("\n\nWhere?"), TURN_END,
        HEADER, *text("assistant"), HEADER_END, *text("\n\n"),
    ]  # fmt: skip


def test_without_a_system_message_there_is_a_system_turn_all_the_same(model: LoadedModel) -> None:
    ids = prompt(model, QUESTION[1:], DOCUMENTS, "link-tokens").token_ids().tolist()
    start = [BEGIN, HEADER, *text("system"), HEADER_END, *text("\n\n")]
    assert ids[: len(start)] == start
    assert ids[ids.index(TURN_END) + 1] == MEM_START


def test_a_later_turn_brings_documents_of_its_own(model: LoadedModel) -> None:
    turns = [QUESTION[0], Message("user", "Where?", DOCUMENTS[:1]), Message("assistant", "Lima."), QUESTION[1]]
    ids = prompt(model, turns, DOCUMENTS, "link-tokens").token_ids().tolist()
    control = [i for i in ids if i >= 128000 and i not in (HEADER, HEADER_END)]
    assert control == [
        BEGIN, TURN_END, MEM_START, *range(128011, 128016), MEM_END, TURN_END, TURN_END, TURN_END,
        MEM_START, *range(128016, 128021), MEM_END, TURN_END, TURN_END,
    ]  # fmt: skip


@pytest.mark.parametrize("linker", ["link-tokens", "reposition"])
def test_a_linked_answer_is_the_oracles(model: LoadedModel, linker: str) -> None:
    laid_out = prompt(model, QUESTION, DOCUMENTS, linker)
    expected, (first, *_) = greedy(model.network, laid_out, 6, isolate=True)
    answer = Session(model).start(AnswerRequest(QUESTION, DOCUMENTS, linker, SamplingParams(max_tokens=6)))
    assert [t for event in answer for t in event.token_ids] == expected
    assert len(set(expected)) > 1
    caches = DocumentEncoder(model).encode([list(s.token_ids) for s in laid_out.documents])
    linked = get_linker(linker).link(model, laid_out, caches, reserve=1)
    logits = linked.compute(linked.token_ids[linked.pending], linked.pending)
    assert float((logits - first).abs().max() / first.abs().max()) <= 1e-5


def test_there_are_places_for_48_documents(model: LoadedModel) -> None:
    documents = [Document(str(i), f"{i}") for i in range(49)]
    links = [s for s in prompt(model, QUESTION, documents[:48], "link-tokens").segments if s.kind == "link"]
    assert links[-1].token_ids == (128246, 128247, 128248, 128249, 128250)
    with pytest.raises(TooManyDocumentsError, match="48 documents"):
        Session(model).start(AnswerRequest(QUESTION, documents))
    assert len(prompt(model, QUESTION, documents, "reposition").documents) == 49


def test_other_keys_override_the_preset(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "kvlink.json").write_text(json.dumps({"preset": PRESET, "mem_end": [], "default_linker": "full"}))
    file = read_layout_file(tmp_path)
    assert (file.mem_start, file.mem_end, file.linker) == ((MEM_START,), (), "full")
    assert read_layout_file(directory).linker == "link-tokens"


@pytest.mark.parametrize("name", ["kvlink6", "", 5])
def test_unknown_presets_are_refused(tmp_path: Path, name: object) -> None:
    (tmp_path / "kvlink.json").write_text(json.dumps({"preset": name}))
    with pytest.raises(ConfigError, match=PRESET if isinstance(name, str) else "preset"):
        read_layout_file(tmp_path)


def test_a_model_without_those_tokens_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    for file in tiny_model_dir.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "kvlink.json").unlink()
    (tmp_path / "kvlink.json").write_text(json.dumps({"preset": PRESET}))
    with pytest.raises(ConfigError, match=r"128254.*vocabulary"):
        describe_model(str(tmp_path))


def test_the_documentation_lists_every_preset_and_every_key() -> None:
    page = (Path(__file__).parent.parent / "docs" / "prompts.md").read_text("utf-8")
    assert [name for name in (*PRESETS, *LayoutFile.model_fields) if f"`{name}`" not in page] == []
