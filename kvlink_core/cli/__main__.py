"""``python -m kvlink_core.cli``."""

from kvlink_core.cli import main

main()
