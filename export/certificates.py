"""Which measured certificates, and which report, belong into the bundle of one encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pkd.toolkit.bundle import require_about
from pkd.toolkit.certificate import Certificate, parse_certificate
from pkd.toolkit.errors import InputError
from pkd.toolkit.space import EncoderInfo, short


def collect(sources: Sequence[Path], encoder: EncoderInfo) -> dict[str, bytes]:
    """Bundle files from evaluations: the certificates that name ``encoder``, and the first report.html.

    ``sources``: pkd-evaluate folders, folders of certificates, or certificate files. Raises InputError for a source
    without a certificate about ``encoder``, and where two differ about one ordered pair.
    """
    files: dict[str, bytes] = {}
    for source in sources:
        found = {path: _read(path) for path in _candidates(source)}
        own = {path: c for path, (c, _) in found.items() if encoder.id in (c.query, c.gallery)}
        if not own:
            ids = sorted({short(i) for c, _ in found.values() for i in (c.query, c.gallery)})
            raise InputError(
                f"{source}: no certificate there is about {short(encoder.id)}; they are about {', '.join(ids)}. "
                "Evaluate this very encoder with pkd-evaluate."
            )
        for path, certificate in own.items():
            require_about(certificate, encoder, path)
            name, data = f"certificates/{certificate.file_name}", found[path][1]
            if files.setdefault(name, data) != data:
                raise InputError(
                    f"{path}: a second certificate of {short(certificate.query)} against {short(certificate.gallery)}. "
                    "Pass one evaluation per ordered pair."
                )
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


def _read(path: Path) -> tuple[Certificate, bytes]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}. Give the --out folder of pkd-evaluate.") from None
    return parse_certificate(data, path), data
