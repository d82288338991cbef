"""Each recipe on a tiny model: loss falls, what is frozen stays to the bit, resuming changes nothing; it answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from kvlink_core.engine import SamplingParams
from kvlink_core.errors import ConfigError, ModelNotFoundError
from kvlink_core.models import load_model
from kvlink_core.session import AnswerRequest, Session
from kvlink_core.training.recipes.directory import prepare
from kvlink_core.training.recipes.run import Outcome, train
from kvlink_core.types import Document, Message

# Of accelerate's and TensorBoard's own making.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(str(directory / "model.safetensors"))


def falls(outcome: Outcome) -> bool:
    values = [loss for _, loss in outcome.losses]
    return sum(values[-3:]) < sum(values[:3])


def answers_with(directory: Path, linker: str) -> None:
    """What was written loads as it is, and a request that names no linker gets the one that was trained for."""
    session = Session(load_model(str(directory)))
    answer = session.start(
        AnswerRequest([Message("user", "Who?")], [Document("a", "Anna sings.")], sampling=SamplingParams(max_tokens=2))
    )
    answer.text()
    assert answer.linker == linker


def test_link_only(make: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    outcome = train(make(), tmp_path / "out", device="cpu")
    assert falls(outcome)
    before, after = weights(tiny_model_dir), weights(tmp_path / "out")
    embedding = "model.embed_tokens.weight"
    assert all(torch.equal(before[n], after[n]) for n in before if n != embedding)
    changed = (before[embedding] != after[embedding]).any(1).nonzero().flatten().tolist()
    assert changed == [263, 264, 265]
    answers_with(tmp_path / "out", "link-tokens")
    assert list((tmp_path / "out" / "checkpoints" / "tensorboard").rglob("events.out.tfevents*"))


def test_the_whole_model_on_a_mixture(make: Any, data: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    kinds = [("qa", "qa", "segments"), ("qa", "qa", "full"), ("instruct", "instruct", "full"),
             ("text", "text", "segments"), ("summary", "summary", "segments")]  # fmt: skip
    mixture = [
        {"path": data / f"{file}.jsonl", "kind": kind, "attention": attention, "segment_tokens": 24, "target_tokens": 9}
        for file, kind, attention in kinds
    ]
    recipe = make(
        train="model",
        mixture=mixture,
        learning_rate=0.01,
        gradient_checkpointing=True,
        dtype="bfloat16",
        rows_at_once=2,
    )
    outcome = train(recipe, tmp_path / "out", device="cpu")
    assert falls(outcome)
    assert load_model(str(tmp_path / "out")).fingerprint.digest != load_model(str(tiny_model_dir)).fingerprint.digest
    answers_with(tmp_path / "out", "link-tokens")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning")  # peft asks by the old name
def test_a_lora_adapter_is_merged(make: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = make(train="model", lora={"rank": 2, "targets": ["q_proj", "v_proj"]}, learning_rate=0.02)
    assert falls(train(recipe, tmp_path / "out", device="cpu"))
    before, after = weights(tiny_model_dir), weights(tmp_path / "out")
    changed = {n.partition(".self_attn.")[2] for n in before if not torch.equal(before[n], after[n])}
    assert changed == {"q_proj.weight", "v_proj.weight", ""}  # and the rows of the link tokens
    assert before.keys() == after.keys()
    answers_with(tmp_path / "out", "link-tokens")


@pytest.mark.parametrize("file", ["qa", "questions"])
def test_soft_wrap(make: Any, data: Path, tiny_model_dir: Path, tmp_path: Path, file: str) -> None:
    recipe = make(
        train="wrap", mixture=[{"path": data / f"{file}.jsonl", "kind": "qa"}], steps=8 if file == "qa" else 2,
        wrap={"header": 3, "trailer": 2, "answer_tokens": 4}, learning_rate=0.05,
    )  # fmt: skip
    outcome = train(recipe, tmp_path / "out", device="cpu")
    assert falls(outcome) or file != "qa"
    assert (tiny_model_dir / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    wrap = load_file(str(tmp_path / "out" / "soft_wrap.safetensors"))
    assert (wrap["header"].shape, wrap["trailer"].shape) == ((3, 32), (2, 32))
    assert load_model(str(tmp_path / "out")).fingerprint.digest != load_model(str(tiny_model_dir)).fingerprint.digest
    answers_with(tmp_path / "out", "soft-wrap")


@pytest.mark.parametrize("train_what", ["links", "model"])
def test_resuming_equals_an_uninterrupted_run(make: Any, tmp_path: Path, train_what: str) -> None:
    recipe = make(train=train_what, learning_rate=0.01)
    train(recipe, tmp_path / "whole", device="cpu")
    train(recipe, tmp_path / "cut", device="cpu", stop_after=3)
    resumed = train(recipe, tmp_path / "cut", resume=True, device="cpu")
    assert resumed.steps == 8
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_new_link_tokens(make: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    (base / "kvlink.json").write_text("{}")
    recipe = make(model=str(base), links={"k": 2}, steps=2)
    train(recipe, tmp_path / "out", device="cpu")
    model = load_model(str(tmp_path / "out"))
    assert model.layout.link_tokens is not None
    assert model.layout.link_tokens.ids == (266, 267)
    name = "model.embed_tokens.weight"
    assert torch.equal(weights(base)[name], weights(tmp_path / "out")[name][:266])
    answers_with(tmp_path / "out", "link-tokens")


def test_losses_do_not_depend_on_how_rows_are_split(make: Any, tmp_path: Path) -> None:
    together = train(make(rows_at_once=2, steps=2), tmp_path / "a", device="cpu")
    apart = train(make(rows_at_once=1, steps=2), tmp_path / "b", device="cpu")
    assert [x for _, x in together.losses] == pytest.approx([x for _, x in apart.losses], rel=1e-4)


def test_checkpoints_are_not_overwritten_nor_mixed(make: Any, tmp_path: Path) -> None:
    train(make(steps=2), tmp_path / "out", device="cpu", stop_after=1)
    with pytest.raises(ConfigError, match="--resume to go on"):
        train(make(steps=2), tmp_path / "out", device="cpu")
    with pytest.raises(ConfigError, match="recipe differs"):
        train(make(steps=2, learning_rate=0.5), tmp_path / "out", resume=True, device="cpu")
    with pytest.raises(ConfigError, match="no checkpoint"):
        train(make(steps=2), tmp_path / "other", resume=True, device="cpu")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "bad.jsonl, line 1: not JSON"),
        ("[]", "not a JSON object"),
        (json.dumps({"question": "Q", "answer": "A"}), "no documents"),
        (json.dumps({"question": "Q", "documents": ["d"]}), "no answer; only soft wraps"),
        (json.dumps({"question": " ", "answer": "A", "documents": ["d"]}), "'question' must be text"),
        (json.dumps({"question": "Q", "answer": "A", "documents": ["x" * 900]}), "no line of 'bad.jsonl'"),
        ("", "has no lines"),
    ],
)
def test_bad_data_is_named(make: Any, tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    recipe = make(mixture=[{"path": tmp_path / "bad.jsonl", "kind": "qa"}], steps=1)
    with pytest.raises(ConfigError, match=said):
        train(recipe, tmp_path / "out", device="cpu")


def test_a_missing_model(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        train(make(model=str(tmp_path / "nowhere")), tmp_path / "out", device="cpu")


def test_flex_attention_is_refused_without_cuda(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="attention: sdpa here"):
        train(make(attention="flex"), tmp_path / "out", device="cpu")


def test_reserved_tokens_of_the_vocabulary_are_taken_first(make: Any, tiny_model_dir: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<|reserved_special_token_{i}|>" for i in range(4)], special_tokens=True)
    tokenizer.save_pretrained(base)
    (base / "kvlink.json").write_text(json.dumps({"mem_start": [266]}))  # the first of them has a use already
    target = prepare(make(model=str(base), links={"k": 2}), tmp_path / "out")
    assert target.links is not None
    assert (target.links.ids, target.added) == ((267, 268), ())
    named = make(model=str(base), links={"k": 1, "tokens": ["<|reserved_special_token_3|>"]})
    assert prepare(named, tmp_path / "named").links == type(target.links)((269,), 1)
    with pytest.raises(ConfigError, match="no token '<nothing>'"):
        prepare(make(model=str(base), links={"k": 1, "tokens": ["<nothing>"]}), tmp_path / "bad")


def test_a_start_that_failed_is_no_model(make: Any, data: Path, tmp_path: Path) -> None:
    """What was laid out before the weights does not stand in the way of the next try; a finished model does."""
    broken = make(mixture=[{"path": data / "none.jsonl", "kind": "qa"}])
    with pytest.raises(ConfigError, match="cannot read the source"):
        train(broken, tmp_path / "out", device="cpu")
    train(make(steps=1), tmp_path / "out", device="cpu")
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    with pytest.raises(ConfigError, match="holds a model already"):
        train(make(steps=1), tmp_path / "out", device="cpu")
