"""One test per attack on a bundle: signatures, manifest, sizes. Each is refused, and the file at fault is named."""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from pkd.export.graph.build import serialise, uint8_graph
from pkd.toolkit.bundle import folder
from pkd.toolkit.bundle.bundle import Bundle, Golden, pack_golden, write_bundle
from pkd.toolkit.cli.verification import verify
from pkd.toolkit.core.errors import BundleError, NotTrusted
from pkd.toolkit.encoders.base import open_bundle
from tests.support.bundle_attack import OURS, THEIRS, TRUSTED, failed, refused, signed_bundle
from tests.support.bundle_factory import content, network, replace_file, rewrite


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    return signed_bundle(tmp_path)


def test_a_signed_bundle_is_believed_and_vouches_for_the_certificates_in_it(signed: Path) -> None:
    (file,) = Bundle.open(signed, TRUSTED).certificate_files()
    assert (file.signature, file.bundle) == (None, Bundle.peek(signed).signature)
    verdict = verify(signed, TRUSTED)
    assert not verdict.failures
    told = {check.file: check.detail for check in verdict.checks if check.question == "signature"}
    assert told["manifest.json"] == f"{OURS.fingerprint}, for every file"
    assert told[f"certificates/{file.path.name}"] == (
        f"none of its own; {OURS.fingerprint} signed the bundle that holds it"
    )


@pytest.mark.parametrize("name", ["encoder.onnx", "golden.npz", "certificates/new.json", "report.html"])
def test_a_rehashed_manifest_is_refused(signed: Path, name: str) -> None:
    """Whatever was swapped: every hash is right, and without a key nothing shows."""
    replaced = {
        "encoder.onnx": serialise(onnx.load_model_from_string((signed / "encoder.onnx").read_bytes())),
        "golden.npz": (signed / "golden.npz").read_bytes() + b"\0",
        "certificates/new.json": next((signed / "certificates").iterdir()).read_bytes().replace(b"0.9", b"0.8"),
        "report.html": b"<p>",
    }
    replace_file(signed, name, replaced[name])
    with pytest.raises(NotTrusted, match=r"signed/manifest\.json: was changed after"):
        Bundle.open(signed, TRUSTED)


def test_a_swapped_encoder_whose_golden_embeddings_were_made_again_is_refused(signed: Path) -> None:
    """The attack that signed certificates alone do not stop, for an encoder's id is the digest of its source."""
    _, manifest = content()
    replace_file(signed, "encoder.onnx", serialise(uint8_graph(network(seed=7), manifest.encoder.preprocess, 16)))
    crops = Bundle.peek(signed).golden().crops
    made = open_bundle(Bundle.peek(signed)).embed(crops)
    replace_file(signed, "golden.npz", pack_golden(Golden(crops, made)))
    assert not verify(signed, None).failures
    refused(signed, r"manifest\.json: was changed after", NotTrusted, TRUSTED)


def test_a_swapped_certificate_is_refused(signed: Path) -> None:
    path = next((signed / "certificates").iterdir())
    path.write_bytes(path.read_bytes().replace(b'"seed":0', b'"seed":1'))
    refused(signed, rf"{path.name}: its SHA-256", keys=TRUSTED)


def test_another_key_or_none_is_refused_before_any_other_file_is_read(signed: Path) -> None:
    (signed / "encoder.onnx").unlink()
    data = (signed / "manifest.json").read_bytes()
    for signature, said in (
        (THEIRS.sign(data).text(), f"is signed by {THEIRS.fingerprint}, trusted is {OURS.fingerprint}"),
        (OURS.sign(data).text().replace(OURS.fingerprint.encode(), THEIRS.fingerprint.encode()), "is signed by"),
        (THEIRS.sign(data).text().replace(THEIRS.fingerprint.encode(), OURS.fingerprint.encode()), "was changed after"),
    ):
        (signed / "manifest.json.sig").write_bytes(signature)
        with pytest.raises(NotTrusted, match=rf"signed/manifest\.json: {said}"):
            Bundle.open(signed, TRUSTED)
    (signed / "manifest.json.sig").unlink()
    with pytest.raises(NotTrusted, match=r"signed/manifest\.json: is not signed.*pkd-export --sign"):
        Bundle.open(signed, TRUSTED)


