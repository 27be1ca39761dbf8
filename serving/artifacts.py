"""Artifacts: the files of a bundle that a device downloads, each under the SHA-256 that the manifest states."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pkd.serving.encoders import Encoders, Loaded
from pkd.serving.problems import Problem
from pkd.toolkit.bundle import MANIFEST, Bundle
from pkd.toolkit.errors import BundleError
from pkd.toolkit.space import EncoderInfo, short
from pkd.toolkit.target import Target

logger = logging.getLogger("pkd.serving")
EPOCH = (1980, 1, 1, 0, 0, 0)
"""Of every entry of a zip, so that the same bundle is the same bytes."""


@dataclass(frozen=True)
class Offer:
    """One encoder that a bundle holds: its own, or one in another numeric mode among its targets."""

    loaded: Loaded
    info: EncoderInfo

    @property
    def targets(self) -> list[Target]:
        """Forms of this very encoder."""
        return [one for one in self.loaded.bundle.manifest.targets if one.encoder.id == self.info.id]


@dataclass(frozen=True)
class Artifact:
    """A file to download."""

    path: Path
    name: str
    sha256: str


class Artifacts:
    """Every encoder of every loaded bundle. A file is hashed again whenever it changed on the disk."""

    def __init__(self, encoders: Encoders) -> None:
        self._encoders = encoders
        self._checked: dict[Path, tuple[int, int]] = {}
        self.offers: dict[str, Offer] = {}
        for loaded in encoders.loaded.values():
            for id, info in loaded.bundle.manifest.encoders.items():
                self.offers.setdefault(id, Offer(loaded, info))

    def find(self, spec: str) -> Offer:
        """By id, short id, or a name that only one has. Raises an unknown-encoder Problem."""
        if spec in self.offers:
            return self.offers[spec]
        if (id := self._encoders.resolve(spec)) in self.offers:
            return self.offers[id]
        named = [id for id in self.offers if short(id) == spec]
        if len(named) == 1:
            return self.offers[named[0]]
        raise Problem(
            "unknown-encoder",
            f"no loaded bundle holds the encoder {spec!r}. Use one of those in `encoders`.",
            got=spec,
            encoders=list(self.offers),
        )

    def choose(self, offer: Offer, target: str | None, file: str | None) -> Artifact:
        """The file that was asked for: by name, or a target's own, or what this encoder is run from by default.

        Raises a Problem: not-found, listing what there is; internal where the file is not what the manifest says.
        """
        bundle = offer.loaded.bundle
        hashes = {**bundle.manifest.files, MANIFEST: manifest_sha256(bundle)}
        if target is not None:
            found = bundle.manifest.target(target)
            if found is None or not needed(bundle, found):
                names = [one.name for one in bundle.manifest.targets]
                raise Problem("not-found", f"the bundle holds no target {target!r}.", got=target, targets=names)
            allowed = needed(bundle, found)
            default = allowed[0]
        else:
            allowed, default = list(hashes), self.default_file(offer)
        name = default if file is None else file
        if name not in allowed:
            raise Problem("not-found", f"there is no file {name!r} here.", got=name, files=allowed)
        return self._artifact(bundle, name, hashes[name])

    def default_file(self, offer: Offer) -> str:
        """``encoder.onnx``, or for another numeric mode the first target's file that is there."""
        if offer.info.id == offer.loaded.encoder.info.id:
            return "encoder.onnx"
        return next(one.file or one.graph for one in offer.targets)

    def _artifact(self, bundle: Bundle, name: str, sha256: str) -> Artifact:
        path = bundle.path / name
        if name == MANIFEST:
            return Artifact(path, name, sha256)
        found = path.stat()
        stamp = (found.st_mtime_ns, found.st_size)
        if self._checked.get(path) != stamp:
            try:
                bundle.read(name)
            except BundleError as error:
                logger.error("%s", error)
                raise Problem(
                    "internal", "The file is not what its manifest says; the server's log names it."
                ) from None
            self._checked[path] = stamp
        return Artifact(path, name, sha256)


def needed(bundle: Bundle, target: Target) -> list[str]:
    """Files that a device needs to run ``target``: the one its runtime loads first. Empty where it is not built yet."""
    if target.file is None:
        return []
    main = PurePosixPath(target.file)
    beside = [
        name
        for name in bundle.manifest.files
        if PurePosixPath(name).parent == main.parent and PurePosixPath(name).stem == main.stem and name != target.file
    ]
    # In the bundle's own folder nothing lies beside encoder.onnx that belongs to it.
    return [target.file, *(beside if len(main.parts) > 1 else [])]


def describe(bundle: Bundle, names: list[str]) -> list[dict[str, Any]]:
    """As the schema FileAnswer."""
    hashes = bundle.manifest.files
    return [{"name": name, "sha256": hashes[name], "bytes": (bundle.path / name).stat().st_size} for name in names]


def zipped(bundle: Bundle) -> Iterator[bytes]:
    """The bundle as one zip file without compression, piece by piece. Raises BundleError for a file that changed."""
    pipe = _Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(MANIFEST, EPOCH), (bundle.path / MANIFEST).read_bytes())
        for name in bundle.manifest.files:
            archive.writestr(zipfile.ZipInfo(name, EPOCH), bundle.read(name))
            yield pipe.take()
    yield pipe.take()


def manifest_sha256(bundle: Bundle) -> str:
    """Of the manifest, which states the hash of everything else."""
    return hashlib.sha256((bundle.path / MANIFEST).read_bytes()).hexdigest()


class _Pipe:
    """What zipfile writes to: it cannot seek, and gives what was written."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def write(self, data: bytes) -> int:
        self._kept += data
        return len(data)

    def close(self) -> None:
        """Nothing is open."""

    def flush(self) -> None:
        """Nothing is held back."""

    def take(self) -> bytes:
        """What was written since the last time."""
        taken, self._kept = bytes(self._kept), bytearray()
        return taken
