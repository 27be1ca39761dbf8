"""Say which encoder each class of devices is to run, from a file that is read again when it changes.

The file is JSON, for example ``{"phone": {"encoder": "student@2f61ab…", "target": "litert-int8"}}``. A release and a
roll-back are each a change of one line, without a restart; both bundles are served all the time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, RootModel, ValidationError

from pkd.serving.core.errors import UnknownFile
from pkd.serving.core.schemas import Name
from pkd.serving.inference.artifacts import Artifacts, BundledEncoder, needed
from pkd.toolkit.bundle.bundle import MANIFEST, SIGNATURE
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.core.errors import InputError, PkdError
from pkd.toolkit.core.models import read_json
from pkd.toolkit.core.text import read_text

LOOK_SECONDS = 1.0
"""Shortest time between two looks whether the file has changed, seconds."""
logger = logging.getLogger("pkd.serving")


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    encoder: str
    target: str | None = None


class _Rows(RootModel[dict[Name, _Row]]):
    """Hold the file."""


@dataclass(frozen=True)
class DeviceClass:
    """Hold what one class of devices is to run."""

    name: str
    offer: BundledEncoder
    target: Target | None
    """Form of the encoder; None: ``encoder.onnx``."""

    @property
    def files(self) -> list[str]:
        """Name the files of the bundle that a device keeps.

        What it runs, what it tests itself with, and the certificates of what may be compared.
        """
        bundle = self.offer.bundle
        run = needed(bundle, self.target) if self.target else ["encoder.onnx"]
        own = [
            name
            for file in bundle.certificate_files()
            if file.certificate.query == self.offer.info.id
            for name in (file.path.relative_to(bundle.path).as_posix(), f"{file.path.relative_to(bundle.path)}.sig")
            if name in bundle.manifest.files
        ]
        signature = [SIGNATURE] if bundle.signature else []
        return [*run, MANIFEST, *signature, "golden.npz", *own]


class DeviceClasses:
    """Find what a class of devices is to run. ``path`` None: there are no classes."""

    def __init__(
        self, artifacts: Artifacts, path: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Read the file. Raises InputError that names what is wrong with it."""
        self._artifacts, self._path, self._clock = artifacts, path, clock
        self._looked = clock()
        self._stamp = _stamp(path) if path else None
        self._classes = self._read(path) if path else {}

    def find(self, name: str) -> DeviceClass:
        """Return what a class is to run now. Raises UnknownFile for a class that the file does not name."""
        if self._path and self._clock() - self._looked >= LOOK_SECONDS:
            self._reload(self._path)
        if name not in self._classes:
            known = ", ".join(self._classes) or "none"
            raise UnknownFile(
                f"there is no device class {name!r} here; there are: {known}. The operator names them in the file of "
                "--device-classes.",
                details={"got": name, "classes": list(self._classes)},
            )
        return self._classes[name]

    def _reload(self, path: Path) -> None:
        self._looked = self._clock()
        if (stamp := _stamp(path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._classes = self._read(path)
        except InputError as error:
            logger.error("%s The classes read before stay in force.", error)
            return
        logger.info("%s: read again, %d device classes.", path, len(self._classes))

    def _read(self, path: Path) -> Mapping[str, DeviceClass]:
        remedy = 'Give a JSON object, for example {"phone": {"encoder": "student@2f61ab…", "target": "litert-int8"}}.'
        try:
            rows = _Rows.model_validate(read_json(read_text(path), path)).root
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}. {remedy}") from None
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}. {remedy}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: {error}. {remedy}") from None
        return {name: self._resolved(path, name, row) for name, row in rows.items()}

    def _resolved(self, path: Path, name: str, row: _Row) -> DeviceClass:
        try:
            offer = self._artifacts.find(row.encoder)
        except PkdError as error:
            raise InputError(f"{path}: {name}: {error}") from None
        target = offer.bundle.manifest.target(row.target) if row.target else None
        if row.target and (target is None or target.file is None):
            built = ", ".join(one.name for one in offer.bundle.manifest.targets if one.file) or "none"
            raise InputError(f"{path}: {name}: the bundle holds no target {row.target!r}; it holds {built}.")
        if target is None:
            if offer.info.id != offer.bundle.manifest.encoder.id:
                raise InputError(f"{path}: {name}: {row.encoder} is a target of a bundle. Name the target, too.")
            return DeviceClass(name, offer, None)
        # What a target computes may be an encoder of its own.
        return DeviceClass(name, BundledEncoder(offer.loaded, target.encoder), target)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        seen = path.stat()
    except OSError:
        return None
    return seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino, seen.st_size
