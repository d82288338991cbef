"""Request ids on every log line, of the core's loggers too, and the core's lines in Serve's log."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Any

#: The request that this task or thread works for.
REQUEST_ID: ContextVar[str] = ContextVar("kvlink_request_id", default="")

_OURS = ("ray.serve", "kvlink_core")


def install() -> None:
    """Stamp all records made in this process from now on, and send the core's to Serve's log. Idempotent."""
    make = logging.getLogRecordFactory()
    if not isinstance(make, _Stamp):
        logging.setLogRecordFactory(_Stamp(make))
    serve, core = (logging.getLogger(name) for name in _OURS)
    for handler in serve.handlers:
        if handler not in core.handlers:
            core.addHandler(handler)
    if core.handlers:
        core.propagate = False


class _Stamp:
    """Makes records that know their request, in the field that Serve's formats show."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self, *args: Any, **fields: Any) -> logging.LogRecord:
        """A record."""
        record: logging.LogRecord = self._make(*args, **fields)
        request_id = REQUEST_ID.get()
        if request_id and record.name.startswith(_OURS):
            record.request_id = request_id
        return record
