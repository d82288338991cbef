"""The manifests against KubeRay's CRDs, Kubernetes' schemas, and the rules that neither knows.

The rules are those by which KubeRay 1.7's operator refuses a resource that its CRD lets pass, and our own.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "infra" / "kuberay" / "base"
CHECKER = ROOT.parent / "shared" / "tools" / "check_manifests.py"
UNITS = {"Mi": 2**20, "Gi": 2**30}


# --- the rules -------------------------------------------------------------------------------------------------------


def faults(resource: dict[str, Any]) -> list[str]:
    """What the operator would refuse, and what we do not want, in a RayService or RayJob."""
    spec = resource["spec"]
    cluster = spec.get("rayClusterConfig") or spec["rayClusterSpec"]
    found = list(_cluster_faults(resource["metadata"]["name"], cluster))
    for where, pod in pod_specs(resource):
        found += [f"{where}: {fault}" for fault in _pod_faults(pod, runs_ray=where != "submitter")]
    found += _service_faults(spec, cluster) if resource["kind"] == "RayService" else _job_faults(spec)
    return found


def pod_specs(resource: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod that a resource leads to."""
    spec = resource["spec"]
    cluster = spec.get("rayClusterConfig") or spec["rayClusterSpec"]
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]
    if "submitterPodTemplate" in spec:
        yield "submitter", spec["submitterPodTemplate"]["spec"]


def _cluster_faults(name: str, cluster: dict[str, Any]) -> Iterator[str]:
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > 47:
        yield "the name is not a DNS-1035 label of at most 47 characters"
    if cluster["rayVersion"] != pinned("ray"):
        yield f"rayVersion is not that of constraints.txt, {pinned('ray')}"
    if cluster.get("authOptions") != {"mode": "token"}:
        yield "the dashboard runs what anyone sends it: authOptions.mode must be token"
    elif tuple(map(int, cluster["rayVersion"].split("."))) < (2, 52, 0):
        yield "token mode needs Ray 2.52"
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "the head takes work: num-cpus must be '0'"
    scales = cluster.get("enableInTreeAutoscaling", False)
    for group in cluster["workerGroupSpecs"]:
        low, replicas, high = (group.get(key) for key in ("minReplicas", "replicas", "maxReplicas"))
        if None in (low, replicas, high) or not low <= replicas <= high or (low != high) != scales:
            yield f"{group['groupName']}: {low} <= {replicas} <= {high} replicas with autoscaling {scales}"
    if scales and cluster["autoscalerOptions"].get("version") != "v2":
        yield "autoscalerOptions.version must be v2"
    templates = [cluster["headGroupSpec"]["template"], *(g["template"] for g in cluster["workerGroupSpecs"])]
    if scales and any(t["spec"].get("restartPolicy", "Never") != "Never" for t in templates):
        yield "autoscaler v2 wants restartPolicy Never or unset"
    if scales and not _is_confined(cluster["autoscalerOptions"]):
        yield "the autoscaler may gain privileges"


def _pod_faults(pod: dict[str, Any], *, runs_ray: bool) -> Iterator[str]:
    security = pod.get("securityContext", {})
    if not security.get("runAsNonRoot") or not security.get("runAsUser") or "fsGroup" not in security:
        yield "runs as root, or cannot write its volumes"
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "no seccomp profile"
    volumes = {volume["name"]: volume for volume in pod.get("volumes", ())}
    for container in [*pod.get("initContainers", ()), *pod["containers"]]:
        name = container["name"]
        if not _is_confined(container):
            yield f"{name} may gain privileges"
        resources = container.get("resources", {})
        if not {"cpu", "memory"} <= resources.get("requests", {}).keys() or "memory" not in resources.get("limits", {}):
            yield f"{name} has no requests or no memory limit"
        if {"livenessProbe", "readinessProbe"} & container.keys():
            yield f"{name} has a probe of its own, which switches KubeRay's off"
        if container["image"] != "kvlink":
            yield f"{name}: an image that kustomization.yaml does not set"
        if missing := {mount["name"] for mount in container.get("volumeMounts", ())} - volumes.keys():
            yield f"{name} mounts {missing}, which the pod lacks"
    if runs_ray:
        yield from _ray_pod_faults(pod, volumes)


def _ray_pod_faults(pod: dict[str, Any], volumes: dict[str, Any]) -> Iterator[str]:
    ray = pod["containers"][0]
    if pod.get("terminationGracePeriodSeconds", 30) < 60:
        yield "fewer than 60 s to finish requests"
    (shm,) = [m["name"] for m in ray["volumeMounts"] if m["mountPath"] == "/dev/shm"] or [None]
    shm_dir = volumes.get(shm, {}).get("emptyDir", {})
    memory = ray["resources"]["limits"]["memory"]
    if shm_dir.get("medium") != "Memory" or in_bytes(shm_dir["sizeLimit"]) < 0.3 * in_bytes(memory):
        yield "/dev/shm does not hold Ray's object store, 30 % of the memory"


