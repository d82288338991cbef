"""The kustomizations: what they name exists, and what they render is whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "infra" / "kuberay"
CHECKER = ROOT.parent / "shared" / "tools" / "check_manifests.py"
VARIANTS = ("base", "s3", "train")


def kustomization(variant: str) -> Any:
    return yaml.safe_load((KUBERAY / variant / "kustomization.yaml").read_text())


def values(node: Any, key: str) -> Iterator[Any]:
    """All values under a key, however deep."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(node, list):
        for item in node:
            yield from values(item, key)


def base_resources() -> list[Any]:
    return [yaml.safe_load((KUBERAY / "base" / name).read_text()) for name in kustomization("base")["resources"]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_file_is_listed_and_every_listed_file_exists(variant: str) -> None:
    folder = KUBERAY / variant
    listed = {*kustomization(variant)["resources"], *kustomization(variant)["configurations"]}
    assert all((folder / name).exists() for name in listed)
    assert {f.name for f in folder.iterdir()} - {"kustomization.yaml"} == {n for n in listed if n != "../base"}


def test_names_that_resources_refer_to_exist() -> None:
    resources = base_resources()
    claims = {r["metadata"]["name"] for r in resources if r["kind"] == "PersistentVolumeClaim"}
    maps = {g["name"] for g in kustomization("base")["configMapGenerator"]}
    assert {c["claimName"] for c in values(resources, "persistentVolumeClaim")} == claims
    assert {c["name"] for c in values(resources, "configMapRef")} == maps
    assert {g["name"] for g in kustomization("s3")["configMapGenerator"]} == maps
    # A Secret is the cluster owner's to make, so nothing may stop without it.
    assert all(s["optional"] is True for s in values(resources, "secretRef"))


def test_overlays_have_the_same_kustomizeconfig() -> None:
    texts = {(KUBERAY / variant / "kustomizeconfig.yaml").read_text() for variant in VARIANTS}
    assert len(texts) == 1


def test_the_image_tag_is_the_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tags = [kustomization(variant)["images"][0]["newTag"] for variant in ("base", "train")]
    assert tags == [project["version"], f"{project['version']}-train"]


@pytest.fixture(params=VARIANTS)
def rendered(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """What ``kubectl apply -k`` would send, with another image name, in a file."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not here, so nothing can render the kustomizations")
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    for variant in ("base", "train"):
        file = tmp_path / "kuberay" / variant / "kustomization.yaml"
        file.write_text(file.read_text().replace("newName: kvlink", "newName: registry.example/kvlink"))
    command = [kubectl, "kustomize", str(tmp_path / "kuberay" / request.param)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "rendered.yaml"
    out.write_text(done.stdout)
    return request.param, out


def test_rendered_resources_are_whole(rendered: tuple[str, Path]) -> None:
    variant, path = rendered
    if variant == "train":
        _assert_training_is_whole(path)
        return
    resources = {r["kind"]: r for r in yaml.safe_load_all(path.read_text())}
    kinds = {"ConfigMap", "PersistentVolumeClaim", "RayJob", "RayService"}
    assert resources.keys() == (kinds if variant == "base" else kinds - {"PersistentVolumeClaim"})
    both = [resources["RayJob"], resources["RayService"]]
    images = set(values(both, "image"))
    assert images == {f"registry.example/kvlink:{kustomization('base')['images'][0]['newTag']}"}
    # The generated name, with its hash, has reached every reference.
    config_map = resources["ConfigMap"]
    assert {c["name"] for c in values(both, "configMapRef")} == {config_map["metadata"]["name"]} != {"kvlink"}
    assert config_map["data"].keys() == {"KVLINK_STORE", "KVLINK_CORPUS"}
    assert config_map["data"]["KVLINK_STORE"].startswith("s3://") == (variant == "s3")
    mounts = [m for ms in values(both, "volumeMounts") for m in ms]
    volumes = [v for vs in values(both, "volumes") for v in vs]
    if variant == "base":
        store = config_map["data"]["KVLINK_STORE"]
        places = {m["mountPath"] for m in mounts if m["name"] == "store"}
        assert len(places) == 1
        assert store.startswith(places.pop() + "/")
    else:
        assert {v["name"] for v in volumes} == {"keys", "shm"}
        assert {m["name"] for m in mounts} == {"keys", "shm"}
    for kind in resources.keys() - {"RayJob", "RayService"}:
        kubernetes_validate.validate(resources[kind], "1.31", strict=True)


def _assert_training_is_whole(path: Path) -> None:
    resources = {r["kind"]: r for r in yaml.safe_load_all(path.read_text())}
    assert resources.keys() == {"ConfigMap", "RayJob"}
    job, config_map = resources["RayJob"], resources["ConfigMap"]
    assert set(values(job, "image")) == {f"registry.example/kvlink:{kustomization('train')['images'][0]['newTag']}"}
    assert {c["name"] for c in values(job, "configMapRef")} == {config_map["metadata"]["name"]} != {"kvlink-train"}
    assert all(f'"${name}"' in job["spec"]["entrypoint"] for name in config_map["data"])
    # The volume is the base's.
    claims = {r["metadata"]["name"] for r in base_resources() if r["kind"] == "PersistentVolumeClaim"}
    assert {c["claimName"] for c in values(job, "persistentVolumeClaim")} == claims


def test_rendered_resources_satisfy_kuberays_schema(rendered: tuple[str, Path]) -> None:
    if not CHECKER.exists():
        pytest.skip("KubeRay's CRDs are not here: ../shared/tools/check_manifests.py is missing")
    command = [sys.executable, str(CHECKER), str(rendered[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" OK") == (1 if rendered[0] == "train" else 2)
