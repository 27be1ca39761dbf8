"""Bundle: an encoder on disk with everything needed to run it, check it and trust it. Format: docs/bundle.md."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from pkd.toolkit.bundle_folder import aside_of, build_folder, check_name, list_files, read_file, recover, swap_in
from pkd.toolkit.certificate import Certificate, CertificateFile, parse_certificate
from pkd.toolkit.errors import BundleError
from pkd.toolkit.images import Rgb
from pkd.toolkit.record import Record
from pkd.toolkit.signing import SUFFIX, Signature
from pkd.toolkit.space import EncoderInfo, short
from pkd.toolkit.target import Target

SCHEMA = 2
"""What is written. Schema 1 had no targets."""
READABLE = (1, SCHEMA)
MANIFEST = "manifest.json"
NOT_GATED = "not gated"
MAX_MANIFEST = 1 << 20
"""Bytes; a real manifest has a few kilobytes."""
MAX_GOLDEN = 64 << 20
"""Bytes of golden.npz once decompressed."""


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
    golden_tolerance: float = Field(gt=0, lt=1)
    """Largest allowed 1 − cosine between a golden embedding and its recomputation."""
    gate: str = NOT_GATED
    """Result of the accuracy gate, or why it did not run."""
    licence: str = "not stated"
    training: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    """Provenance: teacher, head, method, margin, data digest, steps."""
    targets: tuple[Target, ...] = ()
    """The encoder for particular runtimes, and in other precisions."""
    tool: str
    created: str
    """ISO 8601, UTC."""
    files: dict[str, str]
    """Relative POSIX path → SHA-256 (hex)."""

    @property
    def encoders(self) -> dict[str, EncoderInfo]:
        """Every encoder in the bundle by id; its own, in fp32, comes first."""
        return {info.id: info for info in (self.encoder, *(target.encoder for target in self.targets))}

    def target(self, name: str) -> Target | None:
        """The target called ``<runtime>-<precision>``, if there is one."""
        return next((target for target in self.targets if target.name == name), None)

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        names = [target.name for target in self.targets]
        if self.schema_version == 1 and names:
            raise ValueError("schema 1 has no targets")
        if len(set(names)) < len(names):
            raise ValueError(f"two targets are called {max(names, key=names.count)}")
        for target in self.targets:
            if (target.encoder.space, target.encoder.preprocess) != (self.encoder.space, self.encoder.preprocess):
                raise ValueError(f"the target {target.name} has another space or preprocessing than the bundle")
            if (target.encoder.id == self.encoder.id) != (target.encoder.numeric_mode == self.encoder.numeric_mode):
                raise ValueError(
                    f"the target {target.name} must be another encoder exactly if its numeric mode differs"
                )
            missing = [name for name in (target.graph, target.file) if name and self.files and name not in self.files]
            if missing:
                raise ValueError(f"the target {target.name} needs {missing[0]}, which is not listed")
        return self


@dataclass(frozen=True)
class Golden:
    """Synthetic crops and their embeddings: the self-test that a server, a phone or a browser runs at start."""

    crops: Rgb
    """uint8 N×H×W×3."""
    embeddings: NDArray[np.float32]
    """N×D, unit rows."""


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
        data = read_file(self.path, name)
        if hashlib.sha256(data).hexdigest() != expected:
            raise BundleError(
                f"{self.path / name}: its SHA-256 is not the manifest's; the file was changed or damaged. "
                "Copy or export the bundle again."
            )
        return data

    def golden(self) -> Golden:
        """The golden crops and embeddings. Raises BundleError unless they fit the encoder and are finite unit rows."""
        where = self.path / "golden.npz"
        data = self.read("golden.npz")
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as parts:
                size = sum(part.file_size for part in parts.infolist())
            if size > MAX_GOLDEN:
                raise BundleError(f"{where}: holds {size:,} bytes, over the limit of {MAX_GOLDEN:,}. Do not trust it.")
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                golden = Golden(arrays["crops"], arrays["embeddings"])
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise BundleError(f"{where}: cannot be read: {error}. Export the bundle again.") from None
        wrong = _golden_fault(golden, self.manifest.encoder)
        if wrong:
            raise BundleError(f"{where}: {wrong}. Export the bundle again.")
        return golden

    def certificate_files(self) -> list[CertificateFile]:
        """Every certificate in the bundle and its signature, unchecked.

        Raises BundleError for one that does not name this encoder, NotTrusted for what is no signature.
        """
        names = {name for name in self.manifest.files if name.startswith("certificates/")}
        signatures = {name for name in names if name.endswith(SUFFIX)}
        if orphans := sorted(name for name in signatures if name.removesuffix(SUFFIX) not in names - signatures):
            raise BundleError(f"{self.path / orphans[0]}: signs a file that is not in the bundle. Export it again.")
        found = []
        for name in sorted(names - signatures):
            data, where, signed = self.read(name), self.path / name, name + SUFFIX
            certificate = parse_certificate(data, where)
            named = (self.manifest.encoders.get(id) for id in (certificate.query, certificate.gallery))
            require_about(certificate, next(filter(None, named), self.manifest.encoder), where)
            signature = Signature.parse(self.read(signed), self.path / signed) if signed in signatures else None
            found.append(CertificateFile(where, data, certificate, signature))
        return found

    def certificates(self) -> list[Certificate]:
        """Every certificate in the bundle. Raises as ``certificate_files``."""
        return [file.certificate for file in self.certificate_files()]

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open a bundle and check every file. Raises BundleError naming the file at fault."""
        path = Path(path)
        bundle = cls(path, _read_manifest(path))
        listed = bundle.manifest.files
        for required in ("encoder.onnx", "golden.npz"):
            if required not in listed:
                raise BundleError(f"{path / MANIFEST}: lists no {required}. Export the bundle again.")
        for name in listed:
            check_name(path, name)
        for name in list_files(path):
            if name not in listed and name != MANIFEST:
                raise BundleError(f"{path / name}: not listed in the manifest. Remove it, or export the bundle again.")
        for name in listed:
            bundle.read(name)
        bundle.golden()
        bundle.certificates()
        return bundle


