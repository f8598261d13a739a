"""Logs as one JSON object a line, each with the request it belongs to. Never a prompt or a text."""

from __future__ import annotations

import json
import logging
import re
import secrets
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

request_id: ContextVar[str] = ContextVar("trimode_request_id", default="")

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


def sane_request_id(given: str | None) -> str:
    """A client's own id if it is short and plain, else a new one."""
    if given is not None and _SANE_ID.fullmatch(given):
        return given
    return f"req-{secrets.token_hex(12)}"


class JsonFormatter(logging.Formatter):
    """A record and its `extra` as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if own := request_id.get():
            entry["request_id"] = own
        entry |= {name: value for name, value in vars(record).items() if name not in _PLAIN}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)
