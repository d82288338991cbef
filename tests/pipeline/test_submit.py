"""``ray job submit``, as the README has it, on a cluster of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from processes import free_ports, kill_tree

from kvlink_core.models.describe import describe_model
from kvlink_core.store import DocumentStore

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture(scope="module")
def home() -> Iterator[str]:
    """Ray's files: not where the next ``ray.init`` looks for a running cluster; a short path, for its sockets."""
    with tempfile.TemporaryDirectory(prefix="kvl-", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.fixture(scope="module")
def cluster(home: str) -> Iterator[str]:
    """The dashboard's address of a running cluster of one node."""
    port, dashboard, agent, client = free_ports(4)
    head = subprocess.Popen(
        [
            RAY, "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=100000000",
            "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--port={port}",
            f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
            f"--ray-client-server-port={client}", f"--temp-dir={home}",
        ],
        # The entrypoint's ``python`` is the one that the head finds.
        env={**os.environ, "PATH": f"{Path(RAY).parent}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 120
        while not answers(f"{address}/api/jobs/"):
            assert head.poll() is None, "the head ended"
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield address
    finally:
        kill_tree(head)  # asked politely, it takes half a minute


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False


def submit(cluster: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    entrypoint = ["python", "pipeline/precompute.py", *arguments]
    return subprocess.run(
        [RAY, "job", "submit", "--address", cluster, "--working-dir", ".", "--", *entrypoint],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip


def test_a_submitted_job_fills_the_store(cluster: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    corpus, store = tmp_path / "corpus.jsonl", tmp_path / "store"
    corpus.write_text("".join(json.dumps({"id": str(i), "text": f"Text {i}."}) + "\n" for i in range(10)))
    ran = submit(cluster, "--input", str(corpus), "--store", str(store), "--model", str(tiny_model_dir))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    summary = next(json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{"store"'))
    assert (summary["encoded"], summary["failed_count"]) == (10, 0)
    opened = DocumentStore.open(str(store), fingerprint=describe_model(str(tiny_model_dir)).fingerprint)
    assert len(opened.lookup([str(i) for i in range(10)])) == 10
