"""The Dockerfile, as far as it can be checked without an engine that builds it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def arguments(image: Any, instruction: str) -> list[str]:
    return [rest for name, rest in image.instructions if name == instruction]


def test_base_image_is_pinned_and_its_python_supported(image: Any) -> None:
    (base,) = arguments(image, "FROM")
    version = re.fullmatch(r"python:3\.(\d+)-slim-\w+", base)
    assert version is not None
    assert int(version[1]) >= 11


def test_copied_files_exist_and_nothing_else_is_sent(image: Any) -> None:
    sources = [source for source, _ in image.copies]
    assert [s for s in sources if not (ROOT / s).exists()] == []
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert sorted(line[1:] for line in lines if line.startswith("!")) == sorted(sources)


def test_pip_installs_only_pinned_versions(image: Any) -> None:
    installs = [run for run in arguments(image, "RUN") if "pip install" in run]
    assert len(installs) == 2
    assert all("--no-cache-dir -c constraints.txt " in run for run in installs)
    # What is installed first must not be installed again, in another build, by what comes after.
    assert installs[0].endswith(" torch")
    assert "==" not in "".join(installs)


def test_extras_are_ones_that_the_project_has(image: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = [rest.partition("=")[2] for rest in arguments(image, "ARG") if rest.startswith("EXTRAS=")]
    assert {*extras.split(","), "train"} <= project["optional-dependencies"].keys()


def test_runs_as_a_user_that_kubernetes_can_tell_is_not_root(image: Any, rayservice: Any) -> None:
    last_user = arguments(image, "USER")[-1]
    head = rayservice["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["securityContext"]
    assert last_user == f"{head['runAsUser']}:{head['runAsGroup']}"
    assert head["runAsUser"] > 0


def test_has_what_kuberay_calls(image: Any) -> None:
    # bash and grep are part of the base image. The autoscaler runs from this image as well.
    assert any("apt-get install" in run and "wget" in run for run in arguments(image, "RUN"))
    modules = "_private.kuberay.run_autoscaler", "v2.instance_manager.cloud_providers.kuberay.cloud_provider"
    imports = "\n".join(f"import ray.autoscaler.{module}" for module in modules)
    subprocess.run([sys.executable, "-W", "ignore", "-c", imports], check=True, timeout=60)


def test_holds_no_secret(image: Any) -> None:
    names = [pair.split("=")[0] for pair in arguments(image, "ARG")] + list(image.env)
    assert [n for n in names if re.search("TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY", n)] == []


def test_paths_agree_with_the_manifests(image: Any, config_map: dict[str, str]) -> None:
    corpus = config_map["KVLINK_CORPUS"]
    assert image.env["PYTHONPATH"] == image.workdir
    assert (ROOT / Path(corpus).relative_to(image.workdir)).exists()
