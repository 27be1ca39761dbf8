"""Log lines for people, or one JSON object a line. Neither ever holds a vector, a key, a subject or a raw path."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime, timezone
from types import TracebackType
from typing import Literal

import orjson
from rich.console import Console

LogFormat = Literal["text", "json"]
requests = logging.getLogger("pkd.serving.requests")
"""Logger of one line a request, off unless asked for."""
requests.setLevel(logging.WARNING)
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the request that is worked on; every line about it bears it."""
GIVEN_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
"""Ids that a proxy may give in ``X-Request-Id``; any other is replaced."""


def id_of(sent: bytes) -> str:
    """Return the id that a request came with, or a new one of 16 hexadecimal digits."""
    return sent.decode("ascii") if GIVEN_ID.fullmatch(sent) else os.urandom(8).hex()


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
            **({"request": known} if (known := request_id.get()) else {}),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0]:
            line["error"] = record.exc_info[0].__name__  # its text could repeat what a client sent
            line["frames"] = "".join(traceback.format_tb(record.exc_info[2]))
        return orjson.dumps(line).decode()


class TextLines(logging.Formatter):
    """Format ``2026-11-29T07:04:07.123Z warning message``, with ``request=…`` at the end of what is about one."""

    converter = staticmethod(time.gmtime)
    default_time_format, default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        """Write one record."""
        known = request_id.get()
        said = f"{self.formatTime(record)} {record.levelname.lower()} {record.getMessage()}"
        said += f" request={known}" if known else ""
        if record.exc_info and record.exc_info[0]:
            said += f": {record.exc_info[0].__name__}\n{''.join(traceback.format_tb(record.exc_info[2]))}".rstrip()
        return said


def set_up(form: LogFormat, each_request: bool) -> None:
    """Send log lines to stderr. ``each_request``: a line for every request, too.

    What other libraries log or warn of, and what a thread or the process dies of, become such lines as well.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root, logger = logging.getLogger(), logging.getLogger("pkd.serving")
    for one in (root, logger):
        one.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    requests.setLevel(logging.INFO if each_request else logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a stranger's broken form is no news
    if form == "json":
        sys.excepthook = _log_end
        threading.excepthook = lambda it: _log_end(it.exc_type, it.exc_value, it.exc_traceback)


def _log_end(kind: type[BaseException], error: BaseException | None, frames: TracebackType | None) -> None:
    if kind is not SystemExit:
        logging.getLogger("pkd.serving").error("nobody foresaw this", exc_info=(kind, error or kind(), frames))


def announcer(form: LogFormat, console: Console) -> Callable[[str], None]:
    """Return how a server says what it serves: as plain lines to people, as log lines where those are JSON."""
    if form == "json":
        return logging.getLogger("pkd.serving").info
    return lambda text: console.print(text, markup=False, soft_wrap=True)


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
