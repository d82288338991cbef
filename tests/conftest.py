"""Fixtures of all tests. The environment is set before anything imports Ray or transformers."""

from __future__ import annotations

import os

os.environ.update(
    # Tiny models gain nothing from threads, and spinning ones starve whatever else a test has started.
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
)

from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Kvlink, runner
from tiny import save_tiny

from kvlink_core.models import LoadedModel, load_model


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: tiny random Llama, byte tokenizer, link tokens."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_model(tiny_model_dir: Path) -> LoadedModel:
    """That model, loaded."""
    return load_model(str(tiny_model_dir))


@pytest.fixture
def kvlink(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Kvlink:
    """The ``kvlink`` command."""
    return runner(monkeypatch, capsys)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests that need one."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    yield
    ray.shutdown()
