"""Read what the operator demands of each gallery: a file of rules, read again when it changes.

Rules lie in a file and not in the store, so that no key of the API can loosen them and every store has them alike::

    {"staff": {"quality": {"inter_eye": 60, "yaw": 30}, "query_quality": {"sharpness": 20}}, "*": {}}
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import RootModel, ValidationError

from pkd.serving.core.gallery_schemas import GalleryPolicy
from pkd.serving.core.schemas import Name
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.models import read_json
from pkd.toolkit.core.text import read_text

logger = logging.getLogger("pkd.serving")
LOOK_SECONDS = 1.0
"""Shortest time between two looks whether the file has changed, seconds."""
OTHERS = "*"
"""Name of the rules of every gallery that has none of its own."""
NONE = GalleryPolicy()


class _Rules(RootModel[dict[Name, GalleryPolicy]]):
    """Hold the file without the entry OTHERS."""


class Policies:
    """Hold the rules of every gallery. ``path`` None: none are demanded."""

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file. Raises InputError that names what is wrong with it."""
        self._path, self._clock = path, clock
        self._looked = clock()
        self._stamp = _stamp(path) if path else None
        self._rules = _read(path) if path else {}

    def of(self, gallery: str) -> GalleryPolicy:
        """Return the rules of one gallery; its own stand in the place of those for all others."""
        if self._path and self._clock() - self._looked >= LOOK_SECONDS:
            self._reload(self._path)
        return self._rules.get(gallery) or self._rules.get(OTHERS) or NONE

    def _reload(self, path: Path) -> None:
        self._looked = self._clock()
        if (stamp := _stamp(path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._rules = _read(path)
        except InputError as error:
            logger.error("%s The rules read before stay in force.", error)
            return
        logger.info("%s: read again, rules of %d galleries.", path, len(self._rules))


def _read(path: Path) -> Mapping[str, GalleryPolicy]:
    remedy = 'Give a JSON object of rules by gallery, for example {"staff": {"quality": {"yaw": 30}}, "*": {}}.'
    try:
        given = read_json(read_text(path), path)
        if not isinstance(given, dict):
            raise ValueError("not an object")
        others = {OTHERS: GalleryPolicy.model_validate(given.pop(OTHERS))} if OTHERS in given else {}
        return {**_Rules.model_validate(given).root, **others}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}. {remedy}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}. {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}. {remedy}") from None


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        seen = path.stat()
    except OSError:
        return None
    return seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino, seen.st_size
