"""Structured logs: one JSON object per line on stderr, with the request's id, and nothing secret."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime

from protocol.transport import request_id


def _failure(record: logging.LogRecord) -> dict[str, str]:
    """Type of an exception and the places it went through. Its own text is left out: it may quote values."""
    if not record.exc_info or record.exc_info[0] is None:
        return {}
    places = reversed(traceback.extract_tb(record.exc_info[2])[-5:])
    return {"error": record.exc_info[0].__name__, "at": " < ".join(f"{f.name}:{f.lineno}" for f in places)}


class TextFormatter(logging.Formatter):
    """One line per record, for people."""

    def format(self, record: logging.LogRecord) -> str:
        facts = {"request": request_id.get(), **_failure(record)}
        extra = "".join(f" {k}={v}" for k, v in facts.items() if v)
        return f"{datetime.now():%Y-%m-%d %H:%M:%S} {record.name} {record.levelname} {record.getMessage()}{extra}"


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, logger, message, request, and where an unexpected error arose."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"), "level": record.levelname.lower(),
                 "logger": record.name, "message": record.getMessage()}
        if request_id.get():
            entry["request"] = request_id.get()
        return json.dumps(entry | _failure(record))


def set_up(as_json: bool, level: str = "INFO") -> None:
    """Log to stderr, as JSON or as text."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
