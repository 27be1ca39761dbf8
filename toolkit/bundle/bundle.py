"""Keep an encoder on disk with everything needed to run it, check it and trust it: a bundle. Format: docs/bundle.md."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from pkd.toolkit.bundle.archive import SUFFIX as ZIP
from pkd.toolkit.bundle.archive import list_zip, read_zip, write_zip
from pkd.toolkit.bundle.folder import (
    MAX_FILE,
    MAX_FILES,
    aside_of,
    build_folder,
    check_name,
    list_files,
    read_file,
    recover,
    swap_in,
)
from pkd.toolkit.bundle.golden import Golden as Golden
from pkd.toolkit.bundle.golden import pack_golden as pack_golden
from pkd.toolkit.bundle.golden import read_golden
from pkd.toolkit.bundle.onnx_check import check_onnx
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.certificates.certificate import Certificate, CertificateFile, parse_certificate
from pkd.toolkit.certificates.signing import SUFFIX, Signature, SigningKey, TrustedKeys
from pkd.toolkit.core.encoder_info import EncoderInfo, short
from pkd.toolkit.core.errors import BundleError, PkdError, plain_reason
from pkd.toolkit.core.models import Record, fault_of, read_json
from pkd.toolkit.images.codec import Rgb

SCHEMA = 3
"""Schema that is written. 1 had no targets; 2 no signature, and its readers refuse one as a file that is not listed."""
READABLE = (1, 2, SCHEMA)
MANIFEST = "manifest.json"
SIGNATURE = MANIFEST + SUFFIX
"""The one file beside the manifest that it cannot list."""
NOT_GATED = "not gated"
MAX_MANIFEST = 1 << 20
"""Bytes; a real manifest has a few kilobytes."""
MAX_SIGNATURE = 1 << 10
"""Bytes; a signature file has 169."""


class GraphSpec(Record):
    """State what ``encoder.onnx`` takes and gives."""

    input_name: str = "crops"
    input: str = "uint8 N×H×W×3 RGB"
    output_name: str = "embedding"
    output: str = "float32 N×D, unit rows"
    opset: int = Field(ge=1, le=1000)


class Manifest(Record):
    """Hold ``manifest.json``: what the bundle is, and the SHA-256 of every other file in it."""

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
        """Map ids to every encoder in the bundle; its own, in fp32, comes first."""
        return {info.id: info for info in (self.encoder, *(target.encoder for target in self.targets))}

    def target(self, name: str) -> Target | None:
        """Return the target called ``<runtime>-<precision>``, if there is one."""
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
class Bundle:
    """Open a directory, or a zip of one, whose every file was checked against the manifest."""

    path: Path
    manifest: Manifest
    data: bytes
    """The manifest as it lies on disk: what is signed."""
    signature: Signature | None
    """Signature of ``data``, unchecked; None where nobody signed."""

    def read(self, name: str) -> bytes:
        """Read one listed file, checked against its hash. Raises BundleError."""
        expected = self.manifest.files.get(name)
        if expected is None:
            raise BundleError(f"{self.path}: the manifest lists no {name}. Export the bundle again.")
        data = _read(self.path, name)
        if hashlib.sha256(data).hexdigest() != expected:
            raise BundleError(
                f"{self.path / name}: its SHA-256 is not the manifest's; the file was changed or damaged. "
                "Copy or export the bundle again."
            )
        return data

    def golden(self) -> Golden:
        """Read golden crops and embeddings. Raises BundleError unless they fit the encoder and are finite unit rows."""
        return read_golden(self.read("golden.npz"), self.manifest.encoder, self.path / "golden.npz")

    def certificate_files(self) -> list[CertificateFile]:
        """Read every certificate in the bundle and its signature, unchecked.

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
            found.append(CertificateFile(where, data, certificate, signature, self.signature))
        return found

    def certificates(self) -> list[Certificate]:
        """Read every certificate in the bundle. Raises as ``certificate_files``."""
        return [file.certificate for file in self.certificate_files()]

    def require_signed(self, keys: TrustedKeys) -> str:
        """Find the trusted key that signed the manifest, and so every file → its fingerprint. Raises NotTrusted."""
        return keys.require(self.data, self.signature, self.path / MANIFEST, "pkd-export --sign KEY.pem")

    def require_evidence(self, keys: TrustedKeys, file: CertificateFile) -> str:
        """Find the trusted key that vouches for a certificate of this bundle → its fingerprint. Raises NotTrusted.

        Its own signature, where it has one, is what counts. An unsigned one is vouched for by whoever signed the
        manifest, which holds its hash.
        """
        if file.signature is None:
            return self.require_signed(keys)
        return keys.require(file.data, file.signature, file.path)

    def pack(self, path: str | Path) -> Path:
        """Write the bundle to ``path`` as one zip, all or nothing; the same bundle gives the same bytes."""
        path = Path(path)
        own = {MANIFEST: self.data} | ({SIGNATURE: self.signature.text()} if self.signature else {})
        names = sorted([*own, *self.manifest.files])
        write_zip(path, ((name, own[name] if name in own else self.read(name)) for name in names))
        return path

    @classmethod
    def peek(cls, path: str | Path) -> Bundle:
        """Read the manifest and its signature; nothing else is read or checked. Raises BundleError or NotTrusted."""
        path = Path(path)
        manifest, data = _read_manifest(path)
        signed = SIGNATURE in _names(path) and manifest.schema_version >= 3
        found = Signature.parse(_read(path, SIGNATURE, MAX_SIGNATURE), path / SIGNATURE) if signed else None
        return cls(path, manifest, data, found)

    @classmethod
    def open(cls, path: str | Path, keys: TrustedKeys | None = None) -> Bundle:
        """Open a bundle (a folder or a zip) and check every file. Raises BundleError naming the file at fault.

        With ``keys`` the manifest must be signed by one of them, which is asked before any other file is read. Raises
        NotTrusted.
        """
        bundle = cls.peek(path)
        if keys:
            bundle.require_signed(keys)
        bundle.check()
        return bundle

    def check(self) -> None:
        """Check every file but the signature. Raises BundleError naming the file at fault."""
        path, listed = self.path, self.manifest.files
        for required in ("encoder.onnx", "golden.npz"):
            if required not in listed:
                raise BundleError(f"{path / MANIFEST}: lists no {required}. Export the bundle again.")
        if len(listed) > MAX_FILES:
            raise BundleError(f"{path / MANIFEST}: lists more than {MAX_FILES:,} files. Do not trust it.")
        for name in listed:
            check_name(path, name)
            if name in (MANIFEST, SIGNATURE):
                raise BundleError(f"{path / MANIFEST}: lists {name}, which no manifest can. Do not trust it.")
        own = {MANIFEST, SIGNATURE} if self.manifest.schema_version >= 3 else {MANIFEST}
        for name in _names(path):
            if name not in listed and name not in own:
                raise BundleError(f"{path / name}: not listed in the manifest. Remove it, or export the bundle again.")
        for name in listed:
            data = self.read(name)
            if name.endswith(".onnx"):
                check_onnx(data, path / name)
        self.golden()
        self.certificates()


