"""Certificates decide by their points, and refuse what they do not cover."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pkd.toolkit.certificates.certificate import (
    CertificateFile,
    file_name,
    no_less,
    parse_certificate,
    read_certificate,
)
from pkd.toolkit.certificates.signing import Signature
from pkd.toolkit.core.errors import BundleError, NotTrusted
from tests.support.bundle_factory import certificate

QUERY, GALLERY, SPACE = (f"{name}@sha256:{digit * 64}" for name, digit in (("s", "1"), ("t", "2"), ("t", "3")))
MADE = certificate(QUERY, GALLERY, SPACE)
FIELDS = json.loads(MADE.model_dump_json())


def parse(fields: object) -> None:
    parse_certificate(json.dumps(fields).encode(), "dir/c.json")


def test_it_is_read_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / MADE.file_name
    path.write_text(MADE.model_dump_json(indent=2))
    assert read_certificate(path) == MADE and MADE.schema_version == 3
    assert path.name == file_name(QUERY, GALLERY) == "s@1111111111__t@2222222222.json"
    assert CertificateFile.read(path) == CertificateFile(path, path.read_bytes(), MADE, None)
    signature = Signature("sha256:" + "0" * 64, bytes(64))
    path.with_name(path.name + ".sig").write_bytes(signature.text())
    assert CertificateFile.read(path).signature == signature
    path.with_name(path.name + ".sig").write_bytes(b"")
    with pytest.raises(NotTrusted, match=r"\.json\.sig: not a signature"):
        CertificateFile.read(path)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (1, r"dir/c\.json: certificate schema 1; this pkd reads 3\. Evaluate again with this pkd"),
        (2, r"dir/c\.json: certificate schema 2; this pkd reads 3\. Evaluate again with this pkd"),
        (4, r"dir/c\.json: certificate schema 4; this pkd reads 3\. Upgrade pkd"),
        ("3", "certificate schema '3'"),
        (None, "certificate schema None"),
        (True, "certificate schema True"),
    ],
)
def test_another_schema_is_refused_with_the_remedy(version: object, said: str) -> None:
    with pytest.raises(BundleError, match=said):
        parse({"schema_version": version, "a_field_of_another_time": 1})


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"7", b"null", b"\xff\xfe", b"{" * 99, b"[" * 100_000])
def test_what_is_no_certificate_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"^dir/c\.json: not a certificate: it states no schema_version") as refused:
        parse_certificate(data, "dir/c.json")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"surprise": 1}, "surprise: is no field that this pkd knows"),
        ({"identities": 1}, "identities: must be greater than or equal to 2"),
        ({"min_fmr": 0}, "min_fmr: "),
        ({"seed": "x"}, "seed: "),
        ({"points": []}, "certifies nothing"),
        ({"query_role": "control"}, "query_role: "),
        ({"resolved_scores": [-1, 1]}, "first score, and its first of the last rate"),
        ({"min_fmr": 5.0}, "min_fmr: must be less than or equal to 1"),
        ({"impostor_pairs": 10**400}, "impostor_pairs: a number of more than 64 bits"),
        ({"images": True}, "images: must be a valid integer"),
        ({"seed": "5"}, "seed: must be a valid integer"),
        (
            {"calibration": FIELDS["calibration"] | {"low": [-1.0] * len(FIELDS["calibration"]["low"])}},
            r"low\.0: must be",
        ),
        ({"points": [FIELDS["points"][0] | {"threshold": 40.0}]}, r"points\.0\.threshold: must be"),
        ({"points": [FIELDS["points"][0] | {"tar_ci95": [0.9, 0.1]}]}, r"tar_ci95: an interval runs from 0\.9 to 0\.1"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], said: str) -> None:
    parse(FIELDS)
    with pytest.raises(BundleError, match=said):
        parse({**FIELDS, **change})


def test_two_equal_keys_are_refused() -> None:
    text = json.dumps(FIELDS)[:-1] + ', "impostor_pairs": 7}'
    with pytest.raises(BundleError, match=r"has 'impostor_pairs' twice in one object"):
        parse_certificate(text.encode(), "dir/c.json")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(BundleError, match="not a certificate: "):
            read_certificate(path)


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        (10 / 9870, "0.00102"),
        (1e-3, "0.001"),
        (0.1 * 3, "0.3"),
        (9.9951e-5, "0.0001"),
        (2 / 3e7, "6.67e-08"),
        (1.0, "1"),
    ],
)
def test_the_rate_to_ask_for_instead_is_one_that_is_covered(rate: float, said: str) -> None:
    assert no_less(rate) == said
    assert rate * (1 - 1e-9) <= float(said) <= 1.01 * rate
