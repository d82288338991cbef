"""Processes that tests start: ports for them, and their end."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from contextlib import ExitStack
from typing import Any

import psutil


def free_ports(count: int) -> list[int]:
    """Different ports of the loopback that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """End a process started here and everything below it, at once; nothing else. Fine for one that has ended."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()  # psutil knows a process by its start time too, so a reused number is not hit
    psutil.wait_procs(family, timeout=10)
