"""The RayJob's entrypoint and the RayService's ``serveConfigV2``, word for word, on a local Ray.

One Ray head stands for the pods. It is started as KubeRay starts it, with the environment that the image, the ConfigMap
and the token mode give, in a folder that holds exactly the files that the image gets. Only places differ: the image's
and the volume's folders are mapped to temporary ones, and ports to free ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from processes import free_ports, kill_tree

from serve.keys import create_key

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "0123456789abcdef" * 4


@dataclass
class Pod:
    """A running Ray head, and what a container beside it would see."""

    env: dict[str, str] = field(repr=False)  # of whoever runs the tests, too
    cwd: Path
    dashboard: str
    agent: str
    serve: str

    @contextmanager
    def shell(self, line: str) -> Iterator[subprocess.Popen[str]]:
        """Run a line as KubeRay's containers do, both outputs in one; at the end it is not running any more."""
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = ["/bin/bash", "-ce", "--", line]
        with subprocess.Popen(command, env=self.env, cwd=self.cwd, start_new_session=True, **out) as process:
            try:
                yield process
            finally:
                kill_tree(process)

    def api(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        """Ask the dashboard, as the operator does."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return httpx.request(method, self.dashboard + path, headers=headers, timeout=60, **kwargs)


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder for all that the pod writes. Not pytest's: Ray's sockets are in it, whose paths are 107 long at most."""
    with tempfile.TemporaryDirectory(prefix="kvl-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def pod(home: Path, image: Any, config_map: dict[str, str]) -> Iterator[Pod]:
    """Start the head; kill it and all that it started at the end."""
    code, volume = home / "opt", home / "var"
    volume.mkdir()
    image.stage(code)
    places = {image.workdir: str(code), "/var/lib/kvlink": str(volume)}
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "KVLINK_"))}
    env |= {name: mapped(value, places) for name, value in (image.env | config_map).items()}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "HOME": str(home)}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    gcs, dashboard, agent, metrics, client, serve = free_ports(6)
    start = (
        f"ray start --head --block --temp-dir {home}/ray --port {gcs} --dashboard-port {dashboard} --num-cpus 2"
        f" --dashboard-agent-listen-port {agent} --metrics-export-port {metrics} --ray-client-server-port {client}"
        f" --object-store-memory 100000000 --disable-usage-stats"
    )
    with (home / "log").open("w") as log:
        head = subprocess.Popen(start.split(), env=env, cwd=code, stdout=log, stderr=log, start_new_session=True)
    try:
        local = "http://127.0.0.1"
        pod = Pod(env, code, f"{local}:{dashboard}", f"{local}:{agent}", f"{local}:{serve}")
        wait_for(lambda: succeeds(f"{pod.agent}/api/healthz"), 90, lambda: (home / "log").read_text())
        # Serve keeps the port that it was first started with, so what is deployed afterwards can say 8000.
        http = {"host": "127.0.0.1", "port": serve}
        pod.api("PUT", "/api/serve/applications/", json={"http_options": http, "applications": []}).raise_for_status()
        yield pod
    finally:
        kill_tree(head)


def test_the_job_then_the_service(pod: Pod, rayjob: Any, rayservice: Any) -> None:
    entrypoint = rayjob["spec"]["entrypoint"]
    head = rayservice["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    (wait_for_store,) = head["initContainers"]

    # While there is no store, the service's head waits and says why.
    with pod.shell(*wait_for_store["args"]) as waiting:
        assert "StoreNotFoundError" in waiting.stdout.readline()
        assert waiting.poll() is None

    # KubeRay's submitter has this line, with a status check and a log follower around it.
    with pod.shell(f"ray job submit --address {pod.dashboard} --submission-id once -- {entrypoint} ;") as job:
        said, _ = job.communicate(timeout=180)
    assert job.returncode == 0, said
    with pod.shell(*wait_for_store["args"]) as waiting:
        waited, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0, waited

    # What the operator sends; the keys are where a Secret would be.
    _, key = create_key(pod.cwd / "keys.json", namespace="default", role="user")
    sent = rayservice["spec"]["serveConfigV2"].replace("/etc/kvlink/keys/keys.json", str(pod.cwd / "keys.json"))
    config = yaml.safe_load(sent)
    # A small model computes about as fast as it reads: this is to show that it can read.
    config["applications"][0]["args"]["tiers"] = {"recompute": "never"}
    pod.api("PUT", "/api/serve/applications/", json=config).raise_for_status()
    wait_for(lambda: running(pod, "kvlink"), 180, lambda: pod.api("GET", "/api/serve/applications/").text)

    asked = json.loads((ROOT / "examples" / "questions.jsonl").read_text().splitlines()[0])
    assert httpx.get(f"{pod.serve}/v1/models", timeout=60).status_code == 401
    with httpx.Client(base_url=pod.serve, timeout=60, headers={"authorization": f"Bearer {key}"}) as client:
        body = {
            "model": client.get("/v1/models").json()["data"][0]["id"],
            "messages": [{"role": "user", "content": asked["question"]}],
            "documents": [{"id": name} for name in asked["documents"]],
        }
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert {d["origin"] for d in answer.json()["kvlink"]["documents"]} == {"store"}


def test_probes_need_no_token_and_the_dashboard_does(pod: Pod) -> None:
    # KubeRay's probes: httpGet on head and workers, wget on the agent and on the proxy of a serving worker.
    assert succeeds(f"{pod.agent}/api/healthz")
    assert succeeds(f"{pod.agent}/api/local_raylet_healthz")
    assert "success" in httpx.get(f"{pod.serve}/-/healthz").text
    assert httpx.get(f"{pod.dashboard}/api/serve/applications/").status_code == 401
    refused = httpx.post(f"{pod.dashboard}/api/jobs/", json={"entrypoint": "true"})
    assert refused.status_code == 401


def mapped(value: str, places: dict[str, str]) -> str:
    """A path of the pod as one of this machine."""
    for pod_place, local_place in places.items():
        if value == pod_place or value.startswith(pod_place + "/"):
            return local_place + value.removeprefix(pod_place)
    return value


def running(pod: Pod, name: str) -> bool:
    """Whether the application runs; fails at once when it never will."""
    state = pod.api("GET", "/api/serve/applications/").json()["applications"].get(name, {})
    assert state.get("status") not in ("DEPLOY_FAILED", "UNHEALTHY"), state.get("message")
    return state.get("status") == "RUNNING"


def succeeds(url: str) -> bool:
    """Whether a health check answers as KubeRay's probes want it."""
    try:
        reply = httpx.get(url, timeout=5)
    except httpx.TransportError:
        return False
    return reply.status_code == 200


def wait_for(condition: Any, seconds: float, describe: Any) -> None:
    """Poll until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still not after {seconds} s: {describe()}"
        time.sleep(0.3)
