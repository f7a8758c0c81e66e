"""Logs on stderr without the texts of requests: lines of text on a terminal, otherwise one JSON object per line."""

import json
import logging
import time


class JsonFormatter(logging.Formatter):
    """Format a record as JSON: time, level, message, the dictionary `fields` of the record, and a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        written = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"
        line = {"time": written, "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """Format a record for a person: time, level, message, and the fields as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {}).items()
        # As JSON, strings cannot contain the control characters of a terminal.
        values = [f"{key}={json.dumps(value)}" for key, value in fields]
        record.msg, record.args = " ".join([json.dumps(record.getMessage())[1:-1], *values]), ()
        return super().format(record)


def configure_logging() -> None:
    """Send everything that the process logs to stderr, a warning once: the engine may repeat one for every request."""
    warnings: set[str] = set()

    def is_first(record: logging.LogRecord) -> bool:
        known = len(warnings)
        if record.levelno == logging.WARNING:
            warnings.add(record.getMessage())
        return record.levelno != logging.WARNING or len(warnings) > known

    handler = logging.StreamHandler()
    text = TextFormatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
    handler.setFormatter(text if handler.stream.isatty() else JsonFormatter())
    handler.addFilter(is_first)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("unpadded").setLevel(logging.INFO)
