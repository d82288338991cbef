"""What the tests end is ended, with all below it, and nothing beside it."""

from __future__ import annotations

import subprocess
import sys

import psutil
from processes import free_ports, kill_tree

PARENT = "import subprocess, sys; print(subprocess.Popen(['sleep', '99']).pid, flush=True); sys.stdin.read()"


def test_a_process_and_its_children_end_and_others_do_not() -> None:
    with subprocess.Popen(["sleep", "99"]) as other:
        arguments = [sys.executable, "-c", PARENT]
        with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            child = psutil.Process(int(process.stdout.readline()))
            kill_tree(process)
            assert process.poll() is not None
            assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
            kill_tree(process)  # again: nothing is left to do
        assert other.poll() is None
        other.kill()


def test_free_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20
