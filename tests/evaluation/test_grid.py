"""Models of a grid: which linkers they can run, several in one run, wrapped documents, chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import save_tiny

from kvlink_core.engine import SamplingParams
from kvlink_core.errors import ConfigError, InputError
from kvlink_core.evaluation import asking
from kvlink_core.evaluation.examples import Example
from kvlink_core.evaluation.grid import contenders, expand
from kvlink_core.evaluation.records import read_config, read_rows
from kvlink_core.models import load_model
from kvlink_core.session import AnswerRequest, Session
from kvlink_core.types import Document, Message

Evaluate = Callable[..., Path]


def test_k_stands_for_link_tokens_and_none_of_them_is_reposition() -> None:
    assert expand(["link-tokens", "epic", "reposition"], [0, 1, 5]) == [
        "reposition", "link-tokens:k=1", "link-tokens:k=5", "epic",
    ]  # fmt: skip
    assert expand(["link-tokens:k=2"], []) == ["link-tokens:k=2"]
    with pytest.raises(ConfigError, match="--linker link-tokens"):
        expand(["epic"], [1])


def test_linkers_that_no_model_can_run_are_refused_before_one_is_loaded(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvlink_core.evaluation.run.load_model", None)
    with pytest.raises(InputError, match="soft-wrap: this model has no trained embeddings"):
        contenders([str(tiny_model_dir)], ["soft-wrap"], ["raw"])
    with pytest.raises(InputError, match=r"link-tokens:k=9: .*3 link tokens"):
        contenders([str(tiny_model_dir)], ["link-tokens"], ["raw"], ks=[9])
    with pytest.raises(InputError, match="no codec 'zip'"):
        contenders([str(tiny_model_dir)], None, ["zip"])
    (everything,) = contenders([str(tiny_model_dir)], None, ["raw"])
    assert "soft-wrap" not in {cell.linker for cell in everything.cells}
    assert everything.cells[0].linker == "full"


def test_a_linker_that_one_of_two_models_can_run_is_left_out_of_the_other(tmp_path: Path, tiny_model_dir: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    layout = json.loads((other / "kvlink.json").read_text())
    del layout["link_tokens"]
    (other / "kvlink.json").write_text(json.dumps(layout))
    one, two = contenders([str(tiny_model_dir), str(other)], ["link-tokens", "reposition"], ["raw"])
    assert one.label == str(tiny_model_dir)  # both call themselves tiny
    assert [cell.linker for cell in one.cells] == ["full", "link-tokens", "reposition"]
    assert [cell.linker for cell in two.cells] == ["full", "reposition"]
    assert one.digest != two.digest
    assert "link-tokens was left out" in two.left_out[0]


def test_a_chat_template_without_system_turns_says_what_to_do(
    evaluate: Evaluate, tmp_path: Path, tiny_model_dir: Path
) -> None:
    other = save_tiny(tmp_path / "other")
    config = json.loads((other / "kvlink.json").read_text())
    config["chat_template"] = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}<assistant>"
    )
    (other / "kvlink.json").write_text(json.dumps(config))
    model = load_model(str(other))
    run_config = read_config(evaluate(tmp_path / "run")).model_copy(update={"system": {"d": "S"}})
    cells = contenders([str(other)], ["reposition"], ["raw"])[0].cells
    questioner = asking.Asking(model, cells, run_config, memory_bytes=1)
    with pytest.raises(ConfigError, match=r"no system here.*--system ''"):
        questioner.lay_out("d", Example("x", "q", (Document("", "t"),)))


def test_two_models_in_one_run_that_is_ended_between_them(
    evaluate: Evaluate, tmp_path: Path, tiny_model_dir: Path
) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    models = (tiny_model_dir, other)

    class Ended(BaseException):
        pass

    def end(done: int) -> None:
        if done == 7:
            raise Ended

    options = {"linkers": ["reposition"], "codecs": ["raw"], "models": models}
    with pytest.raises(Ended):
        evaluate(tmp_path / "ended", after=end, **options)
    rows = [read_rows(evaluate(tmp_path / name, **options)) for name in ("ended", "whole")]
    assert [row.cell.model for row in rows[0]] == [str(tiny_model_dir)] * 10 + [str(other)] * 10
    assert [(r.id, r.answer, r.kl) for r in rows[0]] == [(r.id, r.answer, r.kl) for r in rows[1]]
    assert rows[0][0].answer != rows[0][10].answer


def test_wrapped_documents(evaluate: Evaluate, tmp_path: Path) -> None:
    """``full`` leaves the wrap out, ``soft-wrap`` has it in its caches: both answer as a session does."""
    directory = save_tiny(tmp_path / "wrapped")
    draw = torch.Generator().manual_seed(0)
    header, trailer = (0.4 * torch.randn(rows, 32, generator=draw) for rows in (3, 2))
    save_file({"header": header, "trailer": trailer}, directory / "wrap.safetensors")
    layout = json.loads((directory / "kvlink.json").read_text()) | {"soft_wrap": "wrap.safetensors"}
    (directory / "kvlink.json").write_text(json.dumps(layout))
    rows = read_rows(evaluate(tmp_path / "run", models=[directory], linkers=["soft-wrap"], codecs=["raw"]))
    session = Session(load_model(str(directory)))
    documents = [Document("", "a dog ran far away"), Document("", "it rains"), Document("", "no news today")]
    for row in (row for row in rows if row.id == "q1"):
        messages = [Message("user", "what 1?")]
        answer = session.start(AnswerRequest(messages, documents, row.linker, SamplingParams(max_tokens=6)))
        assert (row.answer, row.prompt_tokens) == (answer.text(), answer.usage.prompt_tokens)
    with pytest.raises(InputError, match="wraps its documents"):
        contenders([str(directory)], ["reposition"], ["raw"])
