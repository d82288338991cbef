"""Settings: YAML and command line, and every way to get them wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvlink_core.errors import ConfigError
from pipeline.config import PrecomputeConfig, load_config

CONFIGS = sorted((Path(__file__).parents[2] / "pipeline" / "configs").glob("*.yaml"))


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("input: corpus\nstore: s\nactors: 2\nstorage_options: {a: '1', b: '2'}\n")
    config = load_config(str(path), {"actors": 3, "store": None, "storage_options": {"b": "3"}})
    assert (config.input, config.store, config.actors) == (["corpus"], "s", 3)
    assert config.storage_options == {"a": "1", "b": "3"}


def test_a_gpu_means_cuda() -> None:
    base = {"input": ["i"], "store": "s"}
    assert PrecomputeConfig(**base).encoder_device == "cpu"
    assert PrecomputeConfig(**base, num_gpus=0.5).encoder_device == "cuda"
    assert PrecomputeConfig(**base, num_gpus=1, device="cuda:1").encoder_device == "cuda:1"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"store": "s"}, "--input is missing"),
        ({"input": "i"}, "--store is missing"),
        ({"input": [], "store": "s"}, "--input: .*at least 1 item"),
        ({"input": "i", "store": ""}, "--store: "),
        ({"input": "i", "store": "s", "actor": 2}, "unknown key 'actor'.*Known keys: input,"),
        ({"input": "i", "store": "s", "actors": 0}, r"--actors: .*greater than or equal to 1 \(got 0\)"),
        ({"input": "i", "store": "s", "actors": "2"}, "--actors: .*valid integer"),
        ({"input": "i", "store": "s", "num_gpus": -1}, "--num-gpus: "),
        ({"input": "i", "store": "s", "shard_mb": float("nan")}, "--shard-mb: "),
        ({"input": "i", "store": "s", "shard_mb": float("inf")}, "--shard-mb: .*finite number"),
        ({"input": "i", "store": "s", "shard_mb": 1e305}, "--shard-mb: .*less than or equal"),
        ({"input": "i", "store": "s", "no_progress_timeout_s": float("inf")}, "--no-progress-timeout-s: .*finite"),
        ({"input": "i", "store": "s", "dtype": "int8"}, "--dtype: .*'float32', 'bfloat16' or 'float16'"),
        ({"input": "i", "store": "s", "bad_files": "maybe"}, "--bad-files: "),
    ],
)
def test_wrong_settings_are_said_in_one_line(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        load_config(None, values)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"input: [", "is not YAML"),
        (b"- a\n", "must be a mapping"),
        (b"", "must be a mapping"),
        (b"\xff", "is not YAML"),
        (None, "cannot read the configuration"),
    ],
)
def test_a_configuration_file_that_is_none(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        load_config(str(path), {})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_the_shipped_configurations_are_valid(path: Path) -> None:
    assert load_config(str(path), {"input": ["corpus"], "store": "/tmp/store"}).input == ["corpus"]


def test_there_are_shipped_configurations() -> None:
    assert CONFIGS
