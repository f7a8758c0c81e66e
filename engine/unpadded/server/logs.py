"""Structured logs: a JSON object a line on stderr, never a request's text."""

from __future__ import annotations

import json
import logging
import time


class JsonFormatter(logging.Formatter):
    """time, level, message, and the fields a record carries."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class OnceEach:
    """Lets a warning of the engine through once: a million requests may deserve it. One of them quotes a text."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, record: logging.LogRecord) -> bool:
        if record.funcName == "_warn_without_task":
            record.msg, record.args = "texts come without a task; send one, or serve with --default-task", ()
        known = record.levelno == logging.WARNING and record.msg in self._said
        self._said.add(record.msg)
        return not known


def set_up() -> None:
    """Send everything the process logs to stderr as JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    handler.addFilter(OnceEach())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("unpadded").setLevel(logging.INFO)
