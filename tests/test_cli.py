"""The ``kvlink`` command: what it prints, and that bad input is one line and exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command import Kvlink

from kvlink_core.engine import TokenEvent


def test_the_installed_command_fails_with_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "kvlink_core.cli", "ask", "Where?", "--model", "/nowhere"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("kvlink: no model at")
    assert done.stderr.count("\n") == 1


def test_help_names_every_command(kvlink: Kvlink) -> None:
    done = kvlink("--help")
    assert done.returncode == 0
    for command in ("ask", "bench", "eval", "sample", "train"):
        assert command in done.stdout


def test_ask(kvlink: Kvlink, tiny_model_dir: Path) -> None:
    done = kvlink("ask", "Where?", "-d", "Maria.", "--model", str(tiny_model_dir), "--max-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert "link-tokens: " in done.stderr
    assert "0 cached" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ask", "", "--model", "MODEL"], "no text"),
        (["ask", "Where?", "--model", "/nowhere"], "no model at"),
        (["ask", "Where?", "--model", "MODEL", "--linker", "glue"], "unknown linker 'glue'"),
        (["ask", "Where?", "--model", "MODEL", "-d", " "], "no text"),
        (["ask", "Where?", "--model", "MODEL", "--id", "a"], "--store"),
        (["ask", "Where?", "--model", "MODEL", "--store", "/nowhere"], "/nowhere"),
        (["ask", "Where?", "--model", "MODEL", "--max-tokens", "0"], "max_tokens"),
        (["ask", "Where?", "--model", "MODEL", "--device", "cuda:77"], "cuda:77"),
        (["ask", "x\udcff", "--model", "MODEL"], "surrogate"),
        (["eval", "worlds", "--model", "MODEL", "--condition", "link-tokens:x"], "name:parameter=value"),
        (["eval", "worlds", "--model", "MODEL", "--jsonl", "/nowhere/x"], "cannot write to '/nowhere/x'"),
        (["sample", "/proc/nothing"], "cannot write to '/proc/nothing'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    kvlink: Kvlink, arguments: list[str], said: str, tiny_model_dir: Path
) -> None:
    done = kvlink(*(str(tiny_model_dir) if a == "MODEL" else a for a in arguments))
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_an_answer_is_printed_as_it_is(kvlink: Kvlink, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ":smile: [bold]x[/bold] " + "word " * 60
    monkeypatch.setattr("kvlink_core.session.Answer.__iter__", lambda _: iter([TokenEvent(text, (1,), "stop")]))
    assert kvlink("ask", "Where?", "--model", str(tiny_model_dir)).stdout == text + "\n"


def test_sample_is_the_committed_one(kvlink: Kvlink, tmp_path: Path) -> None:
    """``examples/`` can be made again: its worlds depend on nothing but their seeds."""
    assert kvlink("sample", str(tmp_path), "--worlds", "12", "--questions", "1").returncode == 0
    examples = Path(__file__).parent.parent / "examples"
    for name in ("corpus.jsonl", "questions.jsonl"):
        assert (tmp_path / name).read_text() == (examples / name).read_text()
