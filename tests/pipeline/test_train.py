"""Ray Train around ``kvlink train``: two workers give a model that loads, and close to what one process gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kvlink_core.models import load_model
from kvlink_core.training.recipes.config import Recipe
from pipeline.train import main, run


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
def test_two_workers(ray_session: None, tiny_model_dir: Path, tmp_path: Path) -> None:
    lines = [{"question": "Who?", "answer": f"A{i}.", "documents": ["Anna sings.", "No."]} for i in range(8)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = Recipe.model_validate(
        {
            "train": "links",
            "model": str(tiny_model_dir),
            "mixture": [{"path": tmp_path / "qa.jsonl", "kind": "qa"}],
            "links": {"k": 3},
            "max_tokens": 128,
            "rows": 4,
            "steps": 3,
            "warmup_steps": 0,
            "learning_rate": 0.01,
            "dtype": "float32",
            "gradient_checkpointing": False,
        }
    )
    run(recipe, tmp_path / "two", workers=2, gpu=False)
    from kvlink_core.training.recipes.run import train

    train(recipe, tmp_path / "one", device="cpu")
    rows = [
        load_file(str(tmp_path / n / "model.safetensors"))["model.embed_tokens.weight"][263:266] for n in ("one", "two")
    ]
    assert float((rows[0] - rows[1]).abs().max()) < 1e-4
    assert load_model(str(tmp_path / "two")).default_linker == "link-tokens"


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.yaml"), "--out", str(tmp_path / "o")]) == 2
    assert "there is no recipe file" in capsys.readouterr().err


def test_a_job_that_is_tried_again_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = [{"path": tmp_path / "qa.jsonl", "kind": "qa"}]
    recipe = Recipe.model_validate({"train": "links", "model": "embedded", "mixture": mixture, "links": {"k": 1}})
    monkeypatch.setattr("pipeline.train.read_recipe", lambda *_: recipe)
    resumed = []
    monkeypatch.setattr("pipeline.train.run", lambda *_, resume, **__: resumed.append(resume))
    out = tmp_path / "o"
    command = ["r.yaml", "--out", str(out)]
    for options in (["--retry"], []):
        assert main([*command, *options]) == 0
    (out / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    for options in (["--retry"], ["--resume"], []):
        assert main([*command, *options]) == 0
    assert resumed == [False, False, True, True, False]
