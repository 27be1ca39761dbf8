"""Read a file of the operator's, and read it again when it changes: no restart, and a broken one is not taken."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.models import read_json
from pkd.toolkit.core.text import read_text

Content = TypeVar("Content")
LOOK_SECONDS = 1.0
"""Shortest time between two looks whether a file has changed, seconds."""
logger = logging.getLogger("pkd.serving")


class WatchedFile(Generic[Content]):
    """Hold what a file said when it was last whole. ``path`` None: it says ``nothing`` for ever."""

    def __init__(
        self,
        path: Path | None,
        read: Callable[[Path], Content],
        nothing: Content,
        kept: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the file. ``kept``: name of its content in the log. Raises what ``read`` raises."""
        self._path, self._read, self._kept, self._clock = path, read, kept, clock
        self._looked = clock()
        self._stamp = file_stamp(path) if path else None
        self._content = read(path) if path else nothing

    def current(self) -> Content:
        """Return the content, and look once a second whether there is another."""
        if self._path and self._clock() - self._looked >= LOOK_SECONDS:
            self._looked = self._clock()
            if (stamp := file_stamp(self._path)) != self._stamp:
                self._stamp = stamp
                self._take(self._path)
        return self._content

    def _take(self, path: Path) -> None:
        try:
            self._content = self._read(path)
            logger.info("%s: the %s were read again.", path, self._kept)
        except InputError as error:
            logger.error("%s The %s read before stay in force.", error, self._kept)


def read_json_file(path: Path, parse: Callable[[object], Content], remedy: str) -> Content:
    """Read a file of JSON with ``parse``. Raises InputError that names file, fault and ``remedy``."""
    try:
        return parse(read_json(read_text(path), path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}. {remedy}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise InputError(f"{path}: {where}: {first['msg']}. {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}. {remedy}") from None


def file_stamp(path: Path) -> tuple[int, ...] | None:
    """Return what changes with a file; None where there is none. ctime changes with who may read it, too."""
    try:
        seen = path.stat()
    except OSError:
        return None
    return seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino, seen.st_size
