"""What the tests of infra/ read: the manifests as their files hold them, and what the Dockerfile puts where."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "infra" / "kuberay"


@dataclass
class Image:
    """The Dockerfile as instructions, and what of it a test can hold against the checkout."""

    instructions: list[tuple[str, str]]
    workdir: str = "/"
    env: dict[str, str] = field(default_factory=dict)
    copies: list[tuple[str, str]] = field(default_factory=list)

    def stage(self, directory: Path) -> None:
        """Copy into ``directory`` what the image has in its working directory."""
        for source, target in self.copies:
            place = directory / target
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                if target.endswith("/"):
                    place = place / Path(source).name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, place)


def parse_dockerfile(text: str) -> Image:
    """Read the instructions that matter here; an unknown form of ``COPY`` fails loudly."""
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    image = Image([tuple(line.split(maxsplit=1)) for line in lines if line.strip()])  # type: ignore[misc]
    for name, rest in image.instructions:
        if name == "WORKDIR":
            image.workdir = rest
        elif name == "ENV":
            image.env.update(pair.split("=", 1) for pair in shlex.split(rest))
        elif name == "COPY":
            assert not rest.startswith(("-", "[")), f"this test does not understand COPY {rest}"
            *sources, target = rest.split()
            assert len(sources) == 1 or target.endswith("/"), f"many sources need a folder: COPY {rest}"
            image.copies += [(source, target) for source in sources]
    return image


@pytest.fixture(scope="session")
def image() -> Image:
    """The Dockerfile."""
    return parse_dockerfile((ROOT / "infra" / "Dockerfile").read_text())


def _resource(name: str, variant: str = "base") -> Any:
    return yaml.safe_load((KUBERAY / variant / name).read_text())


@pytest.fixture
def rayservice() -> Any:
    """The RayService, fresh for each test."""
    return _resource("rayservice.yaml")


@pytest.fixture
def rayjob() -> Any:
    """The RayJob, fresh for each test."""
    return _resource("rayjob.yaml")


@pytest.fixture
def trainjob() -> Any:
    """The RayJob that trains, fresh for each test."""
    return _resource("rayjob.yaml", "train")


@pytest.fixture(scope="session")
def config_map() -> dict[str, str]:
    """The environment that the base gives to every pod."""
    (generator,) = _resource("kustomization.yaml")["configMapGenerator"]
    return dict(pair.split("=", 1) for pair in generator["literals"])
