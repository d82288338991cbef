"""What the tests of the service share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_service import Service, running_service

from kvlink_core.models import LoadedModel

with warnings.catch_warnings():
    # Ray Serve 2.60 defines its own schemas with keywords that pydantic has deprecated.
    warnings.simplefilter("ignore")
    import ray.serve.schema  # noqa: F401


@pytest.fixture(scope="package")
def service(
    ray_session: None, tiny_model: LoadedModel, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """The application of ``serve run serve.app:build_app store=... model=...``, one for all tests of this folder."""
    with running_service(tiny_model, tiny_model_dir, tmp_path_factory.mktemp("service")) as running:
        yield running
