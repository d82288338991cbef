"""The command line: one line and exit code 2 for bad input, a table and JSON for what was done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvlink_core.models.describe import describe_model
from kvlink_core.store import DocumentStore
from kvlink_core.types import DocumentCache
from pipeline import job
from pipeline.cli import main
from pipeline.config import PrecomputeConfig
from pipeline.summary import Failure, Summary

SCRIPT = Path(__file__).parents[2] / "pipeline" / "precompute.py"


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of this is known before Ray is started."""

    def fail(config: PrecomputeConfig) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(job, "start_ray", fail)


@pytest.fixture
def places(tmp_path: Path, tiny_model_dir: Path) -> dict[str, str]:
    (tmp_path / "corpus.jsonl").write_text('{"id": "a", "text": "Hello."}\n')
    (tmp_path / "file").write_text("not a folder")
    other = tmp_path / "other-store"
    store = DocumentStore.open(str(other), fingerprint=describe_model("embedded").fingerprint, create=True)
    nothing = torch.zeros(1, 1, 1, 1)
    store.commit(store.write_shard([("a", DocumentCache(torch.zeros(1, dtype=torch.int64), nothing, nothing))]))
    return {
        "corpus": str(tmp_path / "corpus.jsonl"),
        "model": str(tiny_model_dir),
        "store": str(tmp_path / "store"),
        "file": str(tmp_path / "file"),
        "other": str(other),
        "tmp": str(tmp_path),
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "--input is missing; --store is missing"),
        ("--input {corpus}", "--store is missing"),
        ("--nonsense", "No such option: --nonsense"),
        ("--actors many", "'--actors'"),
        ("--input {corpus} --store {store} --actors 0", "--actors: Input should be greater than or equal to 1"),
        ("--input {corpus} --store {store} --storage-option x", "'x' is not KEY=VALUE"),
        ("--config {tmp}/none.yaml", "cannot read the configuration"),
        ("--input {tmp}/none --store {store} --model {model}", "no corpus at"),
        ("--input {file} --store {store} --model {model}", "unknown ending"),
        ("--input {corpus} --store {store} --model {tmp}/none", "no model at"),
        ("--input {corpus} --store {store} --model random:none", "unknown shape 'none'"),
        ("--input {corpus} --store {store} --model {model} --codec none", "no codec 'none'"),
        ("--input {corpus} --store {store} --model {model} --places 3", "one cache is good for all places"),
        ("--input {corpus} --store {file} --model {model}", "Not a directory"),
        ("--input {corpus} --store {file}/below --model {model}", "Not a directory"),
        (
            "--input {corpus} --store nonsense://x --model {model}",
            "a store can be a local path or s3://..., not nonsense://",
        ),
        ("--input {corpus} --store {store} --shard-mb inf", "--shard-mb: Input should be a finite number"),
        ("--input {corpus} --store {other} --model {model}", "was made with another model"),
        ("--input {corpus} --store {store} --model {model} --summary-json {tmp}/no/where", "cannot write the summary"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    places: dict[str, str], capfd: pytest.CaptureFixture[str], arguments: str, says: str
) -> None:
    assert main([a.format(**places) for a in arguments.split()]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_a_relative_store_in_a_submitted_job_is_refused(
    places: dict[str, str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert main(["--input", places["corpus"], "--store", "store"]) == 2
    assert "inside a directory that Ray deletes" in capfd.readouterr().err


def test_help_teaches(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capfd.readouterr().out
    for text in ("ray job submit", "--input corpus.jsonl --store ./store", "EXIT CODE", "--commit-interval-s"):
        assert text in out


@pytest.mark.parametrize(("strict", "code"), [(False, 0), (True, 1)])
def test_what_was_done_is_a_table_and_json(
    places: dict[str, str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    strict: bool,
    code: int,
) -> None:
    failures = [Failure(f"f:{i}", f"[red]{i}", "no_text" if i else "empty_document", "why [b]") for i in range(30)]
    summary = Summary(
        documents=1234,
        encoded=5,
        encoded_tokens=1000,
        encode_s=0.5,
        failed=failures,
        stale=[f"[red]#{i}" for i in range(25)],
    )
    given: list[PrecomputeConfig] = []
    monkeypatch.setattr(job, "run", lambda config: given.append(config) or summary)
    path = tmp_path / "summary.json"
    arguments = ["--input", places["corpus"], "--store", places["store"], "--summary-json", str(path)]
    assert main([*arguments, "--num-gpus", "0.5", *(["--strict"] if strict else [])]) == code
    assert (given[0].input, given[0].num_gpus, given[0].strict) == ([places["corpus"]], 0.5, strict)

    out = capfd.readouterr().out
    assert "1,234" in out
    assert "30 (empty_document 1, no_text 29)" in out
    assert "failed (empty_document): '[red]0' at f:0: why [b]" in out
    assert "... and 20 more; --summary-json" in out
    assert "stale: '[red]#0' is in the store with a former text" in out
    assert "... and 15 more stale ids" in out
    last = json.loads(out.splitlines()[-1])
    assert (last["documents"], last["tokens_per_s"], last["failed_count"], len(last["failed"])) == (
        1234,
        2000.0,
        30,
        20,
    )
    assert (last["stale_count"], last["stale"]) == (25, summary.stale[:20])
    assert json.loads(path.read_text()) == summary.as_dict()
    assert len(summary.as_dict()["failed"]) == 30


def test_the_script_runs_from_any_folder(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), "--input", "absent.jsonl", "--store", "store"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == (
        "error: no corpus at 'absent.jsonl': there is no file that ends in .jsonl, .jsonl.gz, .parquet, .txt, .md.\n"
    )