def self_test(bundle: Bundle, embed: Callable[[Rgb], NDArray[np.float32]], target: Target | None = None) -> float:
    """Largest 1 − cosine over the golden crops. Raises BundleError above the tolerance of ``target``, or the bundle's.

    ``embed``: uint8 N×H×W×3 → unit rows N×D, as ``Encoder.embed``.
    """
    golden = bundle.golden()
    where, allowed = (
        (f"{bundle.path}: {target.name}", target.golden_tolerance)
        if target
        else (str(bundle.path), bundle.manifest.golden_tolerance)
    )
    made = np.asarray(embed(golden.crops), np.float64)
    if made.shape != golden.embeddings.shape:
        raise BundleError(f"{where}: golden crops give {made.shape}, expected {golden.embeddings.shape}.")
    error = float(np.max(1.0 - np.sum(made * golden.embeddings, axis=1)))
    if not error <= allowed:
        raise BundleError(
            f"{where}: golden crops come out {error:.2g} away (1 − cosine), allowed {allowed:g}. "
            "This runtime does not compute the encoder that was exported; do not serve it."
        )
    return error


def write_bundle(path: str | Path, files: Mapping[str, bytes], manifest: Manifest, *, replace: bool = False) -> Bundle:
    """Write ``files`` and a manifest with their hashes to the directory ``path``, all or nothing.

    ``manifest.files`` is filled in here. With ``replace`` an older bundle at ``path`` is swapped out; a process killed
    in between leaves the old bundle or the new one, at worst under the hidden name that the next write puts back.
    Raises BundleError if ``path`` is taken by something else, or what is written would not open.
    """
    path = Path(path).resolve()
    recover(path)
    require_free(path, replace=replace)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    manifest = manifest.model_copy(update={"files": hashes, "schema_version": SCHEMA})
    content = {**files, MANIFEST: manifest_bytes(manifest)}
    with build_folder(path, content) as building:
        Bundle.open(building)
        swap_in(building, path)
    return Bundle(path, manifest)


