"""Give out the files of bundles that devices download, each under the SHA-256 that the manifest states.

The file of a folder is given out from where it lies, hashed anew whenever it changed on the disk. What lies in a zip,
or is packed into one, is copied to the folder for temporary files when it is first asked for.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp
from weakref import finalize

from pkd.serving.core.errors import ServerFault, UnknownEncoder, UnknownFile
from pkd.serving.core.schemas import FileAnswer
from pkd.serving.inference.registry import Encoders, Loaded, find_id
from pkd.toolkit.bundle.bundle import MANIFEST, SIGNATURE, Bundle
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.core.encoder_info import EncoderInfo
from pkd.toolkit.core.errors import BundleError

logger = logging.getLogger("pkd.serving")


@dataclass(frozen=True)
class BundledEncoder:
    """Describe one encoder that a bundle holds: its own, or one in another numeric mode among its targets."""

    loaded: Loaded
    info: EncoderInfo

    @property
    def bundle(self) -> Bundle:
        """Return the bundle that holds it."""
        return self.loaded.bundle

    @property
    def targets(self) -> list[Target]:
        """List the targets that are forms of this very encoder."""
        return [one for one in self.bundle.manifest.targets if one.encoder.id == self.info.id]

    @property
    def default_file(self) -> str:
        """Name the file to run by default.

        ``encoder.onnx``, or in another numeric mode the first target's that is there.
        """
        if self.info.id == self.bundle.manifest.encoder.id:
            return "encoder.onnx"
        return next(one.file or one.graph for one in sorted(self.targets, key=lambda one: one.file is None))


@dataclass(frozen=True)
class Artifact:
    """Hold a file to download, checked."""

    path: Path
    name: str
    sha256: str
    checked: os.stat_result
    """The file as it was when it was checked."""

    @property
    def size(self) -> int:
        """Return its size, bytes."""
        return self.checked.st_size


class Artifacts:
    """Find encoders of loaded bundles and the files that are asked for. Safe to use from threads."""

    def __init__(self, encoders: Encoders) -> None:
        self._encoders = encoders
        self._copies: dict[tuple[Path, str], Artifact] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        self._folder: Path | None = None
        self._owner = -1
        self._cleanup: finalize[..., Artifacts] | None = None
        self._lock = threading.Lock()
        self.offers: dict[str, BundledEncoder] = {}
        for loaded in encoders.loaded.values():
            for id, info in loaded.bundle.manifest.encoders.items():
                self.offers.setdefault(id, BundledEncoder(loaded, info))

    def close(self) -> None:
        """Delete the copies."""
        if self._cleanup:
            self._cleanup()

    def find(self, spec: str) -> BundledEncoder:
        """Find an encoder by id, short id, or a name that only one has; what is loaded comes first.

        Raises UnknownEncoder.
        """
        id = find_id(spec, self._encoders.loaded) or find_id(spec, self.offers)
        if id in self.offers:
            return self.offers[id]
        raise UnknownEncoder(
            f"no loaded bundle holds the encoder {spec!r}. Use one of those in `encoders`.",
            details={"got": spec, "encoders": list(self.offers)},
        )

    def choose(self, offer: BundledEncoder, target: str | None, file: str | None) -> Artifact:
        """Find the file that was asked for: by name, or a target's own, or the one this encoder is run from by default.

        Raises UnknownFile, listing what there is; ServerFault where the file is not what the manifest says.
        """
        manifest = offer.bundle.manifest
        if target is not None:
            found = manifest.target(target)
            if found is None or found.file is None:
                names = [one.name for one in manifest.targets if one.file]
                raise UnknownFile(f"the bundle holds no target {target!r}.", details={"got": target, "targets": names})
            allowed, default = needed(offer.bundle, found), found.file
        else:
            signature = [SIGNATURE] if offer.bundle.signature else []
            allowed, default = [MANIFEST, *signature, *manifest.files], offer.default_file
        name = default if file is None else file
        if name not in allowed:
            raise UnknownFile(f"there is no file {name!r} here.", details={"got": name, "files": allowed})
        return self.get(offer.bundle, name)

    def get(self, bundle: Bundle, name: str) -> Artifact:
        """Find a file of ``bundle``. Raises ServerFault where it is not what the manifest says."""
        with self._lock:
            try:
                if bundle.path.is_dir() and name in bundle.manifest.files:
                    return self._in_copy_folder(bundle, name)
                return self._existing_copy(bundle, name) or self._make_copy(bundle, name, _read(bundle, name))
            except (BundleError, FileNotFoundError) as error:
                raise _changed(error) from None

    def packed(self, bundle: Bundle) -> Artifact:
        """Pack the whole bundle as one zip, as ``pkd-export --zip`` writes it. Raises as ``get``."""
        with self._lock:
            try:
                return self._existing_copy(bundle, "") or self._make_copy(bundle, "", self._pack(bundle))
            except BundleError as error:
                raise _changed(error) from None

    def describe(self, bundle: Bundle, names: list[str]) -> list[FileAnswer]:
        """Describe files with their sizes and digests."""
        found = [self.get(bundle, name) for name in names]
        return [FileAnswer(name=one.name, sha256=one.sha256, bytes=one.size) for one in found]

    def _in_copy_folder(self, bundle: Bundle, name: str) -> Artifact:
        path = bundle.path / name
        found = path.stat()
        if self._stamps.get(path) != _stamp(found):
            bundle.read(name)
            self._stamps[path] = _stamp(found)
        return Artifact(path, name, bundle.manifest.files[name], found)

    def _existing_copy(self, bundle: Bundle, name: str) -> Artifact | None:
        """Return the copy that was made before; None where a cleaner of temporary files has taken it since."""
        kept = self._copies.get((bundle.path, name))
        with suppress(OSError):
            if kept and _stamp(kept.path.stat()) == _stamp(kept.checked):
                return kept
        return None

    def _make_copy(self, bundle: Bundle, name: str, data: bytes) -> Artifact:
        sha256 = hashlib.sha256(data).hexdigest()
        path = self._copy_folder() / sha256
        path.write_bytes(data)
        self._copies[bundle.path, name] = made = Artifact(path, name, sha256, path.stat())
        return made

    def _pack(self, bundle: Bundle) -> bytes:
        path = self._copy_folder() / "bundle.zip"
        try:
            return bundle.pack(path).read_bytes()
        finally:
            path.unlink(missing_ok=True)

    def _copy_folder(self) -> Path:
        """Return the folder of the copies. Where it was deleted, somebody else may have made one of its name since."""
        if self._folder is None or not _is_folder_of(self._owner, self._folder):
            if self._cleanup:
                self._cleanup.detach()
            self._folder = Path(mkdtemp(prefix="pkd-artifacts-"))
            self._owner = self._folder.stat().st_uid
            self._cleanup = finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder


def needed(bundle: Bundle, target: Target) -> list[str]:
    """List the files that a device needs to run ``target``, the one its runtime loads first.

    None where it is not built.
    """
    if target.file is None:
        return []
    if target.package:
        return [target.file, *(n for n in bundle.manifest.files if n.startswith(target.package) and n != target.file)]
    main = PurePosixPath(target.file)
    companions = [
        name
        for name in bundle.manifest.files
        if PurePosixPath(name).parent == main.parent and PurePosixPath(name).stem == main.stem and name != target.file
    ]
    # In the bundle's own folder nothing lies beside encoder.onnx that belongs to it.
    return [target.file, *(companions if len(main.parts) > 1 else [])]


def _stamp(found: os.stat_result) -> tuple[int, int]:
    return found.st_mtime_ns, found.st_size


def _is_folder_of(owner: int, path: Path) -> bool:
    with suppress(OSError):
        found = path.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == owner
    return False


def _read(bundle: Bundle, name: str) -> bytes:
    if name == MANIFEST:
        return bundle.data
    if name == SIGNATURE and bundle.signature:
        return bundle.signature.text()
    return bundle.read(name)


def _changed(error: Exception) -> ServerFault:
    logger.error("%s", error)
    return ServerFault("The file is not what its manifest says; the server's log names it.")
