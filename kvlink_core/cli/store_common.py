"""What the ``kvlink store`` commands share: options, durations and sizes, JSON."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel
from rich.progress import TaskID

from kvlink_core.cli.common import progress_bar, stdout
from kvlink_core.errors import ConfigError

if TYPE_CHECKING:
    from kvlink_core.store.lifecycle import Progress

Store = Annotated[str, typer.Argument(help="The store: a path or `s3://bucket/prefix`.", show_default=False)]
Namespace = Annotated[str, typer.Option(help="The namespace; nothing of another is seen or touched.")]
AnyNamespace = Annotated[str | None, typer.Option(help="Only this namespace. Default: all.", show_default=False)]
Fingerprint = Annotated[
    str | None, typer.Option(help="Only this model: the first digits of its fingerprint.", show_default=False)
]
Codec = Annotated[str | None, typer.Option(help="Only this codec, as `ls` shows it.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do it. Without, only show what would be done.")]

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d|w)?")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def parse_duration(text: str, option: str) -> timedelta:
    """``90s``, ``30m``, ``24h``, ``7d``, ``2w`` or ``0``. Raises ``ConfigError``."""
    match = _DURATION.fullmatch(text.strip())
    try:
        if match and (match[2] or float(match[1]) == 0):
            return timedelta(seconds=float(match[1]) * _SECONDS[match[2] or "s"])
    except OverflowError:
        pass
    raise ConfigError(f"{option} {text!r}: write a time as 90s, 30m, 24h, 7d or 2w.", param=option.strip("-"))


def parse_size(text: str, option: str) -> int:
    """``1000``, ``64MiB``, ``1GB``: bytes. Raises ``ConfigError``."""
    match = _SIZE.fullmatch(text.strip())
    if not match or len(text) > 30:
        raise ConfigError(
            f"{option} {text!r}: write a size as 64MiB, 1GB or a number of bytes.", param=option.strip("-")
        )
    unit = (match[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(float(match[1]) * base ** (" kmgt".index(unit[0]) if unit else 0))


def size(nbytes: float) -> str:
    """Bytes for people."""
    for unit in _UNITS:
        if nbytes < 1024 or unit == _UNITS[-1]:
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"


def age(moment: datetime) -> str:
    """How long ago, for people."""
    seconds = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def count(number: int, what: str) -> str:
    """``1 shard``, ``2 shards``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def some(names: list[str], limit: int = 10) -> str:
    """A few of many names, in one line."""
    return ", ".join(repr(n) for n in names[:limit]) + (
        f" and {len(names) - limit:,} more" if len(names) > limit else ""
    )


def show_json(value: object) -> None:
    """Print ``value`` as JSON: dataclasses by their fields, times as ISO 8601, errors as their text."""
    sys.stdout.write(json.dumps(_plain(value), indent=1) + "\n")


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Exception):
        return {"code": getattr(value, "code", type(value).__name__), "message": str(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress bar, as the library wants to be given one. Where nothing progresses, none is shown."""
    bar = progress_bar()
    tasks: dict[str, TaskID] = {}

    def show(what: str, done: int, total: int) -> None:
        if not tasks:
            bar.start()
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done, total=total)

    try:
        yield show
    finally:
        if tasks:
            bar.stop()


def say(text: str, *, style: str | None = None) -> None:
    """One line, as it is: ids may hold what rich would take for markup."""
    stdout.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