def test_the_signature_of_another_bundle_or_of_another_file_is_refused(signed: Path) -> None:
    files, manifest = content()
    other = write_bundle(signed.parent / "other", files, manifest.model_copy(update={"licence": "other"}), key=OURS)
    assert other.signature
    evidence = OURS.sign(next((signed / "certificates").iterdir()).read_bytes())
    for signature in (other.signature, evidence):
        (signed / "manifest.json.sig").write_bytes(signature.text())
        refused(signed, r"manifest\.json: was changed after", NotTrusted, TRUSTED)


def test_an_older_bundle_of_the_same_key_is_authentic(signed: Path) -> None:
    """What a signature cannot say; docs/bundle.md does. A change of this has to change that page."""
    files, manifest = content()
    older = manifest.model_copy(update={"created": "2020-01-01T00:00:00+00:00"})
    Bundle.open(write_bundle(signed.parent / "older", files, older, key=OURS).path, TRUSTED)
    page = (Path(__file__).parents[2] / "docs/bundle.md").read_text(encoding="utf-8")
    assert "**Whether a bundle is the newest.**" in page


@pytest.mark.parametrize("text", [b"", b"x" * 5000, b"ed25519 sha256:00\n"])
def test_a_signature_file_that_is_none_is_refused_without_a_key_too(signed: Path, text: bytes) -> None:
    (signed / "manifest.json.sig").write_bytes(text)
    with pytest.raises((NotTrusted, BundleError), match=r"manifest\.json\.sig: "):
        Bundle.open(signed)
    assert failed(signed)


def test_a_signature_is_no_part_of_older_schemas_nor_of_the_list(signed: Path) -> None:
    rewrite(signed, schema_version=2)
    refused(signed, r"manifest\.json\.sig: not listed")
    rewrite(signed, schema_version=3)
    for name in ("manifest.json", "manifest.json.sig"):
        files = json.loads((signed / "manifest.json").read_text())["files"]
        rewrite(signed, files={**files, name: hashlib.sha256((signed / name).read_bytes()).hexdigest()})
        refused(signed, rf"lists {re.escape(name)}")
        rewrite(signed, files=files)


def test_what_nobody_trusted_signed_is_not_run(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (signed / "manifest.json.sig").unlink()
    monkeypatch.setattr("pkd.toolkit.cli.verification.open_bundle", lambda bundle: pytest.fail("it was loaded"))
    (golden,) = (c for c in verify(signed, TRUSTED).checks if c.question == "reproduces its golden embeddings")
    assert golden.result == "not checked" and "not run" in golden.detail


def test_a_key_that_stands_twice_is_refused(signed: Path) -> None:
    text = (signed / "manifest.json").read_text()
    for twice in ('"licence": "MIT",\n  "licence"', '"licence": "MIT",\n  "licen\\u0063e"'):
        (signed / "manifest.json").write_text(text.replace('"licence"', twice))
        refused(signed, r"manifest\.json: has 'licence' twice")
    line = next(line for line in text.splitlines() if '"encoder.onnx":' in line)
    (signed / "manifest.json").write_text(text.replace(line, f"{line.rstrip(',')},\n{line}"))
    refused(signed, r"manifest\.json: has 'encoder\.onnx' twice")


def test_a_manifest_of_a_hundred_thousand_equal_keys_is_refused_at_once(signed: Path) -> None:
    (signed / "manifest.json").write_text("{" + ",".join(['"a":1'] * 100_000) + "}")
    refused(signed, r"manifest\.json: has 'a' twice")


def test_too_many_too_large_and_together_too_large(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small limits; the files are real."""
    monkeypatch.setattr(folder, "MAX_BUNDLE", 5000)
    refused(signed, r"signed: its files have .* over the limit of 5,000 \(largest: golden\.npz\)")
    monkeypatch.setattr(folder, "MAX_FILE", 5000)
    refused(signed, r"signed/(golden\.npz|encoder\.onnx): has .* over the limit of 5,000")
    monkeypatch.setattr(folder, "MAX_FILES", 3)
    refused(signed, r"signed: holds more than 3 files")


def test_a_sparse_file_beyond_the_limit_is_refused_unread(signed: Path) -> None:
    with (signed / "encoder.onnx").open("r+b") as file:
        file.truncate(folder.MAX_FILE + 1)
    refused(signed, r"encoder\.onnx: has 2,147,483,649 bytes")


def test_a_golden_array_that_declares_more_than_it_holds_is_refused_before_memory_is_taken(signed: Path) -> None:
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6)})
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as parts:
        parts.writestr("crops.npy", array.getvalue())
        parts.writestr("embeddings.npy", b"")
    replace_file(signed, "golden.npz", packed.getvalue())
    refused(signed, r"golden\.npz: crops\.npy declares 1,000,000,000,000 bytes")