def self_test(bundle: Bundle, embed: Callable[[Rgb], NDArray[np.float32]], target: Target | None = None) -> float:
    """Compute the largest 1 − cosine over the golden crops.

    Raises BundleError above the tolerance of ``target``, or the bundle's.

    ``embed``: uint8 N×H×W×3 → unit rows N×D, as ``Encoder.embed``.
    """
    golden = bundle.golden()
    where, allowed = (
        (f"{bundle.path}: {target.name}", target.golden_tolerance)
        if target
        else (str(bundle.path), bundle.manifest.golden_tolerance)
    )
    try:
        made = np.asarray(embed(golden.crops), np.float64)
    except PkdError:
        raise
    except Exception as error:  # the runtimes' own errors share no public base class
        said = plain_reason(error)
        raise BundleError(
            f"{where}: does not run on its golden crops: {said} Export it again on this machine."
        ) from None
    if made.shape != golden.embeddings.shape:
        raise BundleError(f"{where}: golden crops give {made.shape}, expected {golden.embeddings.shape}.")
    away = float(np.max(1.0 - np.sum(made * golden.embeddings, axis=1)))
    if not away <= allowed:
        raise BundleError(
            f"{where}: golden crops come out {away:.2g} away (1 − cosine), allowed {allowed:g}. "
            "This runtime does not compute the encoder that was exported; do not serve it."
        )
    return away


