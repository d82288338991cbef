"""Recipes as files: those that ship are the papers', and what a recipe cannot mean is refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from command import Kvlink

from kvlink_core.errors import ConfigError
from kvlink_core.training.recipes.config import SHIPPED, read_recipe, shipped


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_valid(name: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(shipped(name))
    read_recipe(str(tmp_path / "r.yaml"))


def test_the_papers_settings(tmp_path: Path) -> None:
    for name in SHIPPED:
        (tmp_path / f"{name}.yaml").write_text(shipped(name))
    kvlink = read_recipe(str(tmp_path / "kvlink.yaml"))
    assert (kvlink.learning_rate, kvlink.rows, kvlink.steps, kvlink.warmup_steps) == (5e-6, 64, 6000, 600)
    assert (kvlink.links.k, kvlink.max_tokens, sum(s.weight for s in kvlink.mixture)) == (5, 4096, 100)
    wrap = read_recipe(str(tmp_path / "soft-wrap.yaml"))
    assert (wrap.wrap.header, wrap.wrap.trailer, wrap.learning_rate, wrap.schedule) == (8, 8, 5e-4, "linear")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"colour": 1}, "colour: Extra inputs"),
        ({"links": {"k": 2, "tokens": ["a"]}}, "1 tokens do not make k=2"),
        ({"links": {"k": 0}, "train": "links"}, "needs links.k of 1 or more"),
        ({"lora": {"rank": 4}, "train": "links"}, "lora is for train: model"),
        ({"train": "wrap", "mixture": [{"path": "a", "kind": "instruct"}]}, "needs documents"),
        ({"mixture": []}, "mixture"),
        ({"learning_rate": "much"}, "learning_rate"),
    ],
)
def test_what_is_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    keys = {**yaml.safe_load(shipped("kvlink")), **change}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(keys))
    with pytest.raises(ConfigError, match=said):
        read_recipe(str(tmp_path / "r.yaml"))


def test_values_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(shipped("kvlink"))
    recipe = read_recipe(str(tmp_path / "r.yaml"), ("links.k=1", "steps=7", "lora={rank: 4}"))
    assert recipe.lora is not None
    assert (recipe.links.k, recipe.steps, recipe.lora.rank) == (1, 7, 4)
    for bad, said in (("steps", "not key=value"), ("steps.x=1", "no keys of its own"), ("steps=[", "not YAML")):
        with pytest.raises(ConfigError, match=said):
            read_recipe(str(tmp_path / "r.yaml"), (bad,))


def test_paths_are_seen_from_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(shipped("link-only"))
    recipe = read_recipe(str(tmp_path / "r.yaml"))
    assert recipe.mixture[0].path == tmp_path / "qa.jsonl"
    assert recipe.model == str(tmp_path / "path/to/model")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("train", "--help"), 0, "kvlink train kvlink --show"),
        (("train", "soft-wrap", "--show"), 0, "train: wrap"),
        (("train", "other", "--show"), 2, "no recipe 'other' ships"),
        (("train", "kvlink", "--out", "x"), 2, "`kvlink train kvlink --show` prints"),
        (("train", "/nowhere.yaml", "--out", "x"), 2, "there is no recipe file"),
    ],
)
def test_the_command(kvlink: Kvlink, arguments: tuple[str, ...], code: int, said: str) -> None:
    done = kvlink(*arguments)
    assert done.returncode == code
    assert said in " ".join((done.stdout + done.stderr).split())
