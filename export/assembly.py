"""Put targets and evidence into a draft, and collect the certificates and the report that belong into a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pkd.export.checks.gate import GateResults
from pkd.export.checks.parity import onnx_runner
from pkd.export.draft import Draft
from pkd.export.formats.registry import BuildResults
from pkd.toolkit.bundle.bundle import NOT_GATED, Manifest, require_about
from pkd.toolkit.certificates.certificate import CertificateFile
from pkd.toolkit.certificates.signing import SUFFIX
from pkd.toolkit.core.encoder_info import EncoderInfo, short
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.device.kit import IN_BUNDLE, make_kit
from pkd.toolkit.encoders.base import NetEncoder
from pkd.toolkit.encoders.detector import Detector


def assemble(
    draft: Draft, built: BuildResults, gated: GateResults, certificates: Sequence[Path]
) -> tuple[Manifest, dict[str, bytes]]:
    """Put targets and evidence into the draft, in the place of older ones of the same name. Raises InputError."""
    added = {target.name for target in built.targets}
    kept = [target for target in draft.manifest.targets if target.name not in added]
    needed = {name for target in kept for name in (target.graph, target.file) if name}
    gone = tuple(f"targets/{name}/" for name in added)
    gate = gated.summary
    if draft.manifest.gate != NOT_GATED:
        gate = f"{draft.manifest.gate}. {', '.join(sorted(added))} later: {gate}"
    manifest = draft.manifest.model_copy(update={"targets": (*kept, *built.targets), "gate": gate})
    evidence = {
        f"certificates/{certificate.file_name}": (certificate.model_dump_json(indent=2) + "\n").encode()
        for certificate in gated.certificates
        if certificate.points
    }
    evidence |= collect_certificates(certificates, *manifest.encoders.values())
    # A newer certificate comes with its own signature or with none; the older one's would say that it was changed.
    stale = {name + SUFFIX for name, data in evidence.items() if draft.files.get(name, data) != data}
    older = {
        name: data
        for name, data in draft.files.items()
        if name not in stale and (name in needed or not name.startswith(gone))
    }
    return manifest, {**older, **built.files, **evidence}


def device_kit(encoder: EncoderInfo, graph: bytes, detector: Detector | None) -> dict[str, bytes]:
    """Compute the conformance kit of ``encoder``, whose ``encoder.onnx`` is ``graph`` → name in the bundle to content.

    ``detector``: its landmarks are added.
    """
    net = NetEncoder(encoder, onnx_runner(graph, lambda crops: crops, "encoder.onnx"))
    return {IN_BUNDLE + name: data for name, data in make_kit(net, detector).items()}


def collect_certificates(sources: Sequence[Path], *encoders: EncoderInfo) -> dict[str, bytes]:
    """Collect the certificates that name one of ``encoders``, their signatures, and the first report.html.

    ``sources``: pkd-evaluate folders, folders of certificates, or certificate files. Raises InputError for a source
    without a certificate about any of them, and where two differ about one ordered pair.
    """
    files: dict[str, bytes] = {}
    known = {encoder.id: encoder for encoder in encoders}
    for source in sources:
        found = [CertificateFile.read(path) for path in _candidates(source)]
        own = [file for file in found if known.keys() & {file.certificate.query, file.certificate.gallery}]
        if not own:
            ids = sorted({short(i) for f in found for i in (f.certificate.query, f.certificate.gallery)})
            raise InputError(
                f"{source}: no certificate there is about {' or '.join(map(short, known))}; they are about "
                f"{', '.join(ids)}. Evaluate this very encoder with pkd-evaluate."
            )
        for file in own:
            certificate = file.certificate
            require_about(certificate, known.get(certificate.query) or known[certificate.gallery], file.path)
            name = f"certificates/{certificate.file_name}"
            if files.setdefault(name, file.data) != file.data:
                raise InputError(
                    f"{file.path}: a second certificate of {short(certificate.query)} against "
                    f"{short(certificate.gallery)}. Pass one evaluation per ordered pair."
                )
            if file.signature and files.setdefault(name + SUFFIX, file.signature.text()) != file.signature.text():
                raise InputError(f"{file.path}: is signed by two keys in what was given. Pass one of the two.")
        report = source / "report.html"
        if report.is_file():
            files.setdefault("report.html", report.read_bytes())
    return files


def _candidates(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    folder = source / "certificates" if (source / "certificates").is_dir() else source
    paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not paths:
        raise InputError(
            f"{source}: no certificates there. Give the --out folder of a pkd-evaluate that could write one."
        )
    return paths
