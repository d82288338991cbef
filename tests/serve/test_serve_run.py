"""``serve run`` as the README has it: a configuration file that answers, and wrong ones that say so in one line."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from processes import free_ports, kill_tree

from kvlink_core.encode import DocumentEncoder
from kvlink_core.models import LoadedModel
from kvlink_core.store import DocumentStore
from kvlink_core.types import Document

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
SERVE_RUN = [sys.executable, "-m", "ray.serve.scripts", "run"]
#: A Ray of its own, whatever else runs on this machine.
ENVIRONMENT = os.environ | {"RAY_ADDRESS": "local", "PYTHONUNBUFFERED": "1"}
ENVIRONMENT.pop("RAY_USAGE_STATS_ENABLED")  # to see that nothing is sent without it either


@pytest.fixture(scope="module")
def store(tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("run") / "store"
    opened = DocumentStore.open(str(where), fingerprint=tiny_model.fingerprint, create=True)
    tokens = tiny_model.layout.document_tokens(Document("a", "The mill stands by the river."))
    opened.commit(opened.write_shard([("a", DocumentEncoder(tiny_model).encode([tokens])[0])]))
    return where


def fails(*arguments: str) -> str:
    """The one line of a ``serve run`` that must exit with 2 before it starts anything; run in this process."""
    from click.testing import CliRunner
    from ray.serve.scripts import cli

    done = CliRunner().invoke(cli, ["run", "serve.app:build_app", *arguments])
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    return line


def test_a_wrong_setting_is_one_line() -> None:
    line = fails("store=x", "modle=embedded")
    assert line == "Error: configuration: unknown setting 'modle'; did you mean 'model'?"


def test_a_store_that_is_not_there_is_one_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    line = fails(f"store={tmp_path / 'nothing'}", f"model={tiny_model_dir}")
    assert line.startswith(f"Error: there is no KVLink store at {tmp_path / 'nothing'}")


def test_a_store_of_another_model_is_one_line(store: Path, tiny_model_dir: Path) -> None:
    line = fails(f"store={store}", f"model={tiny_model_dir}", "dtype=bfloat16")
    assert line.startswith("Error: ")
    assert "dtype" in line
    assert "float32" in line
    assert "bfloat16" in line


def test_a_configuration_file_serves_on_loopback_alone_by_tls_and_without_telemetry(
    store: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    certificate, tls = self_signed(tmp_path)
    config = yaml.safe_load((ROOT / "serve/configs/local.yaml").read_text("utf-8"))
    (port,) = free_ports(1)
    config["http_options"] |= {"port": port, **certificate}
    args = config["applications"][0]["args"]
    args |= {"store": str(store), "model": str(tiny_model_dir)}
    args["tiers"]["recompute"] = "never"  # a tiny model computes faster than anything can be read
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config), "utf-8")
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*SERVE_RUN, str(path)],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"https://127.0.0.1:{port}" if certificate else f"http://127.0.0.1:{port}"
        wait_until_healthy(url, process, log, tls)
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Where is the mill?"}],
            "documents": [{"id": "a"}],
            "max_tokens": 4,
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, verify=tls).json()
        assert answer["kvlink"]["documents"][0]["origin"] == "store"
        assert listening_addresses(port) == {"127.0.0.1"}
        if certificate:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                httpx.get(f"{url}/healthz", timeout=60)
            with pytest.raises(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=60)
        dashboard = next(p for p in psutil.Process(process.pid).children() if "dashboard.py" in " ".join(p.cmdline()))
        assert dashboard.environ()["RAY_USAGE_STATS_ENABLED"] == "0"  # it is what would send them
    finally:
        kill_tree(process)
    assert "Traceback" not in log.read_text("utf-8")


def self_signed(folder: Path) -> tuple[dict[str, str], ssl.SSLContext]:
    """Serve's options for a certificate as the README makes it, and who trusts it; none where there is no openssl."""
    options = {"ssl_keyfile": str(folder / "key.pem"), "ssl_certfile": str(folder / "cert.pem")}
    if shutil.which("openssl") is None:
        return {}, ssl.create_default_context()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-keyout", options["ssl_keyfile"], "-out", options["ssl_certfile"]],
        check=True, capture_output=True,
    )  # fmt: skip
    return options, ssl.create_default_context(cafile=options["ssl_certfile"])


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path, tls: ssl.SSLContext) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text("utf-8")
        try:
            if httpx.get(f"{url}/healthz", timeout=10, verify=tls).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    pytest.fail(log.read_text("utf-8"))


def listening_addresses(port: int) -> set[str]:
    """Local addresses on which this machine listens on a port; IPv6 wildcards count as 0.0.0.0."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text("ascii").splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, hexadecimal_port = local.split(":")
            if state == "0A" and int(hexadecimal_port, 16) == port:
                word = bytes.fromhex(address[-8:])[::-1]
                found.add(socket.inet_ntoa(word))
    return found
