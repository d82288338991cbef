"""A service of one's own for a proof: ``serve run`` on loopback in a Ray of its own, and what its processes hold."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
import yaml

from kvlink_core.errors import KVLinkError

ROOT = Path(__file__).resolve().parents[2]

_STARTS_WITHIN_S = 240.0
_STOPS_WITHIN_S = 40.0

#: What the processes of a service are called, by what their command line begins with; %s is the application.
_ROLES = {
    "engine": "ray::ServeReplica:%s:engine",
    "ingress": "ray::ServeReplica:%s:ingress",
    "documents": "ray::ServeReplica:%s:documents",
    "proxy": "ray::ProxyActor",
    "controller": "ray::ServeController",
}
_APPLICATION = "kvlink"
_SAMPLE = re.compile(r"^ray_kvlink_(\w+)\{([^}]*)\} (\S+)$")

#: Of the service's gauges, those that are 0 when nothing is asked.
GAUGES = ("requests_running", "requests_waiting", "engine_waiting_requests", "kv_used_bytes_active")


class ProofError(KVLinkError):
    """A proof cannot be run; the text says why."""


@dataclass(frozen=True, slots=True)
class Held:
    """What the service's processes hold: connections of their own, open files, and what the engine says of itself.

    ``gauges`` are by name, summed over the replicas that live.
    """

    sockets: int
    handles: int
    gauges: dict[str, float] = field(default_factory=dict)


class Service:
    """A running service, and the processes that belong to it.

    Args:
        url: of its HTTP side.
        root: the process whose descendants they are.
    """

    def __init__(self, url: str, root: psutil.Process) -> None:
        self.url = url
        self._root = root
        self._metrics: str | None = None
        self._dashboard: str | None = None

    def processes(self) -> dict[str, list[psutil.Process]]:
        """The processes that serve, by what they do, the oldest first."""
        found: dict[str, list[psutil.Process]] = {role: [] for role in _ROLES}
        for process in sorted(self._root.children(recursive=True), key=lambda p: (p.create_time(), p.pid)):
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline())
                for role, pattern in _ROLES.items():
                    begins = pattern % _APPLICATION if "%" in pattern else pattern
                    if title.startswith(begins) and process.status() != psutil.STATUS_ZOMBIE:
                        found[role].append(process)
        return found

    def model(self) -> str:
        """The public id of the model that it serves."""
        return str(httpx.get(f"{self.url}/v1/models", timeout=30).json()["data"][0]["id"])

    def resident(self) -> dict[str, int]:
        """Bytes resident, by role and process id."""
        sizes: dict[str, int] = {}
        for role, processes in self.processes().items():
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    sizes[f"{role} {process.pid}"] = process.memory_info().rss
        return sizes

    def held(self) -> Held:
        """What they hold now. The gauges are Ray's, which are some 10 s old."""
        sockets = handles = 0
        for role, processes in self.processes().items():
            if role == "controller":
                continue
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    handles += process.num_fds()
                    sockets += sum(c.status in ("ESTABLISHED", "CLOSE_WAIT") for c in process.net_connections("tcp"))
        return Held(sockets, handles, self._gauges())

    def ready(self, engines: int) -> bool:
        """Whether so many replicas of the engine run, and one of everything else, and none is on its way."""
        states = [replica["state"] for replica in self._replicas()]
        # Serve calls a dead one running for a while.
        alive = {process.pid for process in self.processes()["engine"]}
        pids = self.engine_pids()
        return states.count("RUNNING") == len(states) and len(pids) == engines and alive.issuperset(pids)

    def engine_pids(self) -> list[int]:
        """The engine's replicas that Serve says are running."""
        return [r["pid"] for r in self._replicas() if r["deployment"] == "engine" and r["state"] == "RUNNING"]

    def _replicas(self) -> list[dict[str, Any]]:
        """Every replica as Serve describes it, with its deployment."""
        found = self._get("_dashboard", "dashboard/dashboard.py", "/api/serve/applications/", '"applications"')
        deployments = json.loads(found or "{}").get("applications", {}).get(_APPLICATION, {}).get("deployments", {})
        return [{**replica, "deployment": name} for name, d in deployments.items() for replica in d["replicas"]]

    def counter(self, name: str, **labels: str) -> float:
        """The sum of a counter over the replicas that live."""
        samples = self._samples()
        return sum(v for found, marks, v in samples if found == name and labels.items() <= marks.items())

    def _gauges(self) -> dict[str, float]:
        values = dict.fromkeys(GAUGES, 0.0)
        for name, labels, value in self._samples():
            if (full := "_".join(filter(None, (name, labels.get("state"))))) in values:
                values[full] += value
        return values

    def _samples(self) -> list[tuple[str, dict[str, str], float]]:
        """The service's metrics: names, labels, values. Those of dead replicas stay as they were: left out."""
        living = {replica["replica_id"] for replica in self._replicas()}
        samples = []
        for line in self._get("_metrics", "ray::DashboardAgent", "/metrics", "ray_kvlink_").splitlines():
            if match := _SAMPLE.match(line):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
                if labels.get("replica") in living:
                    samples.append((match[1], labels, float(match[3])))
        return samples

    def _get(self, known: str, title: str, path: str, contains: str) -> str:
        """What Ray's own HTTP says; its port is one of those that the process with this title listens on."""
        if (url := getattr(self, known)) is not None:
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(url, timeout=10).text
        for process in self._root.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if title not in " ".join(process.cmdline()):
                    continue
                ports = [c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
                for port in ports:
                    with contextlib.suppress(httpx.HTTPError):
                        text = httpx.get(f"http://127.0.0.1:{port}{path}", timeout=10).text
                        if contains in text:
                            setattr(self, known, f"http://127.0.0.1:{port}{path}")
                            return text
        return ""


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    folder: Path, settings: dict[str, Any], *, engines: int, environment: dict[str, str] | None = None
) -> Iterator[Service]:
    """``serve run`` with the options of ``serve/configs/local.yaml`` and these settings, until the block ends.

    Args:
        folder: for its configuration and its log.
        settings: of ``serve.config``, by dotted names.
        engines: replicas of the engine.
        environment: variables that it has beside this process's.

    Raises:
        ProofError: it ended, or did not answer in time.
    """
    port = free_port()
    config = yaml.safe_load((ROOT / "serve/configs/local.yaml").read_text("utf-8"))
    config["http_options"]["port"] = port
    config["applications"] = [
        {"name": _APPLICATION, "route_prefix": "/", "import_path": "serve.app:build_app", "args": settings | {
            "engine.autoscaling.min_replicas": engines, "engine.autoscaling.max_replicas": engines,
        }}
    ]  # fmt: skip
    (folder / "serve.yaml").write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    variables = os.environ | {
        "RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **(environment or {}),
    }  # fmt: skip
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.serve.scripts", "run", str(folder / "serve.yaml")],
            cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_healthy(url, process, folder / "serve.log")
            service = Service(url, psutil.Process(process.pid))
            wait_until(lambda: service.ready(engines), _STARTS_WITHIN_S, "not all replicas came up")
            yield service
        finally:
            end(process)


