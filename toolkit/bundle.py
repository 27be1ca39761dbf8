"""Bundle: an encoder on disk with everything needed to run it, check it and trust it. A directory with a manifest."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from pkd.toolkit.certificate import Certificate, read_certificate
from pkd.toolkit.errors import BundleError
from pkd.toolkit.images import Rgb
from pkd.toolkit.record import Record
from pkd.toolkit.space import EncoderInfo

SCHEMA = 1


class GraphSpec(Record):
    """What ``encoder.onnx`` takes and gives."""

    input_name: str = "crops"
    input: str = "uint8 N×H×W×3 RGB"
    output_name: str = "embedding"
    output: str = "float32 N×D, unit rows"
    opset: int


class Manifest(Record):
    """``manifest.json``: what the bundle is, and the SHA-256 of every other file in it."""

    schema_version: int = SCHEMA
    encoder: EncoderInfo
    graph: GraphSpec
    golden_tolerance: float
    """Largest allowed 1 − cosine between a golden embedding and its recomputation."""
    gate: str = "not gated"
    """Result of the accuracy gate, or why it did not run."""
    licence: str = "not stated"
    training: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    """Provenance: teacher, head, method, margin, data digest, steps."""
    tool: str
    created: str
    files: dict[str, str]
    """Relative POSIX path → SHA-256 (hex)."""


@dataclass(frozen=True)
class Golden:
    """Synthetic crops and their embeddings: the self-test that a server, a phone or a browser runs at start."""

    crops: Rgb
    embeddings: NDArray[np.float32]


@dataclass(frozen=True)
class Bundle:
    """A directory whose every file was checked against the manifest."""

    path: Path
    manifest: Manifest

    def read(self, name: str) -> bytes:
        """Bytes of one listed file, checked against its hash. Raises BundleError."""
        expected = self.manifest.files.get(name)
        if expected is None:
            raise BundleError(f"{self.path}: the manifest lists no {name}. Export the bundle again.")
        data = _read(self.path, name)
        if hashlib.sha256(data).hexdigest() != expected:
            raise BundleError(
                f"{self.path / name}: its SHA-256 is not the manifest's. The file was changed or damaged."
            )
        return data

    def golden(self) -> Golden:
        """The golden crops (uint8 N×H×W×3) and embeddings (float32 N×D)."""
        try:
            with np.load(io.BytesIO(self.read("golden.npz")), allow_pickle=False) as arrays:
                return Golden(arrays["crops"], arrays["embeddings"])
        except (KeyError, ValueError) as error:
            raise BundleError(f"{self.path / 'golden.npz'}: cannot be read: {error}.") from None

    def certificates(self) -> list[Certificate]:
        """Every certificate in the bundle."""
        names = sorted(name for name in self.manifest.files if name.startswith("certificates/"))
        return [read_certificate(self.path / name) for name in names]

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open a bundle and check every file. Raises BundleError naming the file at fault."""
        path = Path(path)
        try:
            data = (path / "manifest.json").read_bytes()
        except OSError:
            raise BundleError(f"{path}: not a bundle, it has no manifest.json. Make one with pkd-export.") from None
        _check_schema(path, data)
        try:
            manifest = Manifest.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise BundleError(f"{path / 'manifest.json'}: {where}: {first['msg']}.") from None
        bundle = cls(path, manifest)
        for name in manifest.files:
            bundle.read(name)
        return bundle


def self_test(bundle: Bundle, embed: Callable[[Rgb], NDArray[np.float32]]) -> float:
    """Largest 1 − cosine over the golden crops. Raises BundleError above the manifest's tolerance.

    ``embed``: uint8 N×H×W×3 → unit rows N×D, as ``Encoder.embed``.
    """
    golden = bundle.golden()
    made = embed(golden.crops)
    error = float(np.max(1.0 - np.sum(made * golden.embeddings, axis=1)))
    if not error <= bundle.manifest.golden_tolerance:
        raise BundleError(
            f"{bundle.path}: golden crops come out {error:.2g} away (1 − cosine), allowed "
            f"{bundle.manifest.golden_tolerance:g}. "
            "This runtime does not compute the encoder that was exported; do not serve it."
        )
    return error


def write_bundle(path: str | Path, files: Mapping[str, bytes], manifest: Manifest, *, replace: bool = False) -> Bundle:
    """Write ``files`` and a manifest with their hashes to the directory ``path``, all or nothing.

    ``manifest.files`` is filled in here. Raises BundleError if ``path`` exists and ``replace`` is false, or if it is
    no bundle.
    """
    path = Path(path)
    if path.exists() and not (replace and (path / "manifest.json").is_file()):
        remedy = (
            "Choose another path or pass --force." if (path / "manifest.json").is_file() else "Choose another path."
        )
        raise BundleError(f"{path} exists already. {remedy}")
    path.parent.mkdir(parents=True, exist_ok=True)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    manifest = manifest.model_copy(update={"files": hashes})
    building = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        building.chmod(0o755)
        for name, data in files.items():
            target = _inside(building, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        (building / "manifest.json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if path.exists():
            shutil.rmtree(path)
        building.replace(path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return Bundle(path, manifest)


def pack_golden(golden: Golden) -> bytes:
    """``golden.npz`` as bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, crops=golden.crops, embeddings=golden.embeddings)
    return buffer.getvalue()


def _read(root: Path, name: str) -> bytes:
    target = _inside(root, name)
    try:
        return target.read_bytes()
    except OSError as error:
        raise BundleError(f"{target}: {error.strerror}, but the manifest lists it. Copy the whole bundle.") from None


def _inside(root: Path, name: str) -> Path:
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        raise BundleError(f"{root}: the manifest names {name!r}, which leads out of the bundle. Do not trust it.")
    target = root.joinpath(*parts)
    if target.exists() and not target.resolve().is_relative_to(root.resolve()):
        raise BundleError(f"{root}: {name!r} is a link that leads out of the bundle. Do not trust it.")
    return target


def _check_schema(path: Path, data: bytes) -> None:
    """Before anything else is read: another version may have other fields."""
    try:
        version = json.loads(data).get("schema_version")
    except (ValueError, AttributeError):
        raise BundleError(f"{path / 'manifest.json'}: not a JSON object.") from None
    if version != SCHEMA:
        raise BundleError(f"{path}: bundle schema {version}; this pkd reads {SCHEMA}. Upgrade pkd or export again.")