def require_free(path: str | Path, *, replace: bool = False) -> None:
    """Raise BundleError unless a bundle may be written to ``path``: nothing there, an empty folder, or, with
    ``replace``, a bundle and nothing else."""
    path = Path(path)
    blocking = next((parent for parent in path.absolute().parents if parent.is_file()), None)
    if blocking:
        raise BundleError(f"{path}: {blocking.name} is a file, not a folder. Choose another path.")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    listed = _listed_loosely(path)
    if listed is None:
        raise BundleError(f"{path} exists and is not a bundle. Choose another path; --force replaces only bundles.")
    foreign = [name for name in list_files(path) if name not in listed and name != MANIFEST]
    if foreign:
        raise BundleError(f"{path} holds {foreign[0]}, which is not part of the bundle there. Move it away first.")
    if not replace:
        raise BundleError(f"{path} exists already. Choose another path or pass --force.")


def require_about(certificate: Certificate, encoder: EncoderInfo, source: str | Path) -> None:
    """Raise BundleError unless ``certificate`` names ``encoder`` on one side, and its space."""
    if encoder.id not in (certificate.query, certificate.gallery):
        raise BundleError(
            f"{source}: is about {short(certificate.query)} against {short(certificate.gallery)}, not about "
            f"{short(encoder.id)}. Give the evaluation of this very encoder."
        )
    if certificate.space != encoder.space.id:
        raise BundleError(
            f"{source}: certifies the space {short(certificate.space)}; {short(encoder.id)} embeds into "
            f"{short(encoder.space.id)}."
        )


def manifest_bytes(manifest: Manifest) -> bytes:
    """``manifest.json`` as bytes: UTF-8, two spaces, fields in the order of the class, a final newline."""
    return (manifest.model_dump_json(indent=2) + "\n").encode()


def pack_golden(golden: Golden) -> bytes:
    """``golden.npz`` as bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, crops=golden.crops, embeddings=golden.embeddings)
    return buffer.getvalue()


def _read_manifest(path: Path) -> Manifest:
    where = path / MANIFEST
    if not where.is_file():
        aside = aside_of(path)
        left = f" An export that was killed left the old one at {aside}: rename it back." if aside.exists() else ""
        raise BundleError(f"{path}: not a bundle, it has no {MANIFEST}. Make one with pkd-export.{left}")
    data = read_file(path, MANIFEST, limit=MAX_MANIFEST)
    try:
        version = json.loads(data)["schema_version"]  # first of all: another version may have other fields
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BundleError(f"{where}: not the manifest of a bundle: it states no schema_version.") from None
    if version not in READABLE or isinstance(version, bool):
        known = " and ".join(map(str, READABLE))
        raise BundleError(f"{where}: bundle schema {version!r}; this pkd reads {known}. Upgrade pkd or export again.")
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "content"
        raise BundleError(f"{where}: {field}: {first['msg']}. Export the bundle again.") from None


def _listed_loosely(path: Path) -> set[str] | None:
    """File names in the manifest of a bundle of any version, damaged or not; None where there is no such manifest."""
    try:
        manifest = json.loads(read_file(path, MANIFEST, limit=MAX_MANIFEST))
        return set(manifest["files"]) if {"schema_version", "encoder"} <= set(manifest) else None
    except (BundleError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _golden_fault(golden: Golden, encoder: EncoderInfo) -> str | None:
    size = encoder.preprocess.size
    crops, rows = golden.crops, golden.embeddings
    if crops.dtype != np.uint8 or crops.shape[1:] != (size, size, 3) or not len(crops):
        return f"crops are {crops.dtype} {crops.shape}, expected uint8 N×{size}×{size}×3"
    if rows.dtype != np.float32 or rows.shape != (len(crops), encoder.space.dim):
        return f"embeddings are {rows.dtype} {rows.shape}, expected float32 {len(crops)}×{encoder.space.dim}"
    norms = np.linalg.norm(rows, axis=1)
    if not np.all(np.abs(norms - 1) <= 1e-3):  # also false for NaN
        return "an embedding is not a finite unit vector"
    return None
