"""Check that a certificate, an evaluation or a bundle is whole, free of contradiction, and from a known key.

Every question is one Check. What was not asked is a Check, too: integrity without authenticity must not look like both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from pkd.toolkit.bundle.bundle import MANIFEST, Bundle, is_bundle, self_test
from pkd.toolkit.bundle.target import Target
from pkd.toolkit.certificates.certificate import (
    Certificate,
    CertificateFile,
    file_name,
    parse_certificate,
    read_certificate,
)
from pkd.toolkit.certificates.signing import SUFFIX, Signature, TrustedKeys, signature_beside
from pkd.toolkit.core.errors import InputError, MissingExtra, NotTrusted, PkdError, TargetUnavailable
from pkd.toolkit.core.models import Record, fault_of
from pkd.toolkit.encoders.base import Encoder, open_bundle
from pkd.toolkit.encoders.registry import open_target
from pkd.toolkit.evaluation.metrics.error_rates import EXPECTED
from pkd.toolkit.evaluation.protocols.all_pairs import certify
from pkd.toolkit.evaluation.results.schema import Evaluation

REPORT = "report.json"
CONSISTENT = "schema and consistency"
WHOLE = "every file's SHA-256"
GOLDEN = "reproduces its golden embeddings"
ROUNDING = 1e-9
Kind = Literal["certificate", "evaluation", "bundle"]


class Check(Record):
    """Hold one question and its answer."""

    file: str
    """Relative to what is verified."""
    question: str
    result: Literal["ok", "failed", "not checked"]
    detail: str


class Verdict(Record):
    """Hold all that was asked about one certificate, evaluation or bundle."""

    path: str
    kind: Kind
    checks: tuple[Check, ...]

    @property
    def failures(self) -> tuple[Check, ...]:
        """Return the checks that failed."""
        return tuple(check for check in self.checks if check.result == "failed")


def verify(path: Path, keys: TrustedKeys | None) -> Verdict:
    """Check whatever lies at ``path``. Never raises for what is found wrong there: that is a failed check.

    ``keys``: whose signatures are believed; None: signatures are not checked. Raises InputError for a path that is no
    certificate file, no pkd-evaluate folder and no bundle.
    """
    if is_bundle(path):
        return Verdict(path=str(path), kind="bundle", checks=tuple(_bundle(path, keys)))
    if path.is_file():
        if path.name == REPORT or path.suffix == SUFFIX:
            raise InputError(f"{path}: is a part of something. Give the folder of the evaluation, or a certificate.")
        return Verdict(path=str(path), kind="certificate", checks=tuple(_certificate_file(path, path.name, keys)))
    if (path / REPORT).is_file():
        return Verdict(path=str(path), kind="evaluation", checks=tuple(_evaluation(path, keys)))
    what = "holds neither report.json nor manifest.json" if path.is_dir() else "no such file or folder"
    raise InputError(f"{path}: {what}. Give a certificate, the --out folder of pkd-evaluate, or a bundle.")


def _certificate_file(path: Path, name: str, keys: TrustedKeys | None) -> list[Check]:
    try:
        data = path.read_bytes()
    except OSError as error:
        return [_failed(name, "can be read", f"{path}: {error.strerror}.")]
    return [_certificate(data, path, name), _signed(data, path, name, partial(signature_beside, path), keys)]


def _certificate(data: bytes, path: Path, name: str) -> Check:
    return _check(name, CONSISTENT, lambda: _contradiction_free(parse_certificate(data, path)))


def _contradiction_free(c: Certificate) -> str:
    """Refuse what the schema cannot see: counts that do not fit one another. Returns a summary."""
    smallest = EXPECTED / min(c.identity_pairs, c.impostor_pairs)
    most_pairs = c.identities * (c.identities - 1) // 2
    if abs(c.min_fmr - smallest) > ROUNDING * smallest:
        raise NotTrusted(f"min_fmr is {c.min_fmr:g}, but its pairs of different identities resolve {smallest:g}.")
    if c.identity_pairs > most_pairs or c.genuine_identities > c.identities or c.images < c.identities:
        raise NotTrusted(
            f"{c.identities:,} identities cannot have {c.identity_pairs:,} pairs, {c.genuine_identities:,} identities "
            f"with genuine pairs and {c.images:,} images."
        )
    return f"{len(c.points)} operating points, {c.identities:,} identities, {c.created[:10]}"


def _evaluation(folder: Path, keys: TrustedKeys | None) -> list[Check]:
    report = folder / REPORT
    data = report.read_bytes()
    made: dict[str, Certificate] = {}

    def remade() -> str:
        made.update(_certificates_of(data, report))
        return f"its {len(made)} certificates can be made from it" if made else "it certifies nothing"

    checks = [
        _check(REPORT, CONSISTENT, remade),
        _signed(data, report, REPORT, partial(signature_beside, report), keys),
    ]
    readable = checks[0].result == "ok"
    found = {path.name: path for path in sorted((folder / "certificates").glob("*.json"))}
    for name, path in found.items():
        where = f"certificates/{name}"
        checks += _certificate_file(path, where, keys)
        if readable:
            checks.append(_check(where, "agrees with report.json", partial(_agrees, path, made.get(name))))
    missing = [name for name in made if name not in found]
    checks += [_failed(f"certificates/{name}", "is there", "report.json names it. Evaluate again.") for name in missing]
    for orphan in sorted((folder / "certificates").glob(f"*{SUFFIX}")):
        if orphan.name.removesuffix(SUFFIX) not in found:
            checks.append(_failed(f"certificates/{orphan.name}", "is there", "what it signs is missing."))
    others = sorted(p.name for p in folder.iterdir() if p.name not in (REPORT, REPORT + SUFFIX, "certificates"))
    if others:
        checks.append(_open(", ".join(others), "signature", "no signature covers these; report.json is what counts"))
    return checks


def _certificates_of(data: bytes, report: Path) -> dict[str, Certificate]:
    """Map file names to the certificate that report.json stands for."""
    try:
        evaluation = Evaluation.model_validate_json(data)
        certified = [c for c in evaluation.comparisons if c.certificate]
        made = {str(c.certificate): certify(c, evaluation) for c in certified}
    except ValidationError as error:
        raise NotTrusted(f"{report}: {fault_of(error)}. Evaluate again.") from None
    except KeyError as error:
        raise NotTrusted(
            f"{report}: certifies {error}, which is neither its teacher, its student nor its mapped encoder."
        ) from None
    for name, certificate in made.items():
        if name != certificate.file_name:
            raise NotTrusted(f"{report}: names {name} where {certificate.file_name} is meant.")
        _contradiction_free(certificate)
    return made


def _agrees(path: Path, expected: Certificate | None) -> str:
    if expected is None:
        raise NotTrusted(f"{path}: report.json knows no such certificate: it comes from another evaluation. Remove it.")
    found = read_certificate(path)
    different = [name for name in type(found).model_fields if getattr(found, name) != getattr(expected, name)]
    if different:
        raise NotTrusted(f"{path}: {', '.join(different)} differ from report.json: one of the two was changed.")
    return "every field"


def _bundle(path: Path, keys: TrustedKeys | None) -> list[Check]:
    """Check the signature first: nothing of a bundle is run that should have been signed and is not."""
    try:
        bundle = Bundle.peek(path)
    except PkdError as error:
        return [_refused(MANIFEST, WHOLE, error)]
    signed = _check(MANIFEST, "signature", partial(_manifest_signature, bundle, keys))
    whole = _check(MANIFEST, WHOLE, partial(_whole, bundle))
    checks = [whole, signed]
    if whole.result == "failed":
        return checks
    trusted = signed.result != "failed"
    checks.append(_check("encoder.onnx", GOLDEN, partial(_tested, bundle, None, trusted)))
    for target in bundle.manifest.targets:
        checks.append(_check(f"targets/{target.name}", GOLDEN, partial(_tested, bundle, target, trusted)))
    for file in bundle.certificate_files():
        name = file.path.relative_to(path).as_posix()
        expected = file_name(file.certificate.query, file.certificate.gallery)
        checks.append(_certificate(file.data, file.path, name))
        if file.path.name != expected:
            checks.append(_failed(name, "file name", f"holds the certificate {expected}."))
        checks.append(_check(name, "signature", partial(_evidence_signature, bundle, file, keys)))
    return checks


def _whole(bundle: Bundle) -> str:
    bundle.check()
    return f"{len(bundle.manifest.files)} files as listed"


def _tested(bundle: Bundle, target: Target | None, trusted: bool) -> str:
    if not trusted:
        raise _Unasked("not run: a graph is a program, and no trusted key signed the manifest")
    try:
        encoder: Encoder = open_target(bundle, target.name) if target else open_bundle(bundle)
    except (TargetUnavailable, MissingExtra) as error:
        raise _Unasked(str(error)) from None
    return f"1 − cosine is {max(0.0, self_test(bundle, encoder.embed, target)):.1g} at most"


def _manifest_signature(bundle: Bundle, keys: TrustedKeys | None) -> str:
    if keys:
        return f"{bundle.require_signed(keys)}, for every file"
    more = "" if bundle.signature else ": whoever changes a file can change its hash, too"
    raise _Unasked(_unchecked(bundle.signature) + more)


def _evidence_signature(bundle: Bundle, file: CertificateFile, keys: TrustedKeys | None) -> str:
    if keys:
        key = bundle.require_evidence(keys, file)
        return key if file.signature else f"none of its own; {key} signed the bundle that holds it"
    raise _Unasked(_unchecked(file.signature))


def _signed(
    data: bytes, path: Path, name: str, signature: Callable[[], Signature | None], keys: TrustedKeys | None
) -> Check:
    def signed() -> str:
        found = signature()
        if keys:
            return keys.require(data, found, path)
        raise _Unasked(_unchecked(found))

    return _check(name, "signature", signed)


def _unchecked(signature: Signature | None) -> str:
    return f"signed by {signature.key}; pass --trust-key PUB.pem to check it" if signature else "not signed"


class _Unasked(Exception):
    """Say that a question was not asked, and why."""


def _check(file: str, question: str, ask: Callable[[], str]) -> Check:
    try:
        return Check(file=file, question=question, result="ok", detail=ask())
    except _Unasked as why:
        return _open(file, question, str(why))
    except PkdError as error:
        return _refused(file, question, error)


def _refused(file: str, question: str, error: PkdError) -> Check:
    name, said = Path(file).name, str(error)
    if name in said and ": " not in said[: said.index(name)]:  # the check names the file already
        said = said[said.index(name) :].removeprefix(f"{name}: ")
    return _failed(file, question, said)


def _failed(file: str, question: str, detail: str) -> Check:
    return Check(file=file, question=question, result="failed", detail=detail)


def _open(file: str, question: str, detail: str) -> Check:
    return Check(file=file, question=question, result="not checked", detail=detail)
