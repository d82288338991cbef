"""The ``kvlink`` command in this process: starting another imports torch anew, seconds each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from kvlink_core.cli import main


@dataclass
class Done:
    """What a run of the command left."""

    returncode: int
    stdout: str
    stderr: str


Kvlink = Callable[..., Done]


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Kvlink:
    """A function that runs the command with the arguments that it is given."""

    def run(*arguments: str) -> Done:
        monkeypatch.setattr("sys.argv", ["kvlink", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        out = capsys.readouterr()
        return Done(code, out.out, out.err)

    return run
