"""Logs: JSON lines where a machine reads them, one coloured line each where a person does."""

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

# Attributes that every LogRecord has; all others came through `extra={...}` and are fields of the line.
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}
_COLOURS = {"WARNING": "\033[33m", "ERROR": "\033[31m", "CRITICAL": "\033[31m"}
# `__main__` is the logger of a module started with `python -m`.
_OURS = ("__main__", "atelier_api", "atelier_operator", "atelier_runtime", "atelier_cli")


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, then the constant fields and the record's own."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._fields,
            **own_fields(record),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class HumanLines(logging.Formatter):
    """`12:30:01 message field=value …`, with colour for what went wrong."""

    def format(self, record: logging.LogRecord) -> str:
        text = human_line(datetime.fromtimestamp(record.created), record.getMessage(), own_fields(record))
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        colour = _COLOURS.get(record.levelname, "")
        return f"{colour}{text}\033[0m" if colour else text


def own_fields(record: logging.LogRecord) -> dict[str, Any]:
    """What was given through `extra`."""
    return {key: value for key, value in record.__dict__.items() if key not in _STANDARD}


def human_line(time: datetime, message: str, fields: Mapping[str, Any]) -> str:
    """A line for people."""
    return " ".join([f"{time:%H:%M:%S}", message, *(f"{key}={value}" for key, value in fields.items())])


def setup_logging(
    *,
    rank: int | None = None,
    run: str | None = None,
    attempt: str | None = None,
    stream: TextIO | None = None,
    level: int = logging.INFO,
) -> None:
    """Send our records from `level` on, and the warnings of libraries, to `stream` (default: stderr); earlier handlers go.

    The given names become fields of every JSON line. Libraries that were imported before and brought handlers of their own
    (torch, transformers) write through ours.
    """
    stream = stream or sys.stderr
    fields = {key: value for key, value in (("run", run), ("attempt", attempt), ("rank", rank)) if value is not None}
    handler = logging.StreamHandler(stream)
    handler.setFormatter(HumanLines() if stream.isatty() else JsonLines(fields))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for logger in root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and logger.handlers:
            logger.handlers.clear()
            logger.propagate = True
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)