def wait_until(true: Callable[[], bool], within_s: float, otherwise: str) -> float:
    """Seconds until something is true. Raises ``ProofError``, saying ``otherwise``, if it is not in time."""
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > within_s:
            raise ProofError(f"{otherwise} within {within_s:g} s.")
        time.sleep(0.25)
    return time.monotonic() - began


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when ``/healthz`` says 200. Raises ``ProofError``."""
    deadline = time.monotonic() + _STARTS_WITHIN_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ProofError(f"the service ended with exit code {process.returncode}; see {log}.")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/healthz", timeout=10).status_code == 200:
                return
        time.sleep(0.3)
    raise ProofError(f"the service was not healthy after {_STARTS_WITHIN_S:g} s; see {log}.")


def end(process: subprocess.Popen[Any]) -> None:
    """End a process started here, gently at first, and then whatever it started; nothing else."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOPS_WITHIN_S)
    if process.poll() is None:
        process.kill()
        process.wait(10)
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()  # psutil knows a process by its start time too, so a reused number is not hit
    psutil.wait_procs(family, timeout=10)


@contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """An S3 server of its own on loopback, until the block ends; its port. Raises ``ProofError``."""
    port = free_port()
    log: IO[bytes]
    with (folder / "s3.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and process.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.1)
            else:
                raise ProofError("moto's S3 server did not start: pip install 'moto[server]'.")
            yield port
        finally:
            end(process)
