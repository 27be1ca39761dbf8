"""Certificates and their signatures inside a bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkd.toolkit.bundle.bundle import Bundle, write_bundle
from pkd.toolkit.certificates.signing import Signature
from pkd.toolkit.core.errors import BundleError, NotTrusted
from tests.support.bundle_factory import bundle, certificate, content, replace_file

SIGNED = Signature("sha256:" + "0" * 64, bytes(64))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return bundle(tmp_path).path


def test_certificates_in_a_bundle_must_be_about_its_encoder(tmp_path: Path) -> None:
    files, manifest = content()
    info = manifest.encoder
    own = certificate(info.id, "other@sha256:00", info.space.id)
    foreign = certificate("x@sha256:00", "y@sha256:00", info.space.id)
    elsewhere = certificate(info.id, info.id, "another@sha256:00")
    for number, (made, said) in enumerate(((own, None), (foreign, "not about"), (elsewhere, "certifies the space"))):
        with_certificate = {**files, f"certificates/{made.file_name}": made.model_dump_json().encode()}
        if said is None:
            written = write_bundle(tmp_path / str(number), with_certificate, manifest)
            assert written.certificates() == [own]
        else:
            with pytest.raises(BundleError, match=said):
                write_bundle(tmp_path / str(number), with_certificate, manifest)
            assert not (tmp_path / str(number)).exists()


def test_a_broken_certificate_is_refused_on_opening(good: Path) -> None:
    replace_file(good, "certificates/a.json", b"{}")
    with pytest.raises(BundleError, match=r"a\.json: not a certificate"):
        Bundle.open(good)


def test_a_certificate_keeps_its_signature_and_its_bytes(tmp_path: Path) -> None:
    files, manifest = content()
    info = manifest.encoder
    certificates = certificate(info.id, info.id, info.space.id), certificate(info.id, "other@sha256:00", info.space.id)
    added = {f"certificates/{c.file_name}": c.model_dump_json(indent=3).encode() for c in certificates}
    first = f"certificates/{certificates[0].file_name}"
    made = write_bundle(tmp_path / "made", {**files, **added, f"{first}.sig": SIGNED.text()}, manifest)
    found = {file.path.relative_to(made.path).as_posix(): file for file in Bundle.open(made.path).certificate_files()}
    assert {name: file.data for name, file in found.items()} == added
    assert {name: file.signature for name, file in found.items()} == {n: SIGNED if n == first else None for n in added}


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("certificates/a.json.sig", SIGNED.text(), r"a\.json\.sig: signs a file that is not in the bundle"),
        ("certificates/a.json.sig.sig", SIGNED.text(), "signs a file that is not in the bundle"),
        ("certificates/a.sig", b"", "signs a file that is not in the bundle"),
        ("certificates/notes.txt", b"hello", r"notes\.txt: not a certificate"),
    ],
)
def test_the_folder_of_certificates_holds_nothing_else(good: Path, name: str, data: bytes, said: str) -> None:
    replace_file(good, name, data)
    with pytest.raises(BundleError, match=said):
        Bundle.open(good)


def test_a_broken_signature_is_refused_on_opening(tmp_path: Path) -> None:
    files, manifest = content()
    made = certificate(manifest.encoder.id, manifest.encoder.id, manifest.encoder.space.id)
    name = f"certificates/{made.file_name}"
    with pytest.raises(NotTrusted, match=r"\.json\.sig: not a signature file"):
        write_bundle(tmp_path / "made", {**files, name: made.model_dump_json().encode(), f"{name}.sig": b"x"}, manifest)
    assert not (tmp_path / "made").exists()