def _service_faults(spec: dict[str, Any], cluster: dict[str, Any]) -> Iterator[str]:
    if spec.get("excludeHeadPodFromServeSvc") is not True:
        yield "the head takes requests"
    config = yaml.safe_load(spec["serveConfigV2"])
    port = config["http_options"]["port"]
    if config["http_options"]["host"] != "0.0.0.0":
        yield "nobody outside the pod reaches the service"
    for where, pod in pod_specs({"spec": spec}):
        ports = {p["name"]: p["containerPort"] for p in pod["containers"][0].get("ports", ())}
        if ports.get("serve") != port:
            yield f"{where}: no port called serve with the number {port}"
    # Every replica that autoscaling may add must find a place, or the autoscaler asks for pods for ever.
    (application,) = config["applications"]
    engine, ingress = application["args"]["engine"], application["args"]["ingress"]
    cpus = engine["autoscaling"]["max_replicas"] * engine["num_cpus"] + ingress["replicas"] * ingress["num_cpus"]
    room = sum(g["maxReplicas"] * int(_cpus(g)) for g in cluster["workerGroupSpecs"])
    if cpus > room:
        yield f"{cpus} CPUs asked for, the cluster grows to {room}"
    grace = min(pod["terminationGracePeriodSeconds"] for _, pod in pod_specs({"spec": spec}))
    if engine["shutdown_timeout_s"] >= grace:
        yield "pods end before their replicas have finished"


def _job_faults(spec: dict[str, Any]) -> Iterator[str]:
    mode = spec.get("submissionMode", "K8sJobMode")
    if "$" in spec["entrypoint"] and mode == "K8sJobMode":
        environment = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["envFrom"]
        template = spec.get("submitterPodTemplate", {"spec": {"containers": [{}]}})
        if template["spec"]["containers"][0].get("envFrom") != environment:
            yield "the submitter's shell expands the entrypoint, without the cluster's environment"
    if mode == "SidecarMode" and {"submitterPodTemplate", "submitterConfig"} & spec.keys():
        yield "SidecarMode forbids submitter settings"
    if spec.get("ttlSecondsAfterFinished", 0) and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if "activeDeadlineSeconds" not in spec or "backoffLimit" not in spec:
        yield "the job may run for ever, or gives up at the first fault"


def _is_confined(container: dict[str, Any]) -> bool:
    security = container.get("securityContext", {})
    return security.get("allowPrivilegeEscalation") is False and security.get("capabilities") == {"drop": ["ALL"]}


def _cpus(group: dict[str, Any]) -> str:
    return str(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])


