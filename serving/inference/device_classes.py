"""Say which encoder each class of devices is to run, from a file that is read again when it changes.

The file is JSON, for example ``{"phone": {"encoder": "student@2f61ab…", "target": "litert-int8"}}``. A release and a
roll-back are each a change of one line, without a restart; both bundles are served all the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, RootModel

from pkd.serving.core.errors import UnknownFile
from pkd.serving.core.schemas import Name
from pkd.serving.core.watched_file import WatchedFile, read_json_file
from pkd.serving.inference.artifacts import Artifacts, BundledEncoder, needed
from pkd.toolkit.bundle.bundle import MANIFEST, SIGNATURE
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.core.errors import InputError, PkdError

REMEDY = 'Give a JSON object, for example {"phone": {"encoder": "student@2f61ab…", "target": "litert-int8"}}.'


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
        self._artifacts = artifacts
        self._file: WatchedFile[Mapping[str, DeviceClass]] = WatchedFile(path, self._read, {}, "device classes", clock)

    def find(self, name: str) -> DeviceClass:
        """Return what a class is to run now. Raises UnknownFile for a class that the file does not name."""
        classes = self._file.current()
        if name not in classes:
            raise UnknownFile(
                f"there is no device class {name!r} here; there are: {', '.join(classes) or 'none'}. The operator "
                "names them in the file of --device-classes.",
                details={"got": name, "classes": list(classes)},
            )
        return classes[name]

    def _read(self, path: Path) -> Mapping[str, DeviceClass]:
        rows = read_json_file(path, _Rows.model_validate, REMEDY).root
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
