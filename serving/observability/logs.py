"""Log lines for people, or one JSON object a line. Neither ever holds a vector, a key, a subject or a raw path."""

from __future__ import annotations

import logging
import sys
import traceback
from datetime import datetime, timezone
from typing import Literal

import orjson

LogFormat = Literal["text", "json"]
requests = logging.getLogger("pkd.serving.requests")
"""Logger of one line a request, off unless asked for."""
requests.setLevel(logging.WARNING)


class JsonLines(logging.Formatter):
    """Format ``{"time", "level", "logger", "message", …}``; ``extra={"fields": {…}}`` adds members."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "process": record.process,
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0]:
            line["error"] = record.exc_info[0].__name__  # its text could repeat what a client sent
        return orjson.dumps(line).decode()


def set_up(form: LogFormat, each_request: bool) -> None:
    """Send log lines to stderr. ``each_request``: a line for every request, too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter("%(message)s"))
    logger = logging.getLogger("pkd.serving")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)
    requests.setLevel(logging.INFO if each_request else logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a stranger's broken form is no news


def log_unforeseen(doing: str, error: Exception) -> None:
    """Log where an error happened that nobody foresaw, but not what the values were.

    Vectors and keys stay out of logs.
    """
    frames = "".join(traceback.format_tb(error.__traceback__))
    logging.getLogger("pkd.serving").error("%s: %s\n%s", doing, type(error).__name__, frames)


def log_request(method: str, route: str, status: int, seconds: float, key: str | None, problem: str | None) -> None:
    """Log one line: the route's template, never its path; ``status`` 0 where the client left; ``key``: its name."""
    if not requests.isEnabledFor(logging.INFO):
        return
    fields = {"method": method, "route": route, "status": status, "ms": round(1e3 * seconds, 2)}
    fields |= {name: value for name, value in (("key", key), ("problem", problem)) if value}
    requests.info(" ".join(map(str, fields.values())), extra={"fields": fields})