def write_bundle(
    path: str | Path,
    files: Mapping[str, bytes],
    manifest: Manifest,
    *,
    replace: bool = False,
    key: SigningKey | None = None,
) -> Bundle:
    """Write ``files`` and a manifest with their hashes to the directory ``path``, all or nothing.

    ``manifest.files`` is filled in here, and the manifest is signed with ``key``.
    With ``replace`` an older bundle at ``path`` is swapped out; a process killed
    in between leaves the old bundle or the new one, at worst under the hidden name that the next write puts back.
    Raises BundleError if ``path`` is taken by something else, or what is written would not open.
    """
    path = Path(path).resolve()
    recover(path)
    require_free(path, replace=replace)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    manifest = manifest.model_copy(update={"files": hashes, "schema_version": SCHEMA})
    data = manifest_bytes(manifest)
    content = {**files, MANIFEST: data} | ({SIGNATURE: key.sign(data).text()} if key else {})
    with build_folder(path, content) as building:
        bundle = Bundle.open(building)
        swap_in(building, path)
    return dataclasses.replace(bundle, path=path)


def is_bundle(path: Path) -> bool:
    """Tell whether ``path`` looks like a bundle: a folder with a manifest, or a zip."""
    return (path / MANIFEST).is_file() or (path.suffix == ZIP and path.is_file())


def require_free(path: str | Path, *, replace: bool = False) -> None:
    """Raise BundleError unless a bundle may be written to ``path``.

    It may where nothing is there, or an empty folder, or, with ``replace``, a bundle and nothing else.
    """
    path = Path(path)
    blocking = next((parent for parent in path.absolute().parents if parent.is_file()), None)
    if blocking:
        raise BundleError(f"{path}: {blocking.name} is a file, not a folder. Choose another path.")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    listed = _listed_loosely(path)
    if listed is None:
        raise BundleError(f"{path} exists and is not a bundle. Choose another path; --force replaces only bundles.")
    foreign = [name for name in list_files(path) if name not in listed and name not in (MANIFEST, SIGNATURE)]
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
    """Write ``manifest.json`` as bytes: UTF-8, two spaces, fields in the order of the class, a final newline."""
    return (manifest.model_dump_json(indent=2) + "\n").encode()


def _names(path: Path) -> list[str]:
    return list_zip(path) if path.is_file() else list_files(path)


def _read(path: Path, name: str, limit: int = MAX_FILE) -> bytes:
    return read_zip(path, name, limit=limit) if path.is_file() else read_file(path, name, limit=limit)


def _read_manifest(path: Path) -> tuple[Manifest, bytes]:
    where = path / MANIFEST
    if MANIFEST not in list_zip(path) if path.is_file() else not where.is_file():
        aside = aside_of(path)
        left = f" An export that was killed left the old one at {aside}: rename it back." if aside.exists() else ""
        raise BundleError(f"{path}: not a bundle, it has no {MANIFEST}. Make one with pkd-export.{left}")
    data = _read(path, MANIFEST, MAX_MANIFEST)
    try:
        # First of all, for another version may have other fields.
        version = read_json(data, where)["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BundleError(f"{where}: not the manifest of a bundle: it states no schema_version.") from None
    if version not in READABLE or isinstance(version, bool):
        known = f"{', '.join(map(str, READABLE[:-1]))} and {SCHEMA}"
        raise BundleError(f"{where}: bundle schema {version!r}; this pkd reads {known}. Upgrade pkd or export again.")
    try:
        return Manifest.model_validate_json(data, strict=True), data
    except ValidationError as error:
        raise BundleError(f"{where}: {fault_of(error)}. Export the bundle again.") from None


def _listed_loosely(path: Path) -> set[str] | None:
    """Read the file names in a manifest of any version, damaged or not; None where there is none."""
    try:
        manifest = json.loads(read_file(path, MANIFEST, limit=MAX_MANIFEST))
        return set(manifest["files"]) if {"schema_version", "encoder"} <= set(manifest) else None
    except (BundleError, ValueError, KeyError, TypeError, RecursionError):
        return None
