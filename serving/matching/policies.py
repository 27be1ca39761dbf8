"""Read what the operator demands of each gallery: a file of rules, read again when it changes.

Rules lie in a file and not in the store, so that no key of the API can loosen them and every store has them alike::

    {"staff": {"quality": {"inter_eye": 60, "yaw": 30}, "query_quality": {"sharpness": 20}}, "*": {}}
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import RootModel

from pkd.serving.core.gallery_schemas import GalleryPolicy
from pkd.serving.core.schemas import Name
from pkd.serving.core.watched_file import WatchedFile, read_json_file

OTHERS = "*"
"""Name of the rules of every gallery that has none of its own."""
NONE = GalleryPolicy()
REMEDY = 'Give a JSON object of rules by gallery, for example {"staff": {"quality": {"yaw": 30}}, "*": {}}.'


class _Rules(RootModel[dict[Name, GalleryPolicy]]):
    """Hold the file without the entry OTHERS."""


class Policies:
    """Hold the rules of every gallery. ``path`` None: none are demanded."""

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file. Raises InputError that names what is wrong with it."""
        self._file: WatchedFile[Mapping[str, GalleryPolicy]] = WatchedFile(path, _read, {}, "rules", clock)

    def of(self, gallery: str) -> GalleryPolicy:
        """Return the rules of one gallery; its own stand in the place of those for all others."""
        rules = self._file.current()
        return rules.get(gallery) or rules.get(OTHERS) or NONE


def _read(path: Path) -> Mapping[str, GalleryPolicy]:
    return read_json_file(path, _parse, REMEDY)


def _parse(given: object) -> Mapping[str, GalleryPolicy]:
    if not isinstance(given, dict):
        raise ValueError("not an object")
    others = {OTHERS: GalleryPolicy.model_validate(given.pop(OTHERS))} if OTHERS in given else {}
    return {**_Rules.model_validate(given).root, **others}