def in_bytes(quantity: str) -> int:
    """``6Gi`` as a number."""
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def pinned(package: str) -> str:
    """The version in ``constraints.txt``."""
    (line,) = re.findall(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return str(line)


# --- what we ship keeps them -----------------------------------------------------------------------------------------


def test_the_resources_keep_all_rules(rayservice: Any, rayjob: Any, trainjob: Any) -> None:
    assert faults(rayservice) == []
    assert faults(rayjob) == []
    assert faults(trainjob) == []


def test_the_training_job_asks_for_what_it_has(trainjob: Any) -> None:
    from pipeline.train import main

    command = trainjob["spec"]["entrypoint"]
    (group,) = trainjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert f"--workers {group['replicas']} --gpu" in command
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    # Its options are ones that the script has: what is wrong is the recipe, which is not there.
    script, *options = command.replace("python ", "", 1).split()
    assert (ROOT / script).exists()
    assert main([option.strip('"') for option in options]) == 2


def test_job_and_service_use_the_same_model(rayservice: Any, rayjob: Any) -> None:
    (application,) = yaml.safe_load(rayservice["spec"]["serveConfigV2"])["applications"]
    assert f"--model {application['args']['model']} " in rayjob["spec"]["entrypoint"]


def test_the_service_takes_its_settings(rayservice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray's own schema ignores what it does not know; ours refuses it.
    from serve.config import ServiceConfig

    monkeypatch.setenv("KVLINK_STORE", "/somewhere")
    (application,) = yaml.safe_load(rayservice["spec"]["serveConfigV2"])["applications"]
    assert ServiceConfig.model_validate(application["args"]).store == "/somewhere"


def test_resources_satisfy_kuberays_schema() -> None:
    if not CHECKER.exists():
        pytest.skip("KubeRay's CRDs are not here: ../shared/tools/check_manifests.py is missing")
    files = [str(BASE / name) for name in ("rayjob.yaml", "rayservice.yaml", "../train/rayjob.yaml")]
    done = subprocess.run([sys.executable, str(CHECKER), *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" OK") == len(files)


def test_pods_and_core_resources_satisfy_kubernetes_schema(rayservice: Any, rayjob: Any, trainjob: Any) -> None:
    kubernetes_validate.validate(yaml.safe_load((BASE / "store.yaml").read_text()), "1.31", strict=True)
    for resource in (rayservice, rayjob, trainjob):
        for where, spec in pod_specs(resource):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": where}, "spec": spec}
            kubernetes_validate.validate(pod, "1.31", strict=True)


# --- each rule can fail ----------------------------------------------------------------------------------------------


def _ray(resource: Any) -> Any:
    spec = resource["spec"]
    return (spec.get("rayClusterConfig") or spec["rayClusterSpec"])["headGroupSpec"]["template"]["spec"]


def _config(resource: Any, old: str, new: str) -> None:
    assert old in resource["spec"]["serveConfigV2"]
    resource["spec"]["serveConfigV2"] = resource["spec"]["serveConfigV2"].replace(old, new)


Change = Callable[[Any], Any]
SERVICE: list[tuple[str, Change]] = [
    ("DNS-1035", lambda r: r["metadata"].update(name="9lives")),
    ("constraints.txt", lambda r: r["spec"]["rayClusterConfig"].update(rayVersion="2.59.0")),
    ("authOptions.mode", lambda r: r["spec"]["rayClusterConfig"].pop("authOptions")),
    ("needs Ray 2.52", lambda r: r["spec"]["rayClusterConfig"].update(rayVersion="2.51.9")),
    ("the head takes work", lambda r: r["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"].clear()),
    ("replicas with autoscaling", lambda r: r["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].update(minReplicas=9)),
    ("must be v2", lambda r: r["spec"]["rayClusterConfig"]["autoscalerOptions"].update(version="v1")),
    ("restartPolicy", lambda r: _ray(r).update(restartPolicy="Always")),
    ("autoscaler may", lambda r: r["spec"]["rayClusterConfig"]["autoscalerOptions"].pop("securityContext")),
    ("runs as root", lambda r: _ray(r)["securityContext"].update(runAsNonRoot=False)),
    ("seccomp", lambda r: _ray(r)["securityContext"].pop("seccompProfile")),
    ("may gain", lambda r: _ray(r)["containers"][0].pop("securityContext")),
    ("no memory limit", lambda r: _ray(r)["initContainers"][0]["resources"].pop("limits")),
    ("probe", lambda r: _ray(r)["containers"][0].update(readinessProbe={"tcpSocket": {"port": 8000}})),
    ("an image", lambda r: _ray(r)["containers"][0].update(image="kvlink:latest")),
    ("which the pod lacks", lambda r: _ray(r)["volumes"].pop(0)),
    ("60 s", lambda r: _ray(r).update(terminationGracePeriodSeconds=30)),
    ("/dev/shm", lambda r: _ray(r)["volumes"][1]["emptyDir"].update(sizeLimit="1Gi")),
    ("head takes requests", lambda r: r["spec"].pop("excludeHeadPodFromServeSvc")),
    ("outside the pod", lambda r: _config(r, "0.0.0.0", "127.0.0.1")),
    ("called serve", lambda r: _config(r, "8000", "8001")),
    ("CPUs asked for", lambda r: _config(r, "max_replicas: 4", "max_replicas: 9")),
    ("before their replicas", lambda r: _config(r, "shutdown_timeout_s: 45", "shutdown_timeout_s: 60")),
]
JOB: list[tuple[str, Change]] = [
    ("submitter's shell", lambda r: r["spec"].pop("submitterPodTemplate")),
    ("SidecarMode", lambda r: r["spec"].update(submissionMode="SidecarMode")),
    ("shutdownAfterJobFinishes", lambda r: r["spec"].pop("shutdownAfterJobFinishes")),
    ("for ever", lambda r: r["spec"].pop("activeDeadlineSeconds")),
]


@pytest.mark.parametrize(("fault", "change"), SERVICE, ids=[fault for fault, _ in SERVICE])
def test_a_wrong_service_is_found(rayservice: Any, fault: str, change: Change) -> None:
    change(rayservice)
    assert any(fault in each for each in faults(rayservice)), faults(rayservice)


@pytest.mark.parametrize(("fault", "change"), JOB, ids=[fault for fault, _ in JOB])
def test_a_wrong_job_is_found(rayjob: Any, fault: str, change: Change) -> None:
    change(rayjob)
    assert any(fault in each for each in faults(rayjob)), faults(rayjob)
