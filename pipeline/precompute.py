"""``python pipeline/precompute.py``: compute and store the cache of every document of a corpus. See ``--help``."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # Run as a script: Python has put this folder first on the path, where the checkout's root must be, so that
    # ``pipeline`` is a package, here and (through the same path) in Ray's workers.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
